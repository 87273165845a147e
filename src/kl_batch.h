// All rows of a plan over OpenMP threads. Called by kl_cpu.pyx without the GIL; calls one row's sweeps, or a
// block of short rows, through kl_isa.h. Holds no arithmetic but the adding up of rows, which follows kl_tree.h: which thread computes what, and
// how many there are, never changes a bit.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#elif !defined(KLCORE_NO_OPENMP)
#error "klcore needs a compiler with OpenMP (gcc or clang with -fopenmp, MSVC with /openmp). KLCORE_NO_OPENMP=1 builds it for one thread."
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(_M_X64)
#include <immintrin.h>
#endif

#include "kl_isa.h"

namespace kl {

// A child of fork() inherits the memory of OpenMP's thread pool without its threads, and GNU's runtime would wait for
// them for ever. The pool belongs to the thread that made it, so in a forked child parallel work starts on a new thread.
inline std::atomic<bool>& forked() {
  static std::atomic<bool> flag(false);
  return flag;
}
inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  forked();
  pthread_atfork(nullptr, nullptr, [] { forked() = true; });
#endif
}

// While one lives, its thread computes as numerics v2 says: rounding to nearest, subnormal numbers kept. A program may have
// chosen otherwise (torch.set_flush_denormal, a library linked with -ffast-math), and threads inherit that.
struct Arithmetic {
  Arithmetic(const Arithmetic&) = delete;
#if defined(__SSE2__) || defined(_M_X64)
  static constexpr unsigned ORDINARY = 0x1f80, MODES = 0xffc0;   // the other bits are flags
  unsigned found = _mm_getcsr();
  Arithmetic() {
    if ((found & MODES) != ORDINARY) _mm_setcsr(ORDINARY);
  }
  ~Arithmetic() {
    if ((found & MODES) != ORDINARY) _mm_setcsr(found);
  }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
  std::uint64_t found;
  Arithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(found));
    if (found) asm volatile("msr fpcr, %0" : : "r"((std::uint64_t)0));
  }
  ~Arithmetic() {
    if (found) asm volatile("msr fpcr, %0" : : "r"(found));
  }
#else
  Arithmetic() {}
#endif
};

constexpr int LINE = 16;              // neighbouring rows taken together at least where classes lie far apart: a cache line's
constexpr int GROUP = 256;            // and at most
constexpr i64 FEW = 4;                // rows below which it does not pay to take several at once
constexpr i64 TILE = 128 * CHUNK;      // numbers of an array that such rows bring together at once; the second level holds it
constexpr i64 SERIAL = 32768;         // classes below which a second thread costs more than it brings
constexpr i64 STREAM = 64 << 20;      // bytes of output from which on it is streamed past the caches
constexpr i64 KEPT = 4 << 20;         // bytes up to which what a sweep found out of a row is kept for the last one
constexpr i64 AHEAD = 1 << 20;        // bytes of a row pair that the second-level cache holds twice
constexpr i64 ROUND = 16 * CHUNK;     // rows whose totals are held at once
constexpr i64 BLOCK = CHUNK;          // rows summed into one partial when a gradient is summed over rows

struct Scratch {                      // 64-byte aligned memory
  explicit Scratch(size_t bytes) : raw((char*)std::malloc(bytes + 64)) {
    if (!raw) throw std::bad_alloc();
  }
  ~Scratch() { std::free(raw); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return (char*)(((std::uintptr_t)raw + 63) & ~(std::uintptr_t)63); }
  char* raw;
};

inline void write_zeros(const Array& a, char* row, i64 n) {
  if (!a.data) return;
  i64 size = size_of(a.dtype);
  for (i64 i = 0; i < n; i++) std::memset(row + i * a.stride, 0, (size_t)size);
}

inline void write_value(const Array& a, char* at, double v) {
  generic::narrow_to(a.dtype, &v, 1.0, 1, at, 0);
}

// Joins neighbouring batch axes over which every array moves in even steps.
inline void collapse(Plan& p) {
  Array* arrays[] = {&p.x, &p.y, &p.weights, &p.factors, &p.value, &p.dx, &p.dy};
  for (int d = p.ndim - 2; d >= 0; d--) {
    bool even = true;
    for (Array* a : arrays) even = even && (!a->data || a->batch[d] == a->batch[d + 1] * p.shape[d + 1]);
    if (!even) continue;
    p.shape[d] *= p.shape[d + 1];
    p.ndim--;
    for (Array* a : arrays) a->batch[d] = a->batch[d + 1];
    for (int e = d + 1; e < p.ndim; e++) {
      p.shape[e] = p.shape[e + 1];
      for (Array* a : arrays) a->batch[e] = a->batch[e + 1];
    }
  }
}

inline bool scattered(const Array& a) { return a.data && std::abs(a.stride) > 64; }

// n classes of m rows that are neighbours in memory, from columns to rows `pitch` bytes apart, or back. Eight classes at a
// time: as many cache lines, in which the rows share, and the eight after the next ones are asked for, since no hardware
// foresees steps of this size.
template <int SIZE, bool BACK> void turn(char* columns, i64 stride, int m, int n, char* rows, i64 pitch) {
  constexpr int STEP = 8;
  for (int start = 0; start < n; start += STEP) {
    int end = start + STEP < n ? start + STEP : n;
    for (int i = start + 2 * STEP; i < end + 2 * STEP && i < n; i++)
      for (int k = 0; k < m * SIZE; k += 64) prefetch(columns + i * stride + k);
    for (int j = 0; j < m; j++)
      for (int i = start; i < end; i++) {
        char *column = columns + i * stride + j * SIZE, *row = rows + j * pitch + i * SIZE;
        std::memcpy(BACK ? column : row, BACK ? row : column, SIZE);
      }
  }
}

template <bool BACK> void turn(int size, char* columns, i64 stride, int m, int n, char* rows, i64 pitch) {
  (size == 8 ? turn<8, BACK> : size == 4 ? turn<4, BACK> : turn<2, BACK>)(columns, stride, m, n, rows, pitch);
}

struct Batch {
  const Plan& p;
  Kernel kernel;
  const Isa& isa;
  i64 chunks, group;
  i64 panel, panels;                  // chunks whose states are held at once; how often that is
  i64 per_row;                        // doubles that a row's states take: those of a panel, then one a panel
  bool ahead;                         // read the next row while this one is written
  Few few_rows;                       // for rows so short that several are taken at once; or nullptr
  size_t bytes;                       // of scratch a thread
  size_t kept = 0;                    // where in the scratch; 0: nothing is kept
  // Where classes lie far apart, a chunk of all rows of a group is brought into rows before it is computed, and results
  // from rows into columns afterwards: `near` is the plan of that.
  static constexpr int OUTPUTS = 2, SIDES = 5;   // the first that is written; how many there are
  static constexpr Array Plan::*sides[SIDES] = {&Plan::x, &Plan::y, &Plan::value, &Plan::dx, &Plan::dy};
  size_t tile[SIDES] = {0};           // where in the scratch; 0: the array is used as it lies
  Plan near;

  Batch(const Plan& plan, const Isa& set) : p(plan), kernel(set.kernel(plan)), isa(set), near(plan) {
    chunks = (p.n + CHUNK - 1) / CHUNK;
    bool far = scattered(p.x) || scattered(p.y) || scattered(p.dx) || scattered(p.dy);
    group = far ? group_size() : 1;
    few_rows = isa.few(p);
    if (p.n < 1 || p.n > COLUMNS || p.rows < FEW) few_rows = nullptr;
    if (few_rows) group = isa.lanes(p.n, p.wide);
    i64 size = p.x.dtype == FLOAT64 ? 8 : 4;
    ahead = group == 1 && kernel.sweeps > 1 && chunks > 1 && 2 * p.n * size <= AHEAD && p.x.stride == size &&
            p.y.stride == size;
    panel = std::min<i64>(CHUNK, (std::max<i64>(chunks, 1) + 7) & ~(i64)7);
    panels = (chunks + CHUNK - 1) / CHUNK;
    per_row = (panel + panels) * *std::max_element(kernel.states, kernel.states + 3);
    bytes = (SCRATCH + sizeof(double) * (size_t)(per_row * (few_rows ? 1 : group)) + 63) & ~(size_t)63;
    if (group == 1 && kernel.kept > 0 && (i64)kernel.kept * chunks <= KEPT) {
      kept = bytes;
      bytes += kernel.kept * (size_t)chunks;
    }
    for (int k = 0; k < SIDES && group > 1 && !few_rows; k++) {
      Array& a = near.*sides[k];
      if (!scattered(a) || (&a == &near.value && p.output != TERMS)) continue;
      near.stream = 0;
      a.stride = size_of(a.dtype);
      tile[k] = bytes;
      bytes += (size_t)(pitch(k) * group);
    }
  }

  // How many rows are taken together: enough for TILE numbers, few enough that every thread finds some.
  i64 group_size() const {
    i64 last = p.ndim ? p.shape[p.ndim - 1] : 1, rows = TILE / std::min<i64>(CHUNK, std::max<i64>(p.n, 1));
    rows = std::min<i64>(std::min<i64>(rows, GROUP), p.rows / (4 * p.threads)) / LINE * LINE;
    return std::min(std::max<i64>(rows, LINE), std::max<i64>(last, 1));
  }

  // Rows of the tile begin at different offsets within a page: the first-level cache keeps few lines of one offset.
  i64 pitch(int k) const { return ((std::min<i64>(CHUNK, p.n) * size_of((p.*sides[k]).dtype) + 63) & ~(i64)63) + 64; }
  static char*& place(Row& row, int k) {
    char** places[SIDES] = {(char**)&row.x, (char**)&row.y, &row.value, &row.dx, &row.dy};
    return *places[k];
  }

  // The classes from `start` on of these rows, of sides [first, last), between arrays in which they lie far apart and the
  // tile.
  template <bool BACK>
  void turn_chunk(int first, int last, Row* row, int count, i64 start, int n, char* scratch) const {
    for (int k = first; k < last; k++) {
      if (!tile[k]) continue;
      const Array& a = p.*sides[k];
      for (int i = 0, m; i < count; i += m) {
        char* at = place(row[i], k);
        for (m = 1; i + m < count && place(row[i + m], k) == at + m * size_of(a.dtype);) m++;
        turn<BACK>(size_of(a.dtype), at + start * a.stride, a.stride, m, n, scratch + tile[k] + i * pitch(k), pitch(k));
      }
    }
  }

  // Row i of those in the tile, so that `start` classes on it finds its own.
  Row in_tile(const Row& row, int i, i64 start, char* scratch) const {
    Row moved = row;
    for (int k = 0; k < SIDES; k++)
      if (tile[k]) place(moved, k) = scratch + tile[k] + i * pitch(k) - start * size_of((p.*sides[k]).dtype);
    return moved;
  }

  int size(i64 chunk) const { return (int)std::min<i64>(CHUNK, p.n - chunk * CHUNK); }

  // One panel's states, and then all panels', into one.
  void fold_panel(int s, double* states, i64 k) const {
    int count = (int)std::min<i64>(CHUNK, chunks - k * CHUNK);
    kernel.fold(p, s, states, count, panel, states + panel * kernel.states[s] + k, panels);
  }
  void finish_row(int s, double* states, double* stats) const {
    double *at = states + panel * kernel.states[s], last[MAX_STATES];
    i64 count = panels;
    for (; count > CHUNK; count = (count + CHUNK - 1) / CHUNK)
      for (i64 k = 0; k * CHUNK < count; k++)
        kernel.fold(p, s, at + k * CHUNK, (int)std::min<i64>(CHUNK, count - k * CHUNK), panels, at + k, panels);
    if (count > 0) kernel.fold(p, s, at, (int)count, panels, last, 1);
    kernel.finish(p, s, count > 0 ? last : nullptr, stats);
  }

  // Sweeps [first, last) of rows [r, r + count), in one thread.
  void rows(i64 r, int count, int first, int last, Row* row, double (*stats)[MAX_STATS], char* scratch) const {
    double* states = (double*)(scratch + SCRATCH);
    for (int i = 0; i < count; i++) row[i] = locate(p, r + i);
    if (kept && first == 0 && last == kernel.sweeps) row[0].kept = scratch + kept;
    if (ahead && r + count < p.rows) {
      Row next = locate(p, r + count);
      row[0].next_x = next.x;
      row[0].next_y = next.y;
    }
    for (int s = first; s < last; s++) {
      for (i64 k = 0; k < panels; k++) {
        for (i64 c = k * CHUNK; c < std::min(chunks, (k + 1) * CHUNK); c++) {
          turn_chunk<false>(0, OUTPUTS, row, count, c * CHUNK, size(c), scratch);
          for (int i = 0; i < count; i++)
            if (row[i].weight != 0)
              kernel.chunk(near, in_tile(row[i], i, c * CHUNK, scratch), s, c * CHUNK, size(c), stats[i],
                           states + i * per_row + c % CHUNK, panel, scratch);
          // each result in the sweep that writes it: the next chunk takes its place in the tile
          if (s == kernel.terms_sweep()) turn_chunk<true>(OUTPUTS, OUTPUTS + 1, row, count, c * CHUNK, size(c), scratch);
          if (s == kernel.sweeps - 1) turn_chunk<true>(OUTPUTS + 1, SIDES, row, count, c * CHUNK, size(c), scratch);
        }
        for (int i = 0; i < count; i++)
          if (row[i].weight != 0) fold_panel(s, states + i * per_row, k);
      }
      for (int i = 0; i < count; i++)
        if (row[i].weight != 0) finish_row(s, states + i * per_row, stats[i]);
    }
  }

  // The same for one row, its chunks over all threads. `all` is scratch for each.
  void long_row(Row& row, double* stats, double* states, char* all) const {
    for (int s = 0; s < kernel.sweeps; s++) {
      for (i64 k = 0; k < panels; k++) {
        i64 end = std::min(chunks, (k + 1) * CHUNK);
#if defined(_OPENMP)
#pragma omp parallel num_threads(p.threads)
#endif
        {
          Arithmetic arithmetic;
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 8) nowait
#endif
          for (i64 c = k * CHUNK; c < end; c++)
            kernel.chunk(p, row, s, c * CHUNK, size(c), stats, states + c % CHUNK, panel, all + thread() * (i64)SCRATCH);
          if (p.stream) stream_end();
        }
        fold_panel(s, states, k);
      }
      finish_row(s, states, stats);
    }
  }

  static int thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
  }

  // What becomes of a finished row; returns what it adds to the total.
  double finish(const Row& row, const double* stats) const {
    if (row.weight == 0) {            // never read: its value and gradient are zero
      if (p.output == TERMS) write_zeros(p.value, row.value, p.n);
      write_zeros(p.dx, row.dx, p.n);
      write_zeros(p.dy, row.dy, p.n);
    }
    double v = row.weight == 0 ? 0.0 : row.weight == 1 ? stats[0] : stats[0] * row.weight;
    if (p.output == PER_ROW) write_value(p.value, row.value, v);
    return v;
  }
};

// Adds up the rows' totals in the order of kl_tree.h as they come, ROUND at a time.
struct Total {
  const Isa& isa;
  std::vector<double> chunks;         // the totals of finished chunks of rows
  explicit Total(const Isa& set) : isa(set) {}
  void add(double* rows, i64 count) {
    for (i64 i = 0; i < count; i += CHUNK) chunks.push_back(isa.sum_levels(rows + i, std::min<i64>(CHUNK, count - i)));
  }
  double value() { return isa.sum_levels(chunks.data(), (i64)chunks.size()); }
};

inline void run_here(Plan& p, const Isa& isa) {
  collapse(p);
  i64 outputs = (p.dx.data != nullptr) + (p.dy.data != nullptr) + (p.output == TERMS);
  p.stream = p.rows * p.n * 4 * outputs >= STREAM;
  Batch b(p, isa);
  Total total(isa);
  bool totals = p.output == TOTAL;
  i64 work = p.rows * std::max<i64>(p.n, 1);
  if (work <= SERIAL) p.threads = 1;
  i64 round = totals ? std::min<i64>(p.rows, ROUND) : p.rows;
  std::vector<double> held(totals ? (size_t)round : 0);
  bool by_chunk = p.threads > 1 && p.rows < 4 * p.threads && b.chunks >= 4 * p.threads;
  Scratch scratch(by_chunk ? b.bytes + (size_t)SCRATCH * p.threads : b.bytes * p.threads);

  if (by_chunk) {
    for (i64 r = 0; r < p.rows; r++) {
      Row row = locate(p, r);
      double stats[MAX_STATS] = {0};
      if (b.kept) row.kept = scratch.data() + b.kept;
      if (row.weight != 0) b.long_row(row, stats, (double*)(scratch.data() + SCRATCH), scratch.data() + b.bytes);
      double v = b.finish(row, stats);
      if (totals) held[(size_t)r] = v;
    }
    if (totals) total.add(held.data(), p.rows);
  } else {
    for (i64 start = 0; start < p.rows; start += round) {
      i64 end = std::min(p.rows, start + round), groups = (end - start + b.group - 1) / b.group;
      i64 share = std::max<i64>(1, groups / (p.threads * 8));   // runs of rows, so that each finds its next one asked for
      (void)share;                    // without OpenMP
      auto group = [&](i64 g) {
        i64 r = start + g * b.group;
        int count = (int)std::min<i64>(b.group, end - r);
        char* mine = scratch.data() + (size_t)Batch::thread() * b.bytes;
        Row row[GROUP];
        double stats[GROUP][MAX_STATS];
        if (b.few_rows) {
          double values[GROUP];
          char alone[GROUP] = {0};
          if (count < FEW) std::memset(alone, 1, sizeof alone);
          else b.few_rows(p, r, count, values, alone, mine);
          for (int i = 0; i < count; i++) {
            if (alone[i]) {
              b.rows(r + i, 1, 0, b.kernel.sweeps, row, stats, mine);
              values[i] = b.finish(row[0], stats[0]);
            }
            if (totals) held[(size_t)(r + i - start)] = values[i];
          }
          return;
        }
        b.rows(r, count, 0, b.kernel.sweeps, row, stats, mine);
        for (int i = 0; i < count; i++) {
          double v = b.finish(row[i], stats[i]);
          if (totals) held[(size_t)(r + i - start)] = v;
        }
      };
      if (p.threads == 1) {
        for (i64 g = 0; g < groups; g++) group(g);
      } else {
#if defined(_OPENMP)
#pragma omp parallel num_threads(p.threads)
#endif
        {
          Arithmetic arithmetic;
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, share) nowait
#endif
          for (i64 g = 0; g < groups; g++) group(g);
          if (p.stream) stream_end();
        }
      }
      if (p.stream) stream_end();
      if (totals) total.add(held.data(), end - start);
    }
  }
  if (totals) p.total = total.value();
}

// One gradient of an operand that is broadcast over the last `inner` batch axes: the sum over these rows of their
// gradients, in blocks of BLOCK rows, each added up row by row in double, the blocks in order. The plan's dx or dy
// (whichever is present) has the operand's own shape; its strides along the inner axes are not used.
inline void run_summed(Plan& p, const Isa& isa, int inner_axes) {
  bool of_x = p.dx.data != nullptr;
  Array target = of_x ? p.dx : p.dy;
  Plan q = p;                         // one gradient row as float64, into a buffer
  Array& to = of_x ? q.dx : q.dy;
  q.output = PER_ROW;
  q.value.data = nullptr;
  to.dtype = FLOAT64;
  to.stride = 8;
  Batch b(q, isa);
  i64 inner = 1;
  for (int d = p.ndim - inner_axes; d < p.ndim; d++) inner *= p.shape[d];
  i64 outer = inner ? p.rows / inner : 0, blocks = (inner + BLOCK - 1) / BLOCK;
  int last = b.kernel.sweeps - 1, threads = p.rows * std::max<i64>(p.n, 1) <= SERIAL ? 1 : p.threads;
  i64 at_once = std::max<i64>(1, std::min<i64>(blocks, 4 * threads / std::max<i64>(1, b.chunks) + 1));
  std::vector<double> sums((size_t)(at_once * p.n)), result((size_t)p.n);
  std::vector<double> known((size_t)(at_once * BLOCK * MAX_STATS));
  Scratch scratch(b.bytes * (size_t)threads);
  auto mine = [&] { return scratch.data() + (size_t)Batch::thread() * b.bytes; };
  auto stats_of = [&](i64 k) { return (double(*)[MAX_STATS])(known.data() + k * MAX_STATS); };

  for (i64 o = 0; o < outer; o++) {
    std::fill(result.begin(), result.end(), 0.0);
    for (i64 first = 0; first < blocks; first += at_once) {
      i64 count = std::min(at_once, blocks - first), begin = first * BLOCK, end = std::min(inner, (first + count) * BLOCK);
      std::fill(sums.begin(), sums.end(), 0.0);
      if (last > 0) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
#endif
        for (i64 i = begin; i < end; i++) {
          Arithmetic arithmetic;
          Row row;
          b.rows(o * inner + i, 1, 0, last, &row, stats_of(i - begin), mine());
        }
      }
      i64 items = count * b.chunks;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
#endif
      for (i64 item = 0; item < items; item++) {
        Arithmetic arithmetic;
        i64 k = item / b.chunks, c = item % b.chunks;
        int size = b.size(c);
        double gradient[CHUNK], state[MAX_STATS], *sum = sums.data() + k * p.n + c * CHUNK;
        for (i64 i = k * BLOCK; i < std::min(end - begin, (k + 1) * BLOCK); i++) {
          Row row = locate(q, o * inner + begin + i);
          if (row.weight == 0) continue;
          (of_x ? row.dx : row.dy) = (char*)(gradient - c * CHUNK);
          b.kernel.chunk(q, row, last, c * CHUNK, size, *stats_of(i), state, 1, mine());
          for (int j = 0; j < size; j++) sum[j] += gradient[j];
        }
      }
      for (i64 k = 0; k < count; k++)
        for (i64 j = 0; j < p.n; j++) result[(size_t)j] += sums[(size_t)(k * p.n + j)];
    }
    Row row = locate(p, o * inner);
    char* at = of_x ? row.dx : row.dy;
    generic::narrow_to(target.dtype, result.data(), 1.0, p.n, at, target.stride);
  }
}

// Does `work`, which follows a plan; returns 0, or 1 if memory ran out.
template <class Work> int guarded(Plan& p, Work work) noexcept {
  int failed = 0;
  auto caught = [&] {
    try {
      Arithmetic arithmetic;
      work();
    } catch (...) {
      failed = 1;
    }
  };
  if (p.threads > 1 && forked().load()) {
    try {
      std::thread(caught).join();
      return failed;
    } catch (...) {
      p.threads = 1;                  // no thread to be had: the same bits on this one
    }
  }
  caught();
  return failed;
}

// How many rows are computed at once because they are of few classes; 0: none.
inline int few_at_once(const Plan& p, const Isa& isa) {
  Batch b(p, isa);
  return b.few_rows ? (int)b.group : 0;
}

// Runs a plan. inner_axes < 0: an ordinary run; else run_summed.
inline int run(Plan& p, const Isa& isa, int inner_axes) noexcept {
  return guarded(p, [&] {
    if (inner_axes < 0) run_here(p, isa);
    else run_summed(p, isa, inner_axes);
  });
}

}  // namespace kl
