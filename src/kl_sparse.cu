// Rows in which x lists some classes of y (kl_sparse.h), on the GPU: what kl_sparse_batch.h and kl_sparse_rows.h are for the CPU,
// with the same bits. klcore/backends/cuda/listed.py fills in a Listing and launches; nvrtc.py compiles this file after
// kl_cuda.cu, with its macros (KL_X: the dtype that is read, KL_Y: the one that is written) and these, which select the kernels:
//   KL_LISTED   once per row: the keys and the K + 1 classes, which do not depend on any dtype
//   KL_SLOPES   once per row: the derivatives of these classes
//   KL_OTHERS   y's numbers of all other classes, one warp per chunk
//   KL_SPREAD   gradients in their own dtype, one warp per chunk; summed, if the operand is broadcast
#pragma once
#if defined(KL_LISTED) || defined(KL_SLOPES) || defined(KL_OTHERS) || defined(KL_SPREAD)
#define KL_ARGUMENT Listing   // of these kernels

namespace kl {

struct Listing {              // one launch; intermediate results are stored row by row, in the order of the batch axes
  i64 shape[MAX_DIMS];        // of the batch axes
  i64 ndim, rows, n, chunks;  // classes of y, or of the gradient
  i64 count;                  // listed
  i64 tail, space_x, space_y;
  i64 columns;                // neighbouring rows, not classes, lie side by side in memory
  i64 inner, groups;          // kl_spread: rows that share a gradient row, and the number of groups of 1024 of these
  i64 level;                  // kl_others_fold: states per row
  double inverse_temperature;
  Key* keys;                  // `count` per row, sorted
  double *xs, *ys;            // count + 1 per row: all other classes as one, then those listed, in order
  double *slopes;             // likewise: derivatives with respect to xs, or ys
  double *dx;                 // `count` per row, in the caller's order
  double *states, *sums;      // working memory: see the kernels
  Array x, y, indices, tail_mass, weights, temperatures;
  Array known;                // ROW_NUMBERS per row
  Array values;               // kl_spread: the gradient as float64, if it is known
  Array to;                   // where it is written
};

struct ListedRow {
  const char *x, *y, *indices, *mass, *values;
  char* to;
  double* known;
  double weight, inverse_temperature;
  i64 number;                 // in the order of the intermediate results
};

KL_DEVICE ListedRow locate(const Listing& p, i64 r) {
  ListedRow row = {p.x.data, p.y.data, p.indices.data, p.tail_mass.data, p.values.data, p.to.data, nullptr, 1.0,
                   p.inverse_temperature, r};
  const char *weight = p.weights.data, *temperature = p.temperatures.data;
  i64 known = 0;
#pragma unroll 1
  for (int d = (int)p.ndim - 1; d >= 0; d--) {
    i64 i = d > 0 ? r % p.shape[d] : r;
    r = d > 0 ? r / p.shape[d] : 0;
    row.x += i * p.x.batch[d];
    row.y += i * p.y.batch[d];
    row.indices += i * p.indices.batch[d];
    row.mass += i * p.tail_mass.batch[d];
    row.values += i * p.values.batch[d];
    row.to += i * p.to.batch[d];
    known += i * p.known.batch[d];
    weight += i * p.weights.batch[d];
    temperature += i * p.temperatures.batch[d];
  }
  if (p.known.data) {
    row.known = (double*)(p.known.data + known);
    row.number = known / (i64)(ROW_NUMBERS * sizeof(double));
  }
  if (weight) row.weight = read_number(p.weights, weight);
  if (temperature) {
    double t = read_number(p.temperatures, temperature);
    row.inverse_temperature = (t >= COLDEST) & (t <= HOTTEST) ? 1 / t : nan<double>();   // makes the row NaN
  }
  return row;
}

KL_DEVICE int classes_of(i64 n, i64 chunk) { return n - chunk * CHUNK < CHUNK ? (int)(n - chunk * CHUNK) : CHUNK; }
KL_DEVICE i64 warps_in_all() { return (i64)gridDim.x * warps_of(); }
KL_DEVICE i64 this_warp() { return (i64)blockIdx.x * warps_of() + warp_of(); }

}  // namespace kl
#endif

// ---- once per row ----------------------------------------------------------------------------------------------------------
#if defined(KL_LISTED) || defined(KL_SLOPES)
namespace kl {

KL_DEVICE double number_at(const Array& a, const char* at, i64 k) {
  at += k * a.stride;
  if (a.dtype == FLOAT16) return Stored<FLOAT16>::widen<double>(*(const unsigned short*)at);
  if (a.dtype == BFLOAT16) return Stored<BFLOAT16>::widen<double>(*(const unsigned short*)at);
  return read_number(a, at);
}

// Sums totals of chunks as they arrive, in the order of kl_tree.h: lane l has columns l + 32 k.
struct Level {
  double column[4] = {0.0, 0.0, 0.0, 0.0};
  int count = 0;
  KL_DEVICE void add(double total) {
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (count % COLUMNS == WARP * k + lane_of()) column[k] += total;
    count++;
  }
  KL_DEVICE double total() const {
    double sum = (column[0] + column[2]) + (column[1] + column[3]);
    sum_lanes<1>(&sum);
    return sum;
  }
};

struct Warp {                 // a team (kl_sparse_steps.h)
  template <class F> KL_DEVICE void each(i64 n, const F& f) const {
    __syncwarp();
#pragma unroll 1
    for (i64 i = lane_of(); i < n; i += WARP) f(i);
    __syncwarp();
  }
  template <class F> KL_DEVICE double sum(i64 n, const F& f) const {
    constexpr int LEVELS = 3;   // above the chunks: there are at most 2^32 classes
    Level levels[LEVELS];
    double total = 0.0;
#pragma unroll 1
    for (i64 at = 0; at < n; at += CHUNK) {
      sum_states<1>(classes_of(n, at / CHUNK), [&](int i, double* v) { v[0] = f(at + i); }, &total);
      if (n <= CHUNK) return total;
      bool last = at + CHUNK >= n;
#pragma unroll
      for (int k = 0; k < LEVELS; k++) {
        levels[k].add(total);
        if (levels[k].count < CHUNK && !last) break;
        total = levels[k].total();
        levels[k] = Level();
      }
    }
    return total;
  }
  template <class F> KL_DEVICE double largest(i64 n, const F& f) const {
    double most = -infinity<double>();
#pragma unroll 1
    for (i64 i = lane_of(); i < n; i += WARP) most = larger(f(i), most);
    return lanes_max(most);
  }
  template <class F> KL_DEVICE i64 count(i64 n, const F& f) const {
    i64 found = 0;
#pragma unroll 1
    for (i64 at = 0; at < n; at += WARP) found += __popc(__ballot_sync(ALL_LANES, at + lane_of() < n && f(at + lane_of())));
    return found;
  }
};

KL_DEVICE Listed listed(const Listing& p, const ListedRow& row) {
  i64 r = row.number;
  bool given = p.tail_mass.data;
  return {(int)p.tail, (int)p.space_x, (int)p.space_y, p.n, p.count, row.inverse_temperature, p.keys + r * p.count, row.known,
          p.xs + r * (p.count + 1), p.ys + r * (p.count + 1), given, given ? read_number(p.tail_mass, row.mass) : 0.0};
}

// Calls f(its Listed, row) for all rows with a weight, one warp per row.
template <class F> KL_DEVICE void each_row(const Listing& p, const F& f) {
#pragma unroll 1
  for (i64 r = this_warp(); r < p.rows; r += warps_in_all()) {
    ListedRow row = locate(p, r);
    if (row.weight != 0) f(listed(p, row), row);
  }
}

}  // namespace kl
#endif

#if defined(KL_LISTED)
namespace kl {

// Sorts by the threads that call this; `all` is their barrier. A bitonic network in which every comparison puts the first of two
// keys in front, so that the elements missing from a power of two can simply be left out.
template <class Before, class All>
KL_DEVICE void sort_keys(Key* keys, i64 count, int thread, int threads, const Before& before, const All& all) {
#pragma unroll 1
  for (int block = 0; (i64)1 << block < count; block++)
#pragma unroll 1
    for (int step = block; step >= 0; step--) {
      const i64 apart = (i64)1 << step;
      all();
#pragma unroll 1
      for (i64 pair = thread;; pair += threads) {
        i64 i = (pair >> step << (step + 1)) | (pair & (apart - 1));
        if (i >= count) break;
        i64 j = step == block ? i ^ (2 * apart - 1) : i + apart;   // the halves of a block are compared mirrored
        if (j >= count) continue;
        Key first = keys[i], other = keys[j];
        if (!before(other, first)) continue;
        keys[i] = other;
        keys[j] = first;
      }
    }
}

}  // namespace kl

// One warp per row, or one block if there are many keys
extern "C" __global__ void __launch_bounds__(1024) kl_keys(const Listing p) {
  const bool alone = p.count <= CHUNK;
  const int threads = alone ? WARP : (int)blockDim.x, thread = alone ? lane_of() : (int)threadIdx.x;
#pragma unroll 1
  for (i64 r = alone ? this_warp() : blockIdx.x; r < p.rows; r += alone ? warps_in_all() : gridDim.x) {
    ListedRow row = locate(p, r);
    if (row.weight == 0) continue;
    Key* keys = p.keys + r * p.count;
#pragma unroll 1
    for (i64 k = thread; k < p.count; k += threads) keys[k] = key_of(*(const i64*)(row.indices + k * p.indices.stride), p.n, k);
    auto number = [&](i64 place) { return number_at(p.x, row.x, place); };
    sort_keys(keys, p.count, thread, threads, [&](Key k, Key other) { return comes_first(k, other, number); }, [&] {
      if (alone) __syncwarp();
      else __syncthreads();
    });
  }
}

// Merges every 1024 of the `level` states of each row into one. The results lie in `sums` as the states did in `states`; the last
// one goes to what is known of the row.
extern "C" __global__ void __launch_bounds__(128, 4) kl_others_fold(const Listing p) {
#pragma unroll 1
  for (i64 item = this_warp(); item < p.rows * p.groups; item += warps_in_all()) {
    i64 r = item / p.groups, g = item % p.groups;
    ListedRow row = locate(p, r);
    if (row.weight == 0) continue;
    States from = {p.states + r * NORM_STATES * p.level + g * CHUNK, p.level, classes_of(p.level, g)};
    double state[NORM_STATES];
    if (is_log((int)p.space_y)) fold_side<LOGITS>(from, 0, row.inverse_temperature, state);
    else fold_side<COUNTS>(from, 0, 1.0, state);
    if (lane_of() != 0) continue;
#pragma unroll
    for (int k = 0; k < NORM_STATES; k++) {
      if (p.groups == 1) row.known[OTHERS + k] = state[k];
      else p.sums[(r * NORM_STATES + k) * p.groups + g] = state[k];
    }
  }
}

extern "C" __global__ void __launch_bounds__(128, 4) kl_classes(const Listing p) {
  each_row(p, [&](const Listed& r, const ListedRow& row) {
    make_classes(Warp(), r, [&](i64 place) { return number_at(p.x, row.x, place); }, [&](i64 c) { return number_at(p.y, row.y, c); });
  });
}
#endif

#if defined(KL_SLOPES)
extern "C" __global__ void __launch_bounds__(128, 4) kl_by_x(const Listing p) {
  each_row(p, [&](const Listed& r, const ListedRow& row) {
    slopes_of_x(Warp(), r, [&](i64 place) { return number_at(p.x, row.x, place); }, p.slopes + row.number * (p.count + 1),
                p.dx + row.number * p.count);
  });
}
extern "C" __global__ void __launch_bounds__(128, 4) kl_by_y(const Listing p) {
  each_row(p, [&](const Listed& r, const ListedRow& row) { slopes_of_y(Warp(), r, p.slopes + row.number * (p.count + 1)); });
}
#endif

// ---- one warp per chunk ----------------------------------------------------------------------------------------------------
#if defined(KL_OTHERS) || defined(KL_SPREAD)
namespace kl {

struct Piece {                // a chunk of a row
  const Listing& p;
  const ListedRow& row;
  i64 start;
  int n;
  KL_DEVICE const Key* keys() const { return p.keys + row.number * p.count; }
  KL_DEVICE i64 first() const { return first_slot(keys(), p.count, start); }   // searched for while copies are under way
  // calls f(i, slot) for the listed classes
  template <class F> KL_DEVICE void each_listed(i64 first, const F& f) const {
    kl::each_listed(keys(), p.count, first + lane_of(), start, n, f, WARP);
  }
  template <typename S> KL_DEVICE void stage_y(S* slot) const {
    __syncwarp();
    stage(slot, row.y + start * p.y.stride, p.y.stride, n);
  }
  template <typename S> KL_DEVICE void pad(S* slot) const {   // after the staged numbers, as kl_cuda.cu does
    int end = (n + 255) / 256 * 256;
    __syncwarp();
#pragma unroll 1
    for (int i = n + lane_of(); i < end; i += WARP) slot[i] = slot[0];
    __syncwarp();
  }
};

}  // namespace kl
#endif

// y's numbers of the classes that are not listed: those listed count as having no mass. A row of one chunk leaves its result in
// `known`, longer rows leave states[(row * NORM_STATES + k) * chunks + chunk].
#if defined(KL_OTHERS)
extern "C" __global__ void __launch_bounds__(THREADS, 4) kl_others(const Listing p) {
  KL_SHARED_MEMORY(shared);
  Y* slot = (Y*)shared + warp_of() * CHUNK;
  const bool logs = is_log((int)p.space_y);
#pragma unroll 1
  for (i64 item = this_warp(); item < p.rows * p.chunks; item += warps_in_all()) {
    i64 r = p.columns ? item % p.rows : item / p.chunks, c = p.columns ? item / p.rows : item % p.chunks;
    ListedRow row = locate(p, r);
    if (row.weight == 0) continue;
    Piece piece = {p, row, c * CHUNK, classes_of(p.n, c)};
    piece.stage_y(slot);
    const i64 first = piece.first();
    arrived();
    __syncwarp();
    piece.each_listed(first, [&](int i, i64) { slot[i] = Stored<DY>::narrow((T)no_mass((int)p.space_y)); });
    piece.pad(slot);
    Wide at(piece.n);
    Norm norm;
    Tally tally;
    if (logs) norm = norm_chunk<DY>(at, slot, row.inverse_temperature);
    else tally = tally_chunk<DY>(at, slot);
    if (!at.leads()) continue;
    double* to = p.chunks == 1 ? row.known + OTHERS : p.states + r * NORM_STATES * p.chunks + c;
    i64 pitch = p.chunks == 1 ? 1 : p.chunks;
    to[0] = logs ? norm.max : tally.sum;
    to[pitch] = logs ? norm.count : tally.fewer;
    to[2 * pitch] = logs ? norm.rest : tally.more;
  }
}
#endif

// A gradient in its own dtype: `values`, or the one with respect to y, from that of each listed class and the slope of all others
// (kl_sparse.h). If several rows share it, every 1024 of them are summed, row by row, in double, into
// sums[(gradient row * groups + group) * n + class];
#if defined(KL_SPREAD)
namespace kl {

template <int D> KL_DEVICE void spread(const Piece& piece, X* slot, typename Stored<D>::Type* out) {
  const Listing& p = piece.p;
  const ListedRow& row = piece.row;
  __syncwarp();
  if (p.values.data) {
#pragma unroll 1
    for (int i = lane_of(); i < piece.n; i += WARP)
      out[i] = Stored<D>::narrow((T)read_number(p.values, row.values + (piece.start + i) * p.values.stride));
    __syncwarp();
    return;
  }
  const bool renorm = p.tail == RENORM, logs = is_log((int)p.space_y);
  const double *by_class = p.slopes + row.number * (p.count + 1), slope = by_class[0];
  const Scale<T> scale(logs ? slope_of(slope, norm_at(row.known + OTHERS)) : slope);
  const T same = renorm ? (T)spoiled(piece.keys(), p.count, row.inverse_temperature, 0.0) : T(1) * scale;
  const T max = (T)top_of(row.known[OTHERS]);
  const Inverse<T> it = inverse<T>(row.inverse_temperature);
  const bool parts = logs && !renorm;
  if (parts) piece.stage_y(slot);
  const i64 first = piece.first();
  if (parts) {
    arrived();
    piece.pad(slot);
  }
  Wide at(piece.n);
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T v[Wide::E];
    if (parts) {
      at.template read<DX>(slot, step, v);
#pragma unroll
      for (int e = 0; e < Wide::E; e++) v[e] = part_of_others(v[e], max, it);
      at.template write<D>(out, step, v, scale);
    } else {
#pragma unroll
      for (int e = 0; e < Wide::E; e++) v[e] = same;
      at.template write<D>(out, step, v, T(1));
    }
  }
  __syncwarp();
  piece.each_listed(first, [&](int i, i64 k) { out[i] = Stored<D>::narrow((T)by_class[k + 1]); });
  __syncwarp();
}

}  // namespace kl

extern "C" __global__ void __launch_bounds__(THREADS, KL_WIDE ? 3 : 4) kl_spread(const Listing p) {
  KL_SHARED_MEMORY(shared);
  const bool summed = DX != DY || p.inner > 1;
  char* mine = shared + warp_of() * CHUNK * (int)(sizeof(X) + (summed ? sizeof(T) + sizeof(double) : 0));
  double* sums = (double*)mine;
  T* own = (T*)(sums + CHUNK);
  X* slot = summed ? (X*)(own + CHUNK) : (X*)mine;
  const i64 rows = p.rows / p.inner;
#pragma unroll 1
  for (i64 item = this_warp(); item < rows * p.groups * p.chunks; item += warps_in_all()) {
    i64 at = p.columns ? item % (rows * p.groups) : item / p.chunks, c = p.columns ? item / (rows * p.groups) : item % p.chunks;
    i64 outer = at / p.groups, g = at % p.groups, end = (g + 1) * CHUNK < p.inner ? (g + 1) * CHUNK : p.inner;
    int n = classes_of(p.n, c);
    __syncwarp();
#pragma unroll 1
    for (int i = lane_of(); summed && i < n; i += WARP) sums[i] = 0.0;
#pragma unroll 1
    for (i64 i = g * CHUNK; i < end; i++) {
      ListedRow row = locate(p, outer * p.inner + i);
      Piece piece = {p, row, c * CHUNK, n};
      if (!summed) {
        __syncwarp();
        if (row.weight != 0) spread<DX>(piece, slot, slot);
        else
#pragma unroll 1
          for (int j = lane_of(); j < n; j += WARP) slot[j] = Stored<DX>::narrow(T(0));
        __syncwarp();
        unstage(row.to + c * CHUNK * p.to.stride, p.to.stride, (Y*)slot, n);   // DX is DY
      } else if (row.weight != 0) {
        spread<code_of<T>()>(piece, slot, own);
#pragma unroll 1
        for (int j = lane_of(); j < n; j += WARP) sums[j] += (double)own[j];
      }
    }
    if (!summed) continue;
    __syncwarp();
#pragma unroll 1
    for (int i = lane_of(); i < n; i += WARP) p.sums[(outer * p.groups + g) * p.n + c * CHUNK + i] = sums[i];
  }
}
// then the groups in order.
extern "C" __global__ void __launch_bounds__(128, 4) kl_spread_fold(const Listing p) {
  i64 all = p.rows / p.inner * p.n;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < all; e += (i64)gridDim.x * blockDim.x) {
    i64 outer = e / p.n, i = e % p.n;
    double sum = 0.0;
#pragma unroll 4
    for (i64 g = 0; g < p.groups; g++) sum += p.sums[(outer * p.groups + g) * p.n + i];
    *(Y*)(locate(p, outer * p.inner).to + i * p.to.stride) = Stored<DY>::narrow(sum);
  }
}
#endif
