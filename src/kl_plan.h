// What one call asks of the CPU: filled in by kl_cpu.pyx, read by kl_rows.h (one row) and kl_batch.h (all rows).
#pragma once
#include <cstddef>
#include <cstdint>

namespace kl {

typedef std::int64_t i64;

constexpr int MAX_DIMS = 64;                          // NumPy's limit

struct Array {                // strides in bytes, of any sign; data == nullptr: absent
  char* data;
  i64 stride;                 // along the classes
  i64 batch[MAX_DIMS];        // along the batch axes
  int dtype;
};

struct Plan {
  int operation, space_x, space_y;   // kl::Operation, kl::Space
  int output;
  int wide;                          // compute in double
  int threads;
  int stream;                        // outputs are larger than the caches
  int ndim;                          // batch axes
  i64 shape[MAX_DIMS];
  i64 rows, n;
  double inverse_temperature, gradient_scale;
  double epsilon;                    // of the terms that take one
  Array x, y, weights;               // weights are float64 or float32
  Array factors;                     // one a class, float64 or float32, which multiplies term and gradients
  Array value, dx, dy;               // dx and dy: one gradient row for every batch row
  double total;                      // result of TOTAL
};

struct Row {                  // one row of the plan: where it lies, what it weighs
  const char *x, *y, *factors;
  char *value, *dx, *dy;
  double weight;
  const char *next_x, *next_y;   // the row after it, if it may be asked for ahead of time
  char* kept;                    // room for what a sweep leaves for a later one, 64-byte aligned; or nullptr
};

// How one kind of row is computed: in `sweeps` passes over its chunks. A sweep turns each chunk into `states[s]` doubles
// (state[k * pitch], k = 0, 1, ...; none if it only writes); `fold` makes one such state of up to CHUNK of them, level by
// level, and `finish` turns the last one (pitch 1; nullptr for a row without classes) into the row's stats, the value first.
// Gradients are written in the last sweep, terms in the second one, which may come before it, or in the only one.
constexpr int MAX_STATES = 9;
struct Kernel {
  int sweeps;
  int states[3];
  void (*chunk)(const Plan&, const Row&, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                void* scratch);
  void (*fold)(const Plan&, int sweep, const double* from, int count, i64 from_pitch, double* to, i64 to_pitch);
  void (*finish)(const Plan&, int sweep, const double* state, double* stats);
  // the totals of several rows of at most COLUMNS classes that lie one behind the other; or nullptr
  void (*flat)(const Plan&, const Row& first, int rows, double* totals, void* scratch);
  size_t kept;                    // bytes a chunk that the first sweep may leave for the last one in row.kept; or 0
  int terms_sweep() const { return sweeps > 1 ? 1 : 0; }
};

constexpr int SCRATCH = 56 * 1024;   // bytes that a chunk may use, 64-byte aligned

}  // namespace kl
