// All rows of a call in which x lists some classes, over threads: sorting the lists, and the steps of kl_sparse_rows.h that are
// not sweeps over y. Called by kl_cpu.pyx for klcore.backends.sparse, without the GIL.
#pragma once
#include "kl_batch.h"

namespace kl {

constexpr i64 FEW_KEYS = 32;          // up to this many are sorted at once

// Sorts keys as integers, and then the keys of each class by x's numbers. Another thread may write these numbers meanwhile, so the
// second sort is a heap sort, which stays within bounds whatever the comparisons say.
template <class Before> void sort_run(Key* first, Key* last, const Before& before) {
  std::sort(first, last);
  for (Key* end; first != last; first = end) {
    for (end = first + 1; end != last && class_of(*end) == class_of(*first);) end++;
    if (end - first == 1 || !is_listed(*first)) continue;
    std::make_heap(first, end, before);
    std::sort_heap(first, end, before);
  }
}

// Sorts the keys of row r. Many keys are first binned by chunk: `room` holds as many keys, `starts` all chunks and two more.
inline void sort_keys(const Plan& p, i64 r, Key* room, i64* starts) {
  const Sparse& s = *p.sparse;
  const char* at = generic::at_row(p, s.indices, r);
  Key* keys = s.keys + r * s.count;
  const char* x = generic::at_row(p, s.x, r);
  auto number = [&](i64 place) { return generic::number_at(s.x, x, place); };
  auto before = [&](Key k, Key other) { return comes_first(k, other, number); };
  for (i64 k = 0; k < s.count; k++) {
    i64 index;
    std::memcpy(&index, at + k * s.indices.stride, sizeof index);
    keys[k] = key_of(index, p.n, k);
  }
  if (s.count <= FEW_KEYS) return sort_run(keys, keys + s.count, before);
  i64 chunks = (p.n + CHUNK - 1) / CHUNK;
  auto bin = [&](Key k) { return is_listed(k) ? class_of(k) / CHUNK : chunks; };
  std::fill(starts, starts + chunks + 2, 0);
  for (i64 k = 0; k < s.count; k++) starts[bin(keys[k]) + 1]++;
  for (i64 c = 0; c <= chunks; c++) starts[c + 1] += starts[c];
  for (i64 k = 0; k < s.count; k++) room[starts[bin(keys[k])]++] = keys[k];
  std::copy(room, room + s.count, keys);
  for (i64 c = 0, first = 0; c <= chunks; first = starts[c++]) sort_run(keys + first, keys + starts[c], before);
}

// Calls f(r, this thread's part of the scratch memory) for all rows with a weight; `room`: bytes per thread.
template <class F> void each_row(const Plan& p, i64 work, size_t room, Watch& watch, F f) {
  int threads = granted((int)std::min<i64>(most_threads(p.threads, p.rows * work), std::max<i64>(p.rows, 1)));
  Scratch scratch(std::max<size_t>(room * (size_t)threads, 1));
  each(watch, threads, p.rows, 8, false, [&](i64 r, Worker& worker) {
    if (worker.stops(work)) return;
    if (locate(p, r).weight != 0) f(r, scratch.data() + (size_t)worker.number * room);
  });
}

inline int sort_all(const Plan& p, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    i64 count = p.sparse->count, places = count <= FEW_KEYS ? 0 : count + (p.n + CHUNK - 1) / CHUNK + 2;
    each_row(p, count, (size_t)places * 8, watch, [&](i64 r, char* room) { sort_keys(p, r, (Key*)room, (i64*)room + count); });
  });
}

inline int step_all(const Plan& p, RowStep step, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    each_row(p, p.sparse->count, 0, watch, [&](i64 r, char*) { step(p, r); });
  });
}

}  // namespace kl
