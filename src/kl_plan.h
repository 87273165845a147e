// What one call asks of the CPU, where its rows are in memory, and how a kind of row is computed. Filled in by kl_cpu.pyx; read
// by kl_rows.h (one row), kl_few.h (short rows) and kl_batch.h (all rows).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kl {

typedef std::int64_t i64;

constexpr int MAX_DIMS = 64;                          // NumPy's limit

struct Array {                // strides in bytes, of any sign; data == nullptr: absent
  char* data;
  i64 stride;                 // along the classes
  i64 batch[MAX_DIMS];        // along the batch axes
  int dtype;
};

enum Step { SUM_OTHERS, SPREAD, COPY };   // of a call in which x lists some classes
struct Sparse;
struct Plan {
  int operation, space_x, space_y;   // kl::Operation, kl::Space
  int output;
  int wide;                          // compute in double
  int threads;
  int stream;                        // outputs are larger than the caches
  int ndim;                          // batch axes
  i64 shape[MAX_DIMS];
  i64 rows, n;
  double inverse_temperature;        // of all rows, if there are no `temperatures`
  double gradient_scale;
  double parameter;                  // of operations that take one
  double factor;                     // of all values and gradients: multiplies the rows' weights
  Array x, y;
  Array weights, temperatures;       // one per row, of any kl::Dtype or kl::WholeNumbers
  Array factors;                     // one per class, float64 or float32; multiply terms and gradients
  Array value, dx, dy;               // dx and dy: one gradient row per batch row
  double total;                      // result of TOTAL
  const Sparse* sparse;              // for a step of kl_sparse_rows.h, where x is the side that has all classes; else nullptr
  int step;                          // kl::Step
  Array known;                       // for these steps: ROW_NUMBERS doubles per row
};

// A call in which x lists `count` classes of each row of y (kl_sparse.h). Intermediate results are stored row by row.
struct Sparse {
  i64 count;
  int tail, space_x, space_y;        // kl::Tail; kl::Space
  Array x, indices, tail_mass;       // `count` per row, of any strides; int64; one per row, or absent
  Key* keys;                         // `count` per row, sorted
  double* known;                     // ROW_NUMBERS per row
  double *xs, *ys, *slopes;          // count + 1 per row: all other classes as one, then those listed, in order
  double* dx;                        // `count` per row, in the caller's order
};

// The dtypes, besides kl::Dtype, of an array that holds one number per row. A boolean is a UINT8.
enum WholeNumbers { INT8 = 4, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64 };

template <typename S> double as_double(S v) { return (double)v; }
template <typename S> void read_as(const char* at, i64 step, i64 n, double* to, double (*widen)(S)) {
  for (i64 k = 0; k < n; k++) {
    S v;
    std::memcpy(&v, at + k * step, sizeof v);
    to[k] = widen(v);
  }
}
// Reads n numbers, `step` bytes apart.
inline void read_numbers(int dtype, const char* at, i64 step, i64 n, double* to) {
  switch (dtype) {
    case FLOAT64: return read_as(at, step, n, to, as_double<double>);
    case FLOAT32: return read_as(at, step, n, to, as_double<float>);
    case FLOAT16: return read_as(at, step, n, to, Stored<FLOAT16>::widen<double>);
    case BFLOAT16: return read_as(at, step, n, to, Stored<BFLOAT16>::widen<double>);
    case INT8: return read_as(at, step, n, to, as_double<std::int8_t>);
    case INT16: return read_as(at, step, n, to, as_double<std::int16_t>);
    case INT32: return read_as(at, step, n, to, as_double<std::int32_t>);
    case INT64: return read_as(at, step, n, to, as_double<std::int64_t>);
    case UINT8: return read_as(at, step, n, to, as_double<std::uint8_t>);
    case UINT16: return read_as(at, step, n, to, as_double<std::uint16_t>);
    case UINT32: return read_as(at, step, n, to, as_double<std::uint32_t>);
    case UINT64: return read_as(at, step, n, to, as_double<std::uint64_t>);
  }
}

struct Row {                  // one row of the plan: its addresses, its weight, and the factor of its logits
  const char *x, *y, *factors;
  char *value, *dx, *dy;
  double weight, inverse_temperature;
  const char *next_x, *next_y;   // the following row, if it may be prefetched
  char* kept;                    // for what a sweep leaves for a later one, 64-byte aligned; or nullptr
  double* known;
};

// Whether logits may have to be divided by a temperature; dividing by 1 changes no bit
inline bool is_tempered(const Plan& p) { return p.temperatures.data || p.inverse_temperature != 1; }

inline Row locate(const Plan& p, i64 r) {
  Row row = {p.x.data, p.y.data, p.factors.data, p.value.data, p.dx.data, p.dy.data, 1.0, p.inverse_temperature, nullptr,
             nullptr, nullptr, (double*)p.known.data};
  const char *weight = p.weights.data, *temperature = p.temperatures.data;
  for (int d = p.ndim - 1; d >= 0; d--) {
    i64 i = d > 0 ? r % p.shape[d] : r;
    r = d > 0 ? r / p.shape[d] : 0;
    row.x += i * p.x.batch[d];
    row.y += i * p.y.batch[d];
    row.factors += i * p.factors.batch[d];
    row.value += i * p.value.batch[d];
    row.dx += i * p.dx.batch[d];
    row.dy += i * p.dy.batch[d];
    weight += i * p.weights.batch[d];
    temperature += i * p.temperatures.batch[d];
    row.known += i * p.known.batch[d] / (i64)sizeof(double);
  }
  if (p.weights.data) read_numbers(p.weights.dtype, weight, 0, 1, &row.weight);
  row.weight *= p.factor;
  if (p.temperatures.data) {
    read_numbers(p.temperatures.dtype, temperature, 0, 1, &row.inverse_temperature);
    row.inverse_temperature = 1 / row.inverse_temperature;
  }
  return row;
}

// How one kind of row is computed: in `sweeps` passes over its chunks. A sweep turns each chunk into `states[s]` doubles
// (state[k * pitch], k = 0, 1, ...; none if it only writes). `fold` merges up to CHUNK of these states into one, level by
// level, and `finish` turns the last one (pitch 1; nullptr for a row without classes) into the row's stats, the value first.
// Gradients are written in the last sweep. Terms are written in the only sweep, or in the second, which may precede the last.
constexpr int MAX_STATES = 9;
struct Kernel {
  int sweeps;
  int states[4];
  void (*chunk)(const Plan&, const Row&, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                void* scratch);
  void (*fold)(const Plan&, const Row&, int sweep, const double* from, int count, i64 from_pitch, double* to, i64 to_pitch);
  void (*finish)(const Plan&, const Row&, int sweep, const double* state, double* stats);
  size_t kept;                    // bytes per chunk that a sweep may leave in row.kept for the last one; or 0
  int terms_sweep() const { return sweeps > 1 ? 1 : 0; }
};

// Computes rows [r, r + count) of at most COLUMNS classes together. Leaves their contributions to a total in `values`, and marks
// in `alone` the rows that it cannot handle: these must be computed one by one.
typedef void (*Few)(const Plan&, i64 r, int count, double* values, char* alone, void* scratch);

constexpr int SCRATCH = 56 * 1024;   // bytes that a chunk may use, 64-byte aligned

}  // namespace kl
