// All rows of a call in which x lists some classes, over threads: the list sorted, and the steps of kl_sparse_rows.h that are
// not sweeps over y. Called by kl_cpu.pyx for klcore.backends.sparse, without the GIL.
#pragma once
#include "kl_batch.h"

namespace kl {

constexpr i64 FEW_KEYS = 32;          // up to which they are sorted at once

struct Before {                       // the order of keys: by class; of the same one by x's number, and if need be by place
  const Array& a;
  const char* x;
  unsigned long long number(Key k) const { return in_order(generic::number_at(a, x, place_of(k))); }
  bool operator()(Key k, Key other) const {
    if (class_of(k) != class_of(other)) return class_of(k) < class_of(other);
    unsigned long long one = number(k), two = number(other);
    return one != two ? one < two : k < other;
  }
};

// The keys of row r. Many come chunk by chunk of the classes first; `room` is for as many, `starts` for all chunks and two.
inline void sort_keys(const Plan& p, i64 r, Key* room, i64* starts) {
  const Sparse& s = *p.sparse;
  const char* at = generic::at_row(p, s.indices, r);
  Key* keys = s.keys + r * s.count;
  Before before = {s.x, generic::at_row(p, s.x, r)};
  for (i64 k = 0; k < s.count; k++) {
    i64 index;
    std::memcpy(&index, at + k * s.indices.stride, sizeof index);
    keys[k] = key_of(index, p.n, k);
  }
  if (s.count <= FEW_KEYS) return std::sort(keys, keys + s.count, before);
  i64 chunks = (p.n + CHUNK - 1) / CHUNK;
  auto bin = [&](Key k) { return is_listed(k) ? class_of(k) / CHUNK : chunks; };
  std::fill(starts, starts + chunks + 2, 0);
  for (i64 k = 0; k < s.count; k++) starts[bin(keys[k]) + 1]++;
  for (i64 c = 0; c <= chunks; c++) starts[c + 1] += starts[c];
  for (i64 k = 0; k < s.count; k++) room[starts[bin(keys[k])]++] = keys[k];
  std::copy(room, room + s.count, keys);
  for (i64 c = 0, first = 0; c <= chunks; first = starts[c++]) std::sort(keys + first, keys + starts[c], before);
}

// f(row, its number, what is this thread's of the room) for all rows that count
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

// A step of all rows, one of Isa::sparse.
inline int step_all(const Plan& p, const Isa& isa, int step, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    each_row(p, p.sparse->count, 0, watch, [&](i64 r, char*) { isa.sparse[step](p, r); });
  });
}

}  // namespace kl
