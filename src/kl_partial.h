// Rows in parts, for arrays that are never in one place: a sweep over a block of the classes, merging the states of all blocks
// into the rows' stats, and the outputs of a block from these stats. Called by kl_cpu.pyx for klcore.backends.dask and
// klcore.Shard, without the GIL. The sweeps are those of kl_rows.h, chunk by chunk, and states are merged as Batch merges
// them (kl_batch.h). If all blocks but the last hold a multiple of CHUNK classes, the chunks are those of the whole row, and the
// bits are the same.
#pragma once
#include "kl_batch.h"

namespace kl {

// How many doubles a chunk leaves in a sweep of this plan; -1 if there is no such sweep
inline int states_of(const Plan& p, const Isa& isa, int sweep) {
  Kernel kernel = isa.kernel(p);
  return sweep < kernel.sweeps ? kernel.states[sweep] : -1;
}

// Sweep `s` over all rows of a block. `stats`: MAX_STATS per row, from the sweeps before it, or nullptr. `states`: per row,
// states_of(s) lines of one double per chunk, zero on entry; if they are given, nothing else is written. Without them the outputs
// are written.
inline void sweep_here(Plan& p, const Isa& isa, int s, const double* stats, double* states, Watch& watch) {
  static char nowhere;
  if (states) {   // a gradient through a softmax needs an extra sum in the second sweep, and these request it
    p.dx.data = s > 0 && p.dx.data ? &nowhere : nullptr;
    p.dy.data = s > 0 && p.dy.data ? &nowhere : nullptr;
  }
  collapse(p);
  p.threads = most_threads(p.threads, p.rows * p.n);
  Batch b(p, isa);
  i64 width = b.kernel.states[s], items = (p.rows + b.group - 1) / b.group * b.chunks;
  int threads = granted((int)std::min<i64>(p.threads, items));
  Scratch scratch((size_t)SCRATCH * (size_t)threads);
  each(watch, threads, items, 8, false, [&](i64 item, Worker& worker) {
    i64 c = item % b.chunks, first = item / b.chunks * b.group;
    double unused[MAX_STATES];
    for (i64 r = first; r < std::min(p.rows, first + b.group) && !worker.stops(b.size(c)); r++) {
      Row row = locate(p, r);
      double* to = states ? states + r * width * b.chunks + c : unused;
      if (row.weight != 0)
        b.kernel.chunk(p, row, s, c * CHUNK, b.size(c), stats ? stats + r * MAX_STATS : nullptr, to,
                       states ? b.chunks : 1, scratch.data() + (size_t)worker.number * SCRATCH);
      else if (c == 0 && !states)
        b.finish(row, nullptr, worker);
    }
  });
}

// The gradient of an operand that is broadcast over the last `inner_axes` batch axes, summed over these like SummedGradient of
// kl_batch.h: rows one by one in blocks of BLOCK, then the blocks.
inline void sweep_summed(Plan& p, const Isa& isa, int s, const double* stats, int inner_axes, Watch& watch) {
  bool of_x = p.dx.data != nullptr;
  Array target = of_x ? p.dx : p.dy;
  Plan q = p;                         // one chunk of one gradient row as float64, into a buffer
  Array& to = of_x ? q.dx : q.dy;
  to.dtype = FLOAT64;
  to.stride = 8;
  q.threads = most_threads(p.threads, p.rows * p.n);
  Batch b(q, isa);
  i64 inner = 1;
  for (int d = p.ndim - inner_axes; d < p.ndim; d++) inner *= p.shape[d];
  i64 items = inner ? p.rows / inner * b.chunks : 0;
  int threads = granted((int)std::min<i64>(q.threads, items));
  constexpr size_t BYTES = SCRATCH + 3 * sizeof(double) * CHUNK;
  Scratch scratch(BYTES * (size_t)threads);
  each(watch, threads, items, 1, false, [&](i64 item, Worker& worker) {
    i64 c = item % b.chunks, begin = item / b.chunks * inner;
    int size = b.size(c);
    char* mine = scratch.data() + (size_t)worker.number * BYTES;
    double *gradient = (double*)(mine + SCRATCH), *sum = gradient + CHUNK, *result = sum + CHUNK, unused[MAX_STATES];
    std::fill(result, result + size, 0.0);
    for (i64 first = 0; first < inner; first += BLOCK) {
      std::fill(sum, sum + size, 0.0);
      for (i64 i = first; i < std::min(inner, first + BLOCK); i++) {
        if (worker.stops(size)) return;
        Row row = locate(q, begin + i);
        if (row.weight == 0) continue;
        (of_x ? row.dx : row.dy) = (char*)gradient - c * CHUNK * 8;
        b.kernel.chunk(q, row, s, c * CHUNK, size, stats ? stats + (begin + i) * MAX_STATS : nullptr, unused, 1,
                       mine);
        for (int j = 0; j < size; j++) sum[j] += gradient[j];
      }
      for (int j = 0; j < size; j++) result[j] += sum[j];
    }
    Row row = locate(p, begin);
    char* at = (of_x ? row.dx : row.dy) + c * CHUNK * target.stride;
    generic::narrow_to(target.dtype, result, 1.0, size, at, target.stride);
  });
}

// Merges the states that sweep `s` left of all blocks, `count` per line, into the rows' stats, MAX_STATS per row; with `fold`, into
// one state per row, from at least one. After the last sweep, the first of the stats becomes what the row adds to a total: its
// value times its weight. Overwrites the states. The plan has no classes, only rows with their weights and temperatures.
inline void merge_here(Plan& p, const Isa& isa, int s, double* states, i64 count, double* into, bool fold, Watch& watch) {
  collapse(p);
  Batch b(p, isa);
  i64 width = b.kernel.states[s];
  int threads = granted((int)std::min<i64>(most_threads(p.threads, p.rows * count * CHUNK), p.rows));
  each(watch, threads, p.rows, 8, false, [&](i64 r, Worker& worker) {
    if (worker.stops(count * CHUNK)) return;
    Row row = locate(p, r);
    double* at = states + r * width * count;
    double* to = into + r * (fold ? width : MAX_STATS);
    if (row.weight != 0 && fold) b.fold_states(row, s, at, count, count, to);
    else if (row.weight != 0) b.finish_states(row, s, at, count, count, to);
    if (s + 1 == b.kernel.sweeps && !fold) to[0] = b.finish(row, to, worker);   // without outputs, the one that finds the value
  });
}

// The sum of every CHUNK of the plan's weights
inline int chunk_sums(Plan& p, const Isa& isa, double* sums, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    collapse(p);
    std::vector<double> chunk(CHUNK);
    each(watch, 1, (p.rows + CHUNK - 1) / CHUNK, 1, false, [&](i64 c, Worker& worker) {
      int count = (int)std::min<i64>(CHUNK, p.rows - c * CHUNK);
      if (worker.stops(count)) return;
      generic::runs(p, c * CHUNK, count, [&](const Row&, int k, int m) {
        read_numbers(p.weights.dtype, generic::at_row(p, p.weights, c * CHUNK + k), generic::step_of(p, p.weights), m,
                     chunk.data() + k);
      });
      sums[c] = isa.sum_levels(chunk.data(), count);
    });
  });
}

// Both return what `guarded` returns.
inline int sweep(Plan& p, const Isa& isa, int s, const double* stats, double* states, int inner_axes, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    if (inner_axes < 0) sweep_here(p, isa, s, stats, states, watch);
    else sweep_summed(p, isa, s, stats, inner_axes, watch);
  });
}
inline int merge(Plan& p, const Isa& isa, int s, double* states, i64 count, double* into, bool fold, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) { merge_here(p, isa, s, states, count, into, fold, watch); });
}

}  // namespace kl
