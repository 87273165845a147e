// All rows of a plan on the GPU: what kl_rows.h and kl_batch.h are for the CPU, with the same formulas (kl_math.h, kl_logits.h,
// kl_family.h, kl_renyi.h) in the same order of addition (kl_tree.h), and therefore with the same bits. klcore.backends.cuda
// fills in a plan and launches. Its nvrtc.py compiles this file after those headers, as one source, for one operation, pair of
// spaces and pair of dtypes, which are given as macros:
//   KL_OPERATION, KL_SPACE_X, KL_SPACE_Y, KL_X, KL_Y (dtypes), KL_OUTPUTS (1: dx, 2: dy, 4: terms), KL_WIDE (compute in
//   double), KL_TEMPERATURE (if it is not 1), KL_TEMPERATURES (if there is one per row), KL_FACTORS (if there are any), KL_FAST16
//   (both inputs have 16 bits: hardware exponentials and reciprocals, no low parts). These select the kernels: KL_UNITS,
//   KL_NARROW, KL_ROWS, KL_FOLD, KL_SUM, KL_SUMMED.
//
// A warp processes one chunk of 1024 classes at a time. It copies the chunk to shared memory by asynchronous 16-byte copies,
// computes from there, writes gradients over their inputs, and copies them out. If a single sweep suffices and the row is
// aligned, it computes straight from global memory. Lane l owns columns 4l .. 4l+3, so that the eight elements of a column are
// added in a register, and the 128 columns in a few shuffles. The numbers of warps, blocks and multiprocessors decide which
// warp does what, but never the order of addition. There are no atomics.
#pragma once

#if defined(KL_EMULATOR)
#define KL_ARCH (KL_EMULATOR_ARCH * 10)
#define KL_SHARED_MEMORY(name) char* name = emulator::shared_memory()
#else
#define KL_ARCH __CUDA_ARCH__
#define KL_SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
#endif
#define KL_DEVICE __device__ __forceinline__

namespace kl {

typedef long long i64;

// ---- what a call asks for: klcore/backends/cuda/plans.py reads the layout of a plan here --------------------------------------
constexpr int MAX_DIMS = 32;

struct Array {                // strides in bytes, of any sign; data == nullptr: absent
  char* data;
  i64 stride;                 // along the classes
  i64 batch[MAX_DIMS];        // along the batch axes
  i64 dtype;
};

struct Plan {
  i64 shape[MAX_DIMS];        // of the batch axes
  i64 ndim, rows, n, chunks;
  i64 output;                 // kl::Output; totals are left in `value`, one double per row
  i64 first, last;            // sweeps to run
  i64 columns;                // neighbouring rows, not classes, lie side by side in memory
  i64 dense;                  // rows of x, y, dx and dy are contiguous
  i64 slots;                  // chunks that a warp holds in shared memory
  i64 count, groups;          // kl_fold, kl_sum: elements per row, and the number of groups of 1024 of these
  i64 packed;                 // kl_fold replaces the state of a chunk by the slopes of its gradients
  i64 rows_on, chunks_on;     // kl_units: from one chunk of a warp to its next
  i64 inner;                  // kl_summed: rows that share one gradient row
  i64 any_weights;            // weights may be any numbers; if false, invalid ones make their rows NaN
  double inverse_temperature, gradient_scale, scale, parameter;
  double factor;              // of all values and gradients: multiplies the rows' weights
  const double* denominator;  // of a weighted mean, then a factor of its weights; known on the device only; or nullptr
  const double* cotangent;    // multiplies all gradients; on the device too
  double *states, *stats, *sums;   // working memory: see the kernels
  Array x, y, weights, temperatures, factors, value, dx, dy;   // factors: per class; like the two before, float64 or float32
};

// ---- the machine -----------------------------------------------------------------------------------------------------------
#if !defined(KL_EMULATOR)
template <int BYTES> struct Bytes;
template <> struct Bytes<16> { typedef uint4 Type; };
template <> struct Bytes<8> { typedef uint2 Type; };
template <> struct Bytes<4> { typedef unsigned Type; };
template <int BYTES> KL_DEVICE void copy_vector(void* to, const void* from) {
  typedef typename Bytes<BYTES>::Type V;
  *(V*)to = *(const V*)from;
}
#if KL_ARCH >= 800
// from global to shared memory; complete after wait_copies, for other lanes after a barrier as well
template <int BYTES> KL_DEVICE void copy_async(void* to, const void* from) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
}
KL_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif
KL_DEVICE void warps_barrier(int warps) {   // of the first `warps` warps of a block; the others go on
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"r"(32 * warps) : "memory");
}
#endif

constexpr unsigned ALL_LANES = ~0u;
constexpr int WARP = 32;
KL_DEVICE int lane_of() { return (int)(threadIdx.x % WARP); }
KL_DEVICE int warp_of() { return (int)(threadIdx.x / WARP); }
KL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }   // if one is NaN, the other one
KL_DEVICE double larger(double a, double b) { return fmax(a, b); }
KL_DEVICE i64 again(i64 v) {   // v, but opaque to the compiler: what depends on it is computed again, and
#if !defined(KL_EMULATOR)      // not kept in registers until then
  asm volatile("" : "+l"(v));
#endif
  return v;
}
KL_DEVICE int warps_of() { return (int)(blockDim.x / WARP); }

// ---- what is compiled ------------------------------------------------------------------------------------------------------
constexpr int OP = KL_OPERATION, SX = KL_SPACE_X, SY = KL_SPACE_Y, DX = KL_X, DY = KL_Y;
template <bool WIDE> struct Number { typedef float Type; };
template <> struct Number<true> { typedef double Type; };
typedef Number<KL_WIDE != 0>::Type T;
typedef Stored<DX>::Type X;
typedef Stored<DY>::Type Y;
constexpr bool HAS_Y = OPERATIONS[OP].arguments > 1;
constexpr Form FORM = OPERATIONS[OP].form;
constexpr bool OUT_DX = KL_OUTPUTS & 1, OUT_DY = KL_OUTPUTS & 2, OUT_TERMS = KL_OUTPUTS & 4;
#if defined(KL_FACTORS)
constexpr bool FACTORS = true;
#else
constexpr bool FACTORS = false;
#endif
// the cancellation-free form is for the divergence of two rows of logits; other logits are normalised first
constexpr bool OF_LOGITS = SX == LOGITS && SY == LOGITS && FORM == BY_RATIO && !FACTORS;
constexpr bool OF_CROSS = (SX == LOGITS || SY == LOGITS) && SX != COUNTS && SY != COUNTS && FORM == BY_COST && !FACTORS;
constexpr bool OF_MEMBERS = SX == LOGITS && SY == LOGITS && FORM == BY_CLASS && !FACTORS;
constexpr bool NORM_OF_X = !OF_LOGITS && !OF_CROSS && !OF_MEMBERS && is_unnormalised(SX);
constexpr bool NORM_OF_Y = !OF_LOGITS && !OF_CROSS && !OF_MEMBERS && HAS_Y && is_unnormalised(SY);
constexpr bool NORMALISED = NORM_OF_X || NORM_OF_Y;
constexpr bool IS_RENYI = OP == RENYI_DIV;
constexpr bool ONE_SWEEP = !OF_LOGITS && !OF_CROSS && !OF_MEMBERS && !NORMALISED && !IS_RENYI;
constexpr bool BESIDE = NORMALISED && !KL_WIDE;   // float32 logits beside another space: log-probabilities in pairs
constexpr int term_space(int space) { return space == LOGITS && !BESIDE ? LOG_PROBS : space == COUNTS ? PROBS : space; }
typedef Term<summed(OP), term_space(SX), term_space(HAS_Y ? SY : SX)> TheTerm;

enum { SUM_VALUE, SUM_DX, SUM_DY, SUM_STATES };   // of the second sweep over normalised rows
constexpr int TILT_STATES = tilt_states(OF_MEMBERS);
static_assert(MEMBER_STATES <= LOGITS_STATES && tilt_states(true) <= LOGITS_STATES);
constexpr int MAX_STATES = OF_LOGITS || OF_MEMBERS ? LOGITS_STATES : OF_CROSS ? CROSS_STATES : NORMALISED ? 2 * NORM_STATES : IS_RENYI ? NORM_STATES : 1;
// Blocks of THREADS per multiprocessor, which limits the registers of each thread. More warps are not always faster: what is
// swept several times gains from keeping its numbers in registers. (For compute capability 12.0 the compiler generates more code
// from the same source, which would spill.)
constexpr bool LIGHT = !EXACT<T>;   // uses the hardware's exponentials
constexpr int THREADS = 128;
constexpr int BLOCKS = KL_WIDE || BESIDE || OF_MEMBERS || (OF_LOGITS && KL_ARCH >= 1200) ? 2
                       : LIGHT && ONE_SWEEP && KL_OUTPUTS == 0             ? 8
                       : LIGHT && ONE_SWEEP && !OUT_TERMS                  ? SX == PROBS && SY == PROBS ? 6 : 4
                       : LIGHT && OF_LOGITS && KL_OUTPUTS == 0             ? 5
                       : OF_LOGITS || OF_CROSS || OUT_DX || OUT_DY         ? 4
                                                                           : 6;
constexpr bool ONCE = ONE_SWEEP || ((OF_LOGITS || OF_CROSS) && KL_OUTPUTS == 0);   // a single sweep suffices
constexpr int SUM_SWEEP = NORMALISED || OF_MEMBERS ? 1 : 0;          // finds the sum that the value follows from
constexpr int VALUE_SWEEP = IS_RENYI ? SUM_SWEEP + 1 : SUM_SWEEP;   // Rényi divergence has one more, for tilted rows

KL_DEVICE double gradient_scale(const Plan& p) {
  double scale = !p.denominator ? p.gradient_scale : *p.denominator != 0 ? 1.0 / *p.denominator : nan<double>();
  return p.cotangent ? scale * *p.cotangent : scale;
}

KL_DEVICE int states_of(int sweep) {
  if (IS_RENYI && sweep > SUM_SWEEP) return sweep == VALUE_SWEEP ? TILT_STATES : 0;
  if (OF_LOGITS) return sweep == 0 ? LOGITS_STATES : 0;
  if (OF_CROSS) return sweep == 0 ? CROSS_STATES : 0;
  if (OF_MEMBERS) return sweep == 0 ? LOGITS_STATES : sweep == 1 ? MEMBER_STATES : 0;
  if (NORMALISED) return sweep == 0 ? 2 * NORM_STATES : sweep == 1 ? (int)SUM_STATES : 0;
  return 1;
}

// The branch is outside the loop: the product in double is rare, and slow.
template <int E> KL_DEVICE void multiply(const T* v, const Scale<T>& scale, T (&products)[E]) {
  if (scale.far) {
#pragma unroll
    for (int e = 0; e < E; e++) products[e] = (T)((double)v[e] * scale.exact);
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) products[e] = v[e] * scale.near;
  }
}

// ---- how the lanes of a warp are used ---------------------------------------------------------------------------------------
//
// Wide: the warp processes one chunk of a row, 256 classes per step, eight of them per lane.
struct Wide {
  static constexpr int E = 8;
  int lane, n;
  KL_DEVICE explicit Wide(int classes) : lane(lane_of()), n(classes) {}
  KL_DEVICE bool leads() const { return lane == 0; }
  KL_DEVICE int steps() const { return (n + 255) / 256; }
  KL_DEVICE int index(int step, int e) const { return 256 * step + (e & 4) * 32 + 4 * lane + (e & 3); }
  KL_DEVICE bool partial(int step) const { return 256 * step + 256 > n; }   // some indices are no class: copies of class 0

  // a lane's numbers of one step, as stored in memory
  template <int D> struct __align__(sizeof(typename Stored<D>::Type) == 2 ? 8 : 16) Four { typename Stored<D>::Type v[4]; };
  template <int D> struct Eight { Four<D> half[2]; };
  template <int D> KL_DEVICE Eight<D> load(const typename Stored<D>::Type* slot, int step) const {
    return {*(const Four<D>*)(slot + index(step, 0)), *(const Four<D>*)(slot + index(step, 4))};
  }
  template <int D> KL_DEVICE void widen(const Eight<D>& from, T* v) const {
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = Stored<D>::template widen<T>(from.half[e / 4].v[e % 4]);
  }
  template <int D> KL_DEVICE void read(const typename Stored<D>::Type* slot, int step, T* v) const {
    widen<D>(load<D>(slot, step), v);
  }
  template <int D> KL_DEVICE void write(typename Stored<D>::Type* slot, int step, const T* v, const Scale<T>& scale) const {
    T products[E];
    multiply(v, scale, products);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Four<D> f;
#pragma unroll
      for (int k = 0; k < 4; k++) f.v[k] = Stored<D>::template narrow<T>(products[4 * half + k]);
      *(Four<D>*)(slot + index(step, 4 * half)) = f;
    }
  }
  template <typename U> KL_DEVICE U max(U m) const {
#pragma unroll
    for (int o = 16; o; o /= 2) {
      m = larger(__shfl_xor_sync(ALL_LANES, m, o), m);
    }
    return m;
  }
  KL_DEVICE bool any(bool b) const { return __any_sync(ALL_LANES, b); }
  KL_DEVICE bool every(bool b) const { return __all_sync(ALL_LANES, b); }

  // The order of kl_tree.h: a column's elements in U, the columns in double.
  template <int Q, typename U = T> struct Sums {
    U now[Q][4];
    KL_DEVICE Sums() {
#pragma unroll
      for (int q = 0; q < Q; q++)
#pragma unroll
        for (int k = 0; k < 4; k++) now[q][k] = U(0);
    }
    KL_DEVICE void add(int q, const U* v) {
#pragma unroll
      for (int k = 0; k < 4; k++) now[q][k] = (now[q][k] + v[k]) + v[k + 4];
    }
    KL_DEVICE void add_products(int q, const U* w, const U* v) {
#pragma unroll
      for (int k = 0; k < 4; k++) now[q][k] = fma(w[k + 4], v[k + 4], fma(w[k], v[k], now[q][k]));
    }
    KL_DEVICE void add_four(int q, const U* v) {   // half of a step
#pragma unroll
      for (int k = 0; k < 4; k++) now[q][k] += v[k];
    }
    KL_DEVICE void add_four_products(int q, const U* w, const U* v) {
#pragma unroll
      for (int k = 0; k < 4; k++) now[q][k] = fma(w[k], v[k], now[q][k]);
    }
  };
  // the sum over lane and lane ^ bit: of a in lanes with bit = 0, of b in the others
  KL_DEVICE double exchange(double a, double b, int bit) const {
    bool upper = lane & bit;
    return (upper ? b : a) + __shfl_xor_sync(ALL_LANES, upper ? a : b, bit);
  }
  template <int Q, typename U> KL_DEVICE double total(const Sums<Q, U>& s, int q) const {
    double v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = (double)s.now[q][k];
    double a = exchange(v[0], v[2], 16), b = exchange(v[1], v[3], 16);   // + 64; bit 16 now separates columns 2 apart,
    a = exchange(a, b, 8);                                               // + 32; and bit 8 columns 1 apart
#pragma unroll
    for (int o = 4; o; o /= 2) a += __shfl_xor_sync(ALL_LANES, a, o);    // + 16, + 8, + 4
    a += __shfl_xor_sync(ALL_LANES, a, 16);
    a += __shfl_xor_sync(ALL_LANES, a, 8);
    return a + 0.0;
  }
};

// Full: Wide for a complete chunk, which needs no check for missing classes.
struct Full : Wide {
  KL_DEVICE Full() : Wide(CHUNK) {}
  KL_DEVICE bool partial(int) const { return false; }
};

// Narrow: rows of at most 128 classes, several at a time. `lanes` lanes (a power of two) share a row; lane l has its columns
// l, l + lanes, l + 2 lanes and l + 3 lanes.
struct Narrow {
  static constexpr int E = 4;
  int lane, lanes, n;
  KL_DEVICE Narrow(int classes, int lanes_a_row) : lane(lane_of() % lanes_a_row), lanes(lanes_a_row), n(classes) {}
  KL_DEVICE bool leads() const { return lane == 0 && n > 0; }
  KL_DEVICE int steps() const { return 1; }
  KL_DEVICE int index(int, int e) const { return lane + lanes * e; }
  KL_DEVICE bool partial(int) const { return true; }   // after the last class there is a copy of the lane's first

  template <int D> KL_DEVICE void read(const typename Stored<D>::Type* slot, int, T* v) const {
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = Stored<D>::template widen<T>(slot[index(0, e) < n ? index(0, e) : lane]);
  }
  template <int D> KL_DEVICE void write(typename Stored<D>::Type* slot, int, const T* v, const Scale<T>& scale) const {
    T products[E];
    multiply(v, scale, products);
#pragma unroll
    for (int e = 0; e < E; e++)
      if (index(0, e) < n) slot[index(0, e)] = Stored<D>::template narrow<T>(products[e]);
  }
  template <typename U> KL_DEVICE U max(U m) const {
    for (int o = lanes / 2; o; o /= 2) {
      m = larger(__shfl_xor_sync(ALL_LANES, m, o), m);
    }
    return m;
  }
  // only the lanes of this row: no row affects another
  KL_DEVICE unsigned neighbours() const { return (lanes == WARP ? ALL_LANES : (1u << lanes) - 1u) << (lane_of() - lane); }
  KL_DEVICE bool any(bool b) const { return __ballot_sync(ALL_LANES, b) & neighbours(); }
  KL_DEVICE bool every(bool b) const { return !any(!b); }
  template <int Q, typename U = T> struct Sums {
    U v[Q][4];
    KL_DEVICE void add(int q, const U* t) {
#pragma unroll
      for (int k = 0; k < 4; k++) v[q][k] = t[k];
    }
    KL_DEVICE void add_products(int q, const U* w, const U* t) {
#pragma unroll
      for (int k = 0; k < 4; k++) v[q][k] = w[k] * t[k];
    }
    KL_DEVICE void add_four(int q, const U* t) { add(q, t); }
    KL_DEVICE void add_four_products(int q, const U* w, const U* t) { add_products(q, w, t); }
  };
  template <int Q, typename U> KL_DEVICE double total(const Sums<Q, U>& s, int q) const {
    double a = ((double)s.v[q][0] + (double)s.v[q][2]) + ((double)s.v[q][1] + (double)s.v[q][3]);
    for (int o = lanes / 2; o; o /= 2) a += __shfl_xor_sync(ALL_LANES, a, o);
    return a + 0.0;
  }
};

template <class L, typename U> KL_DEVICE void mask(const L& at, int step, U* v) {   // 0 beyond the last class
  if (!at.partial(step)) return;
#pragma unroll
  for (int e = 0; e < L::E; e++) v[e] = at.index(step, e) < at.n ? v[e] : U(0);
}

// ---- one chunk -------------------------------------------------------------------------------------------------------------

// The largest of a lane's numbers of dtype D. 16-bit numbers are compared two at a time if the GPU can. (The emulator cannot.)
template <int D> struct Largest {
#if KL_ARCH >= 800 && !defined(KL_EMULATOR)
  static constexpr bool BY_TWO = sizeof(typename Stored<D>::Type) == 2;
#else
  static constexpr bool BY_TWO = false;
#endif
  T m = -infinity<T>();
  unsigned two = D == BFLOAT16 ? 0xff80ff80u : 0xfc00fc00u;   // -infinity
  template <class L> KL_DEVICE void take(const L& at, const typename Stored<D>::Type* slot, int step) {
    if constexpr (BY_TWO && L::E == Wide::E) {
      struct __align__(8) Four { unsigned two[2]; };
#pragma unroll
      for (int e = 0; e < L::E; e += 4) {
        Four f = *(const Four*)(slot + at.index(step, e));
#pragma unroll
        for (int k = 0; k < 2; k++) {
          if constexpr (D == BFLOAT16) asm("max.bf16x2 %0, %0, %1;" : "+r"(two) : "r"(f.two[k]));
          else asm("max.f16x2 %0, %0, %1;" : "+r"(two) : "r"(f.two[k]));
        }
      }
    } else {
      T v[L::E];
      at.template read<D>(slot, step, v);
#pragma unroll
      for (int e = 0; e < L::E; e++) m = larger(v[e], m);
    }
  }
  KL_DEVICE T found() const {
    if constexpr (!BY_TWO) return m;
    else return larger(larger(half_of(two), half_of(two >> 16)), m);
  }
  KL_DEVICE static T half_of(unsigned v) { return Stored<D>::template widen<T>((unsigned short)v); }
};

struct Slot {                 // a chunk in shared memory
  X* x;
  Y* y;
  T* extra;                   // softmax weights, or terms to be written
  const char* factors;        // still in global memory
};

KL_DEVICE T x_of(const Slot& s, int i) { return Stored<DX>::template widen<T>(s.x[i]); }
KL_DEVICE T y_of(const Slot& s, int i) {   // the entropy is the cross-entropy of x with itself
  if constexpr (HAS_Y) return Stored<DY>::template widen<T>(s.y[i]);
  else return x_of(s, i);
}
constexpr int CROSS_Y = HAS_Y ? SY : SX;

struct Want {                 // what a sweep should write, and the factors of it
  bool term, dx, dy;
  Scale<T> of_term, of_gradient;
  double weight;              // the row's
};

// Gradients overwrite their inputs, or are written straight to their own place;
struct InPlace {
  Slot s;
  template <class L> KL_DEVICE void dx(const L& at, int step, const T* v, const Scale<T>& scale) const {
    at.template write<DX>(s.x, step, v, scale);
  }
  template <class L> KL_DEVICE void dy(const L& at, int step, const T* v, const Scale<T>& scale) const {
    at.template write<DY>(s.y, step, v, scale);
  }
  KL_DEVICE void dx(int i, T v) const { s.x[i] = Stored<DX>::narrow(v); }
  KL_DEVICE void dy(int i, T v) const { s.y[i] = Stored<DY>::narrow(v); }
};
// or they are added to those of other rows.
struct Added {
  double* sums;
  template <class L> KL_DEVICE void dx(const L& at, int step, const T* v, const Scale<T>& scale) const {
    T products[L::E];
    multiply(v, scale, products);
#pragma unroll
    for (int e = 0; e < L::E; e++)
      if (at.index(step, e) < at.n) sums[at.index(step, e)] += (double)products[e];
  }
  template <class L> KL_DEVICE void dy(const L& at, int step, const T* v, const Scale<T>& scale) const {
    dx(at, step, v, scale);
  }
  KL_DEVICE void dx(int i, T v) const { sums[i] += (double)v; }
  KL_DEVICE void dy(int i, T v) const { sums[i] += (double)v; }
};

template <class L> KL_DEVICE void multiply(const Plan& p, const L& at, int step, const Slot& s, T* v) {
  if constexpr (FACTORS) {
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      if (at.index(step, e) >= at.n) continue;
      const char* at_e = s.factors + at.index(step, e) * p.factors.stride;
      T f = p.factors.dtype == FLOAT32 ? (T)*(const float*)at_e : (T)*(const double*)at_e;
      v[e] = f == 0 ? T(0) : v[e] * f;   // 0 times infinity is 0 here
    }
  }
}

template <bool ALL, class L, class Sink>
KL_DEVICE void terms(const Plan& p, const L& at, int step, const T* x, const T* y, const Slot& s, const Want& want,
                     const Sink& sink, T* v) {
#pragma unroll
  for (int e = 0; e < L::E; e++) v[e] = value_of<TheTerm, ALL>(x[e], y[e], p.parameter);
  multiply(p, at, step, s, v);
  if (want.dx) {
    T d[L::E];
#pragma unroll
    for (int e = 0; e < L::E; e++) d[e] = dx_of<TheTerm, ALL>(x[e], y[e], p.parameter);
    multiply(p, at, step, s, d);
    sink.dx(at, step, d, want.of_gradient);
  }
  if (want.dy) {
    T d[L::E];
#pragma unroll
    for (int e = 0; e < L::E; e++) d[e] = dy_of<TheTerm, ALL>(x[e], y[e], p.parameter);
    multiply(p, at, step, s, d);
    sink.dy(at, step, d, want.of_gradient);
  }
}

// probabilities and log-probabilities: everything in one sweep
template <class L, class Sums, class Sink>
KL_DEVICE void terms_step(const Plan& p, const L& at, int step, const T* x, const T* y, const Slot& s, const Want& want,
                          const Sink& sink, Sums& sums) {
  T v[L::E];
  bool ordinary = TheTerm::has_ordinary;
#pragma unroll
  for (int e = 0; e < L::E; e++)
    if constexpr (TheTerm::has_ordinary) ordinary &= TheTerm::ordinary(x[e], y[e]);
  if (TheTerm::has_ordinary && at.every(ordinary)) terms<false>(p, at, step, x, y, s, want, sink, v);
  else terms<true>(p, at, step, x, y, s, want, sink, v);
  if (want.term) at.template write<code_of<T>()>(s.extra, step, v, want.of_term);
  mask(at, step, v);
  sums.add(0, v);
}
// returns the sum
template <class L, class Sink>
KL_DEVICE double terms_chunk(const Plan& p, const L& at, const Slot& s, const Want& want, const Sink& sink) {
  typename L::template Sums<1> sums;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E], y[L::E];
    at.template read<DX>(s.x, step, x);
    if constexpr (HAS_Y) at.template read<DY>(s.y, step, y);
    terms_step(p, at, step, x, HAS_Y ? y : x, s, want, sink, sums);
  }
  return at.total(sums, 0);
}
// The same for a full chunk straight from global memory, with the next step's numbers loaded in advance;
template <class Sink> KL_DEVICE double terms_ahead(const Plan& p, const Slot& s, const Want& want, const Sink& sink) {
  Full at;
  constexpr int STEPS = CHUNK / 256;
  Full::Sums<1> sums;
  Full::Eight<DX> next_x = at.load<DX>(s.x, 0);
  Full::Eight<DY> next_y = {};
  if constexpr (HAS_Y) next_y = at.load<DY>(s.y, 0);
#pragma unroll 1
  for (int pair = 0; pair < STEPS; pair += 2)
#pragma unroll
    for (int step = pair; step < pair + 2; step++) {
      T x[Full::E], y[Full::E];
      at.widen<DX>(next_x, x);
      if constexpr (HAS_Y) at.widen<DY>(next_y, y);
      if (step + 1 < STEPS) {
        next_x = at.load<DX>(s.x, step + 1);
        if constexpr (HAS_Y) next_y = at.load<DY>(s.y, step + 1);
      }
      terms_step(p, at, step, x, HAS_Y ? y : x, s, want, sink, sums);
    }
  return at.total(sums, 0);
}
// where there are registers for that. Doubles need two per number, values of other operations spilled, and for two 16-bit inputs
// more warps are faster.
template <class Sink> KL_DEVICE double terms_direct(const Plan& p, const Slot& s, const Want& want, const Sink& sink) {
  if constexpr (!ONE_SWEEP) return 0.0;   // never called
  else if constexpr (EXACT<T> && sizeof(T) == sizeof(float) && (OUT_DX || OUT_DY || OP == KL_DIV))
    return terms_ahead(p, s, want, sink);
  else return terms_chunk(p, Full(), s, want, sink);
}

// A chunk of two rows of logits, with classes excluded or far apart, in double. Two sums at a time, which are kept in the state,
// and loops that are not unrolled: this rare case must not cost the common one registers. `mine`: whether this lane writes the
// state.
template <class L> KL_DEVICE void far_chunk(const L& at, const Slot& s, double it, bool mine, double* state) {
  enum { Q, NEAR, NEAR_X, MASS, WEIGHTS, X_TIMES_Z, ALL };
  double max_a = -infinity<double>(), max_b = max_a, top_a = 0, top_b = 0;
  bool impossible = false;
  Anchor<double> from = {};
#pragma unroll 1
  for (int pass = 0; pass < 6; pass++) {
    typename L::template Sums<2, double> sums;
#pragma unroll 1
    for (int part = 0; part < at.steps() * (L::E / 4); part++) {   // four classes at a time
      double u[4], v[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int i = at.index(part * 4 / L::E, part * 4 % L::E + k);
        bool real = i < at.n;
        double a = real ? (double)x_of(s, i) : -infinity<double>();
        double b = real ? (double)y_of(s, i) : -infinity<double>();
        u[k] = v[k] = 0.0;
        if (pass == 0) {
          max_a = larger(a, max_a);
          max_b = larger(b, max_b);
        } else if (pass < 3) {
          Shared r = shared(a, b, top_a, top_b, it);
          impossible |= real & r.impossible;
          if (real) u[k] = r.weight;
          if (real) v[k] = pass == 1 ? r.e : r.c;
        } else {
          double of_y = softmax_weight((b - top_b) * it);
          Apart r = apart(a, b, softmax_weight((a - top_a) * it), of_y, from, it);
          if (real) u[k] = pass == 3 ? of_y : pass == 4 ? r.near_x : r.weight;
          if (real) v[k] = pass == 3 ? r.near : pass == 4 ? r.mass : r.x;
        }
      }
      sums.add_four(0, u);
      sums.add_four(1, v);
    }
    if (pass == 0) {
      max_a = at.max(max_a);
      max_b = at.max(max_b);
      top_a = top_of(max_a);
      top_b = top_of(max_b);
      continue;
    }
    double one = at.total(sums, 0), other = at.total(sums, 1);
    if (pass == 1 && mine) state[ALL] = other;
    if (pass == 2) from = far_anchor(top_a, top_b, one, other);
    if (pass > 2 && mine) {
      state[2 * (pass - 3)] = one;
      state[2 * (pass - 3) + 1] = other;
    }
  }
  impossible = at.any(impossible);
  if (mine)
    *(Spread*)state = far_state(max_a, max_b, from, it, state[ALL], state[Q], state[NEAR], state[NEAR_X], state[MASS],
                                state[WEIGHTS], state[X_TIMES_Z], impossible);
}

// What the writing sweep needs most may stay in the slot: weights in place of x, e^z - 1 (for dx: z) in place of y. If the inputs
// are narrower, or both gradients are wanted, it is computed again.
constexpr bool KEEPS = OF_LOGITS && OUT_DX != OUT_DY && !OUT_TERMS && sizeof(X) == sizeof(T) && sizeof(Y) == sizeof(T);
#if defined(KL_TEMPERATURE) || defined(KL_TEMPERATURES)
constexpr bool TEMPERED = true;
#else
constexpr bool TEMPERED = false;
#endif

enum { AT_MAX_A, AT_S, AT_M, AT_M_LOW, AT_X, AT_G, AT_MAX_B, AT_Q, AT_KIND };   // in a state
// In float, a near state has only the sum of the anchor's two numbers. The two are packed where a far state has Q.
template <typename U> KL_DEVICE double both_numbers(const Anchor<U>& at) {
  return real((unsigned long long)bits((float)at.m) << 32 | bits((float)at.low));
}
template <typename U> KL_DEVICE void take_numbers(double both, Anchor<U>& at) {
  at.m = real((unsigned)(bits(both) >> 32));
  at.low = real((unsigned)bits(both));
}

// returns this lane's largest a
template <class L> KL_DEVICE T maxima(const L& at, const Slot& s, T& max_a, T& max_b) {
  Largest<DX> a;
  Largest<DY> b;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    a.take(at, s.x, step);
    b.take(at, s.y, step);
  }
  max_a = at.max(a.found());
  max_b = at.max(b.found());
  return a.found();
}
// A class with the largest a, from the first lane that has one (that is the first lane for class 0, of which padding is a copy).
// All lanes search that lane's 32 classes together;
KL_DEVICE int top_class(const Wide& at, const Slot& s, T mine, T top) {
  Wide theirs = at;
  theirs.lane = __ffs((int)__ballot_sync(ALL_LANES, mine == top)) - 1;
  int i = theirs.index(lane_of() / Wide::E, lane_of() % Wide::E);
  unsigned found = __ballot_sync(ALL_LANES, theirs.lane >= 0 && i < at.n && x_of(s, i) == top);
  return found ? __shfl_sync(ALL_LANES, i, __ffs((int)found) - 1) : 0;   // the same for all lanes
}
// or each lane searches its own.
KL_DEVICE int top_class(const Narrow& at, const Slot& s, T, T top) {
  int mine = at.n;
#pragma unroll
  for (int e = Narrow::E - 1; e >= 0; e--) {
    int i = at.index(0, e);
    if (i < at.n && x_of(s, i) == top) mine = i;
  }
  unsigned found = __ballot_sync(ALL_LANES, mine < at.n) & at.neighbours();
  int i = __shfl_sync(ALL_LANES, mine, found ? __ffs((int)found) - 1 : lane_of());
  return found ? i : 0;
}

// A chunk's anchor and its weights, which are kept in `extra` if there is room
template <class L> KL_DEVICE Anchor<T> weigh(const L& at, const Slot& s, const Inverse<T>& it, bool room, double& weights,
                                             bool& far) {
  T max_a, max_b;
  maxima(at, s, max_a, max_b);
  typename L::template Sums<2> means;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T a[L::E], b[L::E], w[L::E];
    at.template read<DX>(s.x, step, a);
    at.template read<DY>(s.y, step, b);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      w[e] = weight<TEMPERED>(a[e], max_a, it);
      b[e] = below_tops(a[e], b[e], max_a, max_b);
    }
    mask(at, step, w);
    if (room) at.template write<code_of<T>()>(s.extra, step, w, T(1));
    means.add(0, w);
    means.add_products(1, w, b);
  }
  weights = at.total(means, 0);
  double mean = at.total(means, 1) / weights;
  Anchor<T> from = anchor(max_a, max_b, mean);
  far = !usable((double)from.mean);
  return from;
}

// For two 16-bit inputs, whose bits need not match another backend's, one sweep follows the one for the maxima, about the c of the
// most probable class. If that c is too far from the mean, or from where y's mass is, another sweep follows, about the mean.
template <class L> KL_DEVICE void spread_once(const L& at, const Slot& s, double inverse_temperature, double* state) {
  Inverse<T> it = inverse<T>(inverse_temperature);
  Anchor<T> from = {};
  T mine = maxima(at, s, from.max_a, from.max_b);
  from.mean = y_of(s, top_class(at, s, mine, from.max_a)) - from.max_b;
  double weights, x, g;
  bool far;
#pragma unroll 1
  for (int means = 0; means < 2; means++) {   // first about that c, then about the mean
    typename L::template Sums<3> sums;
    far = false;
#pragma unroll 1
    for (int step = 0; step < at.steps(); step++) {
      T a[L::E], b[L::E], w[L::E];
      at.template read<DX>(s.x, step, a);
      at.template read<DY>(s.y, step, b);
#pragma unroll
      for (int e = 0; e < L::E; e++) w[e] = weight<TEMPERED>(a[e], from.max_a, it);
      mask(at, step, w);
      sums.add(0, w);
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        a[e] = centred<TEMPERED>(a[e], b[e], from, it).value;
        far |= above_range(a[e]);
        b[e] = spread_of<TEMPERED>(Pair<T>{a[e], T(0)});
      }
      sums.add_products(1, w, a);
      sums.add_products(2, w, b);
    }
    weights = at.total(sums, 0), x = at.total(sums, 1), g = at.total(sums, 2);
    // y may exclude a class (-infinity), or have almost no mass where the weights are: the sum of e^z is then lost
    bool lost = !(g <= 64 * ((weights + x) + g));
    far = at.any((far || !(absolute((T)x) < infinity<T>()) || (means == 1 && lost)) && at.n > 0);
    bool more = means == 0 && !far && at.n > 0 && (lost || cancels((T)weights, (T)x, (T)g));
    if (!__any_sync(ALL_LANES, more)) break;
    if (more) from.mean += (T)(x / (weights * inverse_temperature));
  }
  if (at.leads()) *(Spread*)state = near_state(from, weights, x, g);
  if (__any_sync(ALL_LANES, far)) far_chunk(at, s, inverse_temperature, far && at.leads(), state);
}

// `restage` copies the chunk to the slot once more, if something was kept there that turns out to be useless.
template <class L, class Restage>
KL_DEVICE void spread_chunk(const L& at, const Slot& s, double inverse_temperature, bool keep, const Restage& restage,
                            double* state) {
  if constexpr (!EXACT<T>) return spread_once(at, s, inverse_temperature, state);
  Inverse<T> it = inverse<T>(inverse_temperature);
  bool far;
  double weights;
  Anchor<T> from = weigh(at, s, it, true, weights, far);
  typename L::template Sums<2> sums;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T a[L::E], b[L::E], w[L::E], z[L::E], g[L::E];
    at.template read<DX>(s.x, step, a);
    at.template read<DY>(s.y, step, b);
    at.template read<code_of<T>()>(s.extra, step, w);
    mask(at, step, w);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      Pair<T> any = centred<TEMPERED>(a[e], b[e], from, it), r = counted(any, w[e]);
      far |= above_range(any.value) | below_range(r.value);
      z[e] = r.value;
      g[e] = spread_of<TEMPERED>(r);
    }
    sums.add_products(0, w, z);
    sums.add_products(1, w, g);
    bool in_place = KEEPS && keep;
    if constexpr (L::E == Narrow::E)   // the whole row is known here: if it is far, it stays in the slot
      in_place = in_place && !at.any(far);
    if (in_place) {
#pragma unroll
      for (int e = 0; e < L::E; e++) g[e] = g[e] + z[e];
      at.template write<code_of<T>()>((T*)s.x, step, w, T(1));
      at.template write<code_of<T>()>((T*)s.y, step, OUT_DY ? g : z, T(1));
    }
  }
  double x = at.total(sums, 0), g = at.total(sums, 1);
  far = at.any(far && at.n > 0);
  __syncwarp();   // the state may overlap the weights
  if (at.leads()) {
    *(Spread*)state = near_state(from, weights, x, g);
    if constexpr (PAIRED<T>) state[AT_Q] = both_numbers(from);
  }
  if (!__any_sync(ALL_LANES, far)) return;
  if (KEEPS && keep) restage();
  far_chunk(at, s, inverse_temperature, far && at.leads(), state);
}

// In double, the state has only the sum of the anchor's two numbers, so the anchor is computed again. All lanes take part.
template <class L> KL_DEVICE Anchor<T> anchor_again(const L& at, const Slot& s, const Inverse<T>& it) {
  double weights;
  bool far;
  return weigh(at, s, it, false, weights, far);
}

// What a chunk's outputs depend on: the row's stats, and the chunk's state. packed: the state already holds the slopes, in place
// of numbers that are no longer needed.
struct Local {
  const double *stats, *state;
  int pitch;
  bool packed;
  double it;                  // the row's inverse temperature
  KL_DEVICE double get(int k) const { return state[(i64)k * pitch]; }
};
// x, g, s and one number of M, which the outputs of a near chunk do not need. AT_M is kept if the anchor follows from it.
constexpr int PACKED[4] = {AT_S, AT_X, AT_G, EXACT<T> ? AT_M : AT_M_LOW};
KL_DEVICE Slopes<T> slopes_of(const Local& l) {
  if (!l.packed) return slopes<T>(l.get(AT_MAX_A), l.get(AT_MAX_B), {l.get(AT_M), l.get(AT_M_LOW)}, l.stats, l.it);
  Slopes<T> s = {};
  if constexpr (OUT_TERMS) s.p = (T)l.get(PACKED[0]), s.t = (T)l.get(PACKED[1]), s.t_low = (T)l.get(PACKED[2]);
  if constexpr (OUT_DY) s.a = (T)l.get(PACKED[0]), s.b = (T)l.get(PACKED[1]);
  if constexpr (OUT_DX) s.c = (T)l.get(PACKED[2]), s.d = (T)l.get(PACKED[3]);
  return s;
}
constexpr bool PACKS = OF_LOGITS && (OUT_TERMS ? !OUT_DX && !OUT_DY : OUT_DX || OUT_DY);
KL_DEVICE void pack(const double* stats, double* state, int pitch, double it) {   // by one lane
  Local l = {stats, state, pitch, false, it};
  if (is_far(l.get(AT_KIND))) return;
  Slopes<T> s = slopes_of(l);
  if constexpr (OUT_TERMS) {
    state[PACKED[0] * pitch] = s.p;
    state[PACKED[1] * pitch] = s.t;
    state[PACKED[2] * pitch] = s.t_low;
  }
  if constexpr (OUT_DY) {
    state[PACKED[0] * pitch] = s.a;
    state[PACKED[1] * pitch] = s.b;
  }
  if constexpr (OUT_DX) {
    state[PACKED[2] * pitch] = s.c;
    state[PACKED[3] * pitch] = s.d;
  }
}
// one class, by far_class
template <class L, class Sink>
KL_DEVICE void far_output(const L& at, const Slot& s, int i, const FarRow& row, const Want& want, const Sink& sink) {
  constexpr int TERM = OP == REL_ENTR ? LITERAL : DEVIANCE;
  Outputs o = far_class<TERM>((double)x_of(s, i), (double)y_of(s, i), row);
  if (want.term) s.extra[i] = (T)o.term * want.of_term;
  if (OUT_DX) sink.dx(i, (T)o.dx * want.of_gradient);
  if (OUT_DY) sink.dy(i, (T)o.dy * want.of_gradient);
}

// `kept`: the slot holds what spread_chunk left there
template <class L, class Sink>
KL_DEVICE void spread_outputs(const L& at, const Slot& s, const Local& local, bool kept, const Want& want, const Sink& sink) {
  Inverse<T> it = inverse<T>(local.it);
  Anchor<T> from = {(T)local.get(AT_MAX_A), (T)local.get(AT_MAX_B), T(0), T(0), (T)local.get(AT_M)};
  if constexpr (PAIRED<T>) take_numbers(local.get(AT_Q), from);
  else if constexpr (EXACT<T>) from = anchor_again(at, s, it);
  if (at.n > 0 && is_far(local.get(AT_KIND))) {
    FarRow row = far_row(local.stats, local.it);
#pragma unroll 1
    for (int step = 0; step < at.steps(); step++)
#pragma unroll 1
      for (int e = 0; e < L::E; e++)
        if (at.index(step, e) < at.n) far_output(at, s, at.index(step, e), row, want, sink);
    return;
  }
  Slopes<T> k = slopes_of(local);
  constexpr int TERM = OP == REL_ENTR ? LITERAL : DEVIANCE;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T a[L::E], b[L::E], w[L::E], v[L::E];
    at.template read<DX>(s.x, step, a);
    at.template read<DY>(s.y, step, b);
    if (KEEPS && kept) {
#pragma unroll
      for (int e = 0; e < L::E; e++) v[e] = OUT_DY ? a[e] * fma(b[e], k.a, k.b) : a[e] * fma(b[e], k.c, k.d);
      if (OUT_DY) sink.dy(at, step, v, want.of_gradient);
      else sink.dx(at, step, v, want.of_gradient);
      continue;
    }
#pragma unroll
    for (int e = 0; e < L::E; e++) w[e] = weight<TEMPERED>(a[e], from.max_a, it);
    if (want.term) {
      bool others = false;
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        bool good;
        v[e] = near_term<TERM, TEMPERED>(a[e], b[e], w[e], from, k, it, good);
        others |= !good;
      }
      at.template write<code_of<T>()>(s.extra, step, v, want.of_term);
      if (others) {
        FarRow row = far_row(local.stats, local.it);
#pragma unroll 1
        for (int e = 0; e < L::E; e++) {
          int i = at.index(step, e);
          if (i >= at.n) continue;
          T x = x_of(s, i), y = y_of(s, i);
          bool good;
          near_term<TERM, TEMPERED>(x, y, weight<TEMPERED>(x, from.max_a, it), from, k, it, good);
          if (!good) s.extra[i] = (T)far_class<TERM>((double)x, (double)y, row).term * want.of_term;
        }
      }
    }
    if constexpr (OUT_DX || OUT_DY) {
      T z[L::E];
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        Pair<T> r = centred<TEMPERED>(a[e], b[e], from, it);
        if (EXACT<T> || OUT_DX) r = counted(r, w[e]);
        z[e] = r.value;
        if (OUT_DY) v[e] = w[e] * fma(expm1_of<TEMPERED>(r), k.a, k.b);
      }
      if (OUT_DY) sink.dy(at, step, v, want.of_gradient);
#pragma unroll
      for (int e = 0; e < L::E; e++) v[e] = w[e] * fma(z[e], k.c, k.d);
      if (OUT_DX) sink.dx(at, step, v, want.of_gradient);
    }
  }
}

// cross-entropy and entropy with logits: sweep 0 the state, sweep 1 the outputs
template <class L> KL_DEVICE bool cross_sums(const L& at, const Slot& s, T zero_a, T max_b, T zero_b, const Inverse<T>& it,
                                             Cross& k) {
  typename L::template Sums<4> sums;
  bool large = false;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E], y[L::E], w[L::E], c[L::E];
    at.template read<DX>(s.x, step, x);
    if constexpr (HAS_Y) at.template read<DY>(s.y, step, y);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      if constexpr (!HAS_Y) y[e] = x[e];
      w[e] = cross_weight<SX, TEMPERED>(x[e], zero_a, it);
    }
    mask(at, step, w);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      T any = cost_of<CROSS_Y>(y[e], zero_b, it.value);
      large |= wants_look<SX>(x[e], any);
      c[e] = counted_cost(w[e], any);
    }
    sums.add(0, w);
    sums.add_products(1, w, c);
    if constexpr (CROSS_Y == LOGITS) {
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        T v = HAS_Y ? cross_weight<CROSS_Y, TEMPERED>(y[e], zero_b, it) : w[e];
        w[e] = y[e] == max_b ? T(0) : v;
        c[e] = y[e] == max_b ? T(1) : T(0);
      }
      mask(at, step, w);
      mask(at, step, c);
      sums.add(2, w);
      sums.add(3, c);
    }
  }
  k.s = at.total(sums, 0);
  k.cost = at.total(sums, 1);
  if (CROSS_Y == LOGITS) k.rest = at.total(sums, 2);
  if (CROSS_Y == LOGITS) k.count = at.total(sums, 3);
  return large;
}
// The same in double, for rare chunks: four classes and two sums at a time, so that the common case keeps its registers.
template <class L> KL_DEVICE void cross_sums_in_double(const L& at, const Slot& s, double zero_a, double max_b, double zero_b,
                                                       double temperature, Cross& k) {
  const Inverse<double> it = inverse<double>(temperature);
#pragma unroll 1
  for (int pass = 0; pass < (CROSS_Y == LOGITS ? 2 : 1); pass++) {
    typename L::template Sums<2, double> sums;
#pragma unroll 1
    for (int part = 0; part < at.steps() * (L::E / 4); part++) {
      double w[4], c[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int i = at.index(part * 4 / L::E, part * 4 % L::E + e);
        w[e] = c[e] = 0.0;
        if (i >= at.n) continue;
        double y = (double)y_of(s, i);
        if (pass == 0) {
          w[e] = cross_weight<SX, true>((double)x_of(s, i), zero_a, it);
          c[e] = counted_cost(w[e], cost_of<CROSS_Y>(y, zero_b, it.value));
        } else {
          w[e] = y == max_b ? 0.0 : cross_weight<LOGITS, true>(y, zero_b, it);
        }
      }
      sums.add_four(0, w);
      sums.add_four_products(1, w, c);
    }
    double one = at.total(sums, 0), other = at.total(sums, 1);
    if (pass == 0) k.s = one, k.cost = other;
    else k.rest = one;
  }
}
// The reason for large costs: impossible classes, or a chunk that needs double
template <class L> KL_DEVICE void look_closer(const L& at, const Slot& s, T zero_a, T max_b, T zero_b, const Inverse<T>& it,
                                              double temperature, Cross& k) {
  bool impossible = false, in_double = false;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++)
#pragma unroll 1
    for (int e = 0; e < L::E; e++) {
      int i = at.index(step, e);
      if (i >= at.n) continue;
      impossible |= cannot_be<SX, CROSS_Y>(x_of(s, i), y_of(s, i));
      in_double |= costs_double<SX, CROSS_Y>(x_of(s, i), y_of(s, i), zero_a, zero_b, it.value, false);
    }
  k.kind = kind_of(false, at.any(impossible));
  in_double = at.any(in_double);
  if (sizeof(T) == sizeof(double) || !__any_sync(ALL_LANES, in_double)) return;
  Cross exact = k;
  cross_sums_in_double(at, s, (double)zero_a, (double)max_b, (double)zero_b, temperature, exact);
  if (in_double) k = exact;
}
template <class L> KL_DEVICE void cross_state(const L& at, const Slot& s, double temperature, double* state) {
  T max_a = SX == LOGITS ? -infinity<T>() : T(0), max_b = CROSS_Y == LOGITS ? -infinity<T>() : T(0);
  if constexpr (SX == LOGITS || CROSS_Y == LOGITS) {
#pragma unroll 1
    for (int step = 0; step < at.steps(); step++) {
      T v[L::E];
      if constexpr (SX == LOGITS) {
        at.template read<DX>(s.x, step, v);
#pragma unroll
        for (int e = 0; e < L::E; e++) max_a = larger(v[e], max_a);
      }
      if constexpr (HAS_Y && SY == LOGITS) {
        at.template read<DY>(s.y, step, v);
#pragma unroll
        for (int e = 0; e < L::E; e++) max_b = larger(v[e], max_b);
      }
    }
  }
  if (SX == LOGITS) max_a = at.max(max_a);
  if (CROSS_Y == LOGITS) max_b = HAS_Y ? at.max(max_b) : max_a;
  const Inverse<T> it = inverse<T>(temperature);
  T zero_a = (T)top_of(max_a), zero_b = (T)top_of(max_b);
  Cross k = {(double)max_a, 0, (double)max_b, 0, 0, 0, 0};
  bool large = cross_sums(at, s, zero_a, max_b, zero_b, it, k);
  if (__any_sync(ALL_LANES, large)) look_closer(at, s, zero_a, max_b, zero_b, it, temperature, k);
  if (excluded(max_b)) k.count = 0;
  if (at.leads()) *(Cross*)state = k;
}
template <class L, class Sink>
KL_DEVICE void cross_outputs(const L& at, const Slot& s, const double* stats, double temperature, const Want& want,
                             const Sink& sink) {
  CrossRow<T> k = cross_row<T>(stats, temperature);
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E], y[L::E], v[L::E];
    at.template read<DX>(s.x, step, x);
    if constexpr (HAS_Y) at.template read<DY>(s.y, step, y);
    bool large = costs_double(k);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      if constexpr (!HAS_Y) y[e] = x[e];
      large |= wants_look<SX>(x[e], cost_of<CROSS_Y>(y[e], k.zero_b, k.it.value));
    }
    if (sizeof(T) == sizeof(float) && large) {   // class by class
#pragma unroll 1
      for (int e = 0; e < L::E; e++) {
        int i = at.index(step, e);
        if (i >= at.n) continue;
        T one = x_of(s, i), other = y_of(s, i);
        CrossOutputs<T> o = cross_class<SX, CROSS_Y, TEMPERED>(one, other, k);
        if (costs_double(k) || costs_double<SX, CROSS_Y>(one, other, k.zero_a, k.zero_b, k.it.value, OUT_DX)) {
          CrossOutputs<double> d =
              cross_class<SX, CROSS_Y, true>((double)one, (double)other, cross_row<double>(stats, temperature));
          o = {(T)d.term, (T)d.dx, (T)d.dy};
        }
        if (want.term) s.extra[i] = o.term * want.of_term;
        if (OUT_DX) sink.dx(i, o.dx * want.of_gradient);
        if (OUT_DY) sink.dy(i, o.dy * want.of_gradient);
      }
      continue;
    }
    if (want.term) {
#pragma unroll
      for (int e = 0; e < L::E; e++) v[e] = cross_class<SX, CROSS_Y, TEMPERED>(x[e], y[e], k).term;
      at.template write<code_of<T>()>(s.extra, step, v, want.of_term);
    }
    if (OUT_DX) {
#pragma unroll
      for (int e = 0; e < L::E; e++) v[e] = cross_class<SX, CROSS_Y, TEMPERED>(x[e], y[e], k).dx;
      sink.dx(at, step, v, want.of_gradient);
    }
    if (OUT_DY) {
#pragma unroll
      for (int e = 0; e < L::E; e++) v[e] = cross_class<SX, CROSS_Y, TEMPERED>(x[e], y[e], k).dy;
      sink.dy(at, step, v, want.of_gradient);
    }
  }
}

// logits and counts, which are normalised: sweep 0 the norms, in double; sweep 1 the sums; sweep 2 the gradients
template <int D, class L> KL_DEVICE Norm norm_chunk(const L& at, const typename Stored<D>::Type* slot, double it) {
  T m = -infinity<T>();
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E];
    at.template read<D>(slot, step, x);
#pragma unroll
    for (int e = 0; e < L::E; e++) m = larger(x[e], m);
  }
  m = at.max(m);
  double zero = top_of((double)m);
  typename L::template Sums<2, double> sums;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E];
    double ties[L::E], rest[L::E];
    at.template read<D>(slot, step, x);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      ties[e] = x[e] == m ? 1.0 : 0.0;
      rest[e] = x[e] == x[e] ? norm_rest((double)x[e], (double)m, zero, it) : nan<double>();
    }
    mask(at, step, ties);
    mask(at, step, rest);
    sums.add(0, ties);
    sums.add(1, rest);
  }
  double count = at.total(sums, 0), rest = at.total(sums, 1);
  return {(double)m, excluded((double)m) ? 0.0 : count, rest};
}

// the same for computed numbers: `of(i)` is that of class i
template <class L, class Of> KL_DEVICE Norm norm_of(const L& at, double it, const Of& of) {
  double m = -infinity<double>();
  typename L::template Sums<2, double> sums;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll 1
    for (int part = 0; part < at.steps() * (L::E / 4); part++) {   // four classes at a time
      double ties[4], rest[4];
#pragma unroll 1
      for (int e = 0; e < 4; e++) {
        int i = at.index(part * 4 / L::E, part * 4 % L::E + e);
        ties[e] = rest[e] = 0.0;
        if (i >= at.n) continue;
        double v = of(i);
        if (pass == 0) m = larger(v, m);
        else ties[e] = v == m ? 1.0 : 0.0, rest[e] = v == v ? norm_rest(v, m, top_of(m), it) : v;
      }
      if (pass == 0) continue;
      sums.add_four(0, ties);
      sums.add_four(1, rest);
    }
    if (pass == 0) m = at.max(m);
  }
  double count = at.total(sums, 0), rest = at.total(sums, 1);
  return {m, excluded(m) ? 0.0 : count, rest};
}

template <int D, class L> KL_DEVICE Tally tally_chunk(const L& at, const typename Stored<D>::Type* slot) {
  constexpr int Q = D == FLOAT64 ? 3 : 1;
  typename L::template Sums<Q, double> sums;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T x[L::E];
    double c[L::E];
    at.template read<D>(slot, step, x);
#pragma unroll
    for (int q = 0; q < Q; q++) {
#pragma unroll
      for (int e = 0; e < L::E; e++) c[e] = count_of((double)x[e]) * (q == 0 ? 1.0 : q == 1 ? FEWER : MORE);
      mask(at, step, c);
      sums.add(q, c);
    }
  }
  double sum = at.total(sums, 0);
  if constexpr (Q == 1) return {sum, sum, sum};
  double fewer = at.total(sums, 1), more = at.total(sums, 2);
  return {sum, fewer, more};
}
template <int S, int D, class L> KL_DEVICE void side_chunk(const L& at, const typename Stored<D>::Type* slot, double it, double* to) {
  if constexpr (S == LOGITS) {
    Norm found = norm_chunk<D>(at, slot, it);
    if (at.leads()) *(Norm*)to = found;
  } else {
    Tally found = tally_chunk<D>(at, slot);
    if (at.leads()) *(Tally*)to = found;
  }
}

// A class's number as its term takes it. `at`: the row's norm, for logits and counts.
template <int S> KL_DEVICE auto normalised(T x, const double* at, const LogNorm<T>& norm, double it) {
  if constexpr (S == LOGITS && BESIDE) return log_prob_of(x, norm);
  else if constexpr (S == LOGITS) return log_prob_of(x, at[0], at[1], it);
  else if constexpr (S == COUNTS) return share_of(x, at);
  else return x;
}

// from a derivative with respect to a normalised number to that with respect to the original one
template <int S, class P> KL_DEVICE T through(T d, P x, const double* at, double sum, double it) {
  if constexpr (S == LOGITS) return through_softmax(d, x, softmax_of_sum<T>(sum, it));
  else return through_share(d, sum, at);
}
template <int S, class L, class P> KL_DEVICE void weigh_shares(const P (&x)[L::E], T* d) {   // to sum their mean
  if constexpr (S == COUNTS) {
#pragma unroll
    for (int e = 0; e < L::E; e++) d[e] = share_times(x[e], d[e]);
  }
}

template <bool ALL, class L, class P, class Q>
KL_DEVICE void normalised_terms(const P (&x)[L::E], const Q (&y)[L::E], double parameter, T* v, T* dx, T* dy) {
#pragma unroll
  for (int e = 0; e < L::E; e++) {
    v[e] = value_of<TheTerm, ALL>(x[e], y[e], parameter);
    dx[e] = OUT_DX ? dx_of<TheTerm, ALL>(x[e], y[e], parameter) : T(0);
    dy[e] = OUT_DY ? dy_of<TheTerm, ALL>(x[e], y[e], parameter) : T(0);
  }
}

template <class L, class Sink>
KL_DEVICE void normalised_chunk(const Plan& p, const L& at, const Slot& s, int sweep, const Local& local,
                                const Want& want, const Sink& sink, double* state) {
  const double *stats = local.stats, it = local.it;
  LogNorm<T> norm = {};
  if constexpr (BESIDE) norm = log_norm_of<T>(stats + (NORM_OF_X ? NORM_X : NORM_Y), it);
  typedef decltype(normalised<SX>(T(0), stats, norm, it)) P;
  typedef decltype(normalised<HAS_Y ? SY : SX>(T(0), stats, norm, it)) Q;
  typename L::template Sums<SUM_STATES> sums;
#pragma unroll 1
  for (int step = 0; step < at.steps(); step++) {
    T raw[L::E], v[L::E], dx[L::E], dy[L::E];
    P x[L::E];
    Q y[L::E];
    bool ordinary = BESIDE && TheTerm::has_ordinary, overflowed = false;
    at.template read<DX>(s.x, step, raw);
#pragma unroll
    for (int e = 0; e < L::E; e++) x[e] = normalised<SX>(raw[e], stats + NORM_X, norm, it);
    if constexpr (HAS_Y) at.template read<DY>(s.y, step, raw);
#pragma unroll
    for (int e = 0; e < L::E; e++) {
      if constexpr (HAS_Y) y[e] = normalised<SY>(raw[e], stats + NORM_Y, norm, it);
      else y[e] = x[e];
      if constexpr (BESIDE && TheTerm::has_ordinary) ordinary &= TheTerm::ordinary(number_of(x[e]), number_of(y[e]));
      if constexpr (BESIDE && NORM_OF_Y) overflowed |= overflows(y[e]);
    }
    if (BESIDE && TheTerm::has_ordinary && at.every(ordinary)) normalised_terms<false, L>(x, y, p.parameter, v, dx, dy);
    else normalised_terms<true, L>(x, y, p.parameter, v, dx, dy);
    if (BESIDE && NORM_OF_Y && at.any(overflowed)) {
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        v[e] *= stretch(raw[e], norm);
        dx[e] *= stretch(raw[e], norm);
      }
    }
    multiply(p, at, step, s, v);
    if (OUT_DX) multiply(p, at, step, s, dx);
    if (OUT_DY) multiply(p, at, step, s, dy);
    if (sweep == 1) {
      if (want.term) at.template write<code_of<T>()>(s.extra, step, v, want.of_term);
      if (OUT_DX) weigh_shares<SX, L>(x, dx);
      if (OUT_DY && !is_final(OP)) weigh_shares<HAS_Y ? SY : SX, L>(y, dy);
      mask(at, step, v);
      mask(at, step, dx);
      mask(at, step, dy);
      sums.add(SUM_VALUE, v);
      sums.add(SUM_DX, dx);
      sums.add(SUM_DY, dy);
    } else {
#pragma unroll
      for (int e = 0; e < L::E; e++) {
        if constexpr (NORM_OF_X) dx[e] = through<SX>(dx[e], x[e], stats + NORM_X, stats[SUM_DX], it);
        if constexpr (NORM_OF_Y && !is_final(OP)) dy[e] = through<SY>(dy[e], y[e], stats + NORM_Y, stats[SUM_DY], it);
      }
      if (want.dx) sink.dx(at, step, dx, want.of_gradient);
      if (want.dy) sink.dy(at, step, dy, want.of_gradient);
    }
  }
  if (sweep != 1) return;
#pragma unroll
  for (int q = 0; q < SUM_STATES; q++) {
    double sum = at.total(sums, q);
    if (at.leads()) state[q] = sum;
  }
}

// The family, for two rows of logits. After the first sweep, near chunks are computed in float and others in double: sweep 1 the
// sums, sweep 2 the gradients. `M`: Member<OP>, which other operations do not have.
template <class M> KL_DEVICE double score_x(const Class<double>& c, double k, bool far) {
  if constexpr (M::saturates) return far ? M::dp_far(c, k) : M::dp(c, k);
  return M::dp(c, k);
}
template <class M> KL_DEVICE double score_y(const Class<double>& c, double k, bool far) {
  if constexpr (M::saturates) return far ? M::dq_far(c, k) : M::dq(c, k);
  return M::dq(c, k);
}
// the first class of the largest logit, of x or of y
template <bool OF_X, class L> KL_DEVICE int likeliest(const L& at, const Slot& s) {
  double top = -infinity<double>(), first = -(double)at.n;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll 1
    for (int j = 0; j < at.steps() * L::E; j++) {
      int i = at.index(j / L::E, j % L::E);
      if (i >= at.n) continue;
      double v = OF_X ? (double)x_of(s, i) : (double)y_of(s, i);
      if (pass == 0) top = larger(v, top);
      else if (v == top) first = larger(-(double)i, first);
    }
    if (pass == 0) top = at.max(top);
  }
  int found = (int)-at.max(first);
  return found < at.n ? found : 0;
}
// A chunk's sums in float: whether all classes are near, and for which sides the scores are far enough apart
constexpr bool GOES_NEAR = sizeof(T) == sizeof(float);
struct NearFound { bool near, x, y; double part; T max_a; Members sums; };
struct NearClass { T w_x, w_y, value, x, y; };   // weights and scores
template <class M> KL_DEVICE bool near_class_at(T a, T b, T max_a, const NearRow<T>& by, double k, NearClass& found) {
  T t = near_gap<TEMPERED>(a, b, by);
  Ordinary<T> c = near_class(t);
  T w = weight<TEMPERED>(a, max_a, by.it);
  found = {w, w * c.q, M::value(c, k), OUT_DX ? M::dp(c, k) : T(0), OUT_DY ? M::dq(c, k) : T(0)};
  return is_near(t, by);
}
template <class M, class L>
KL_DEVICE NearFound near_chunk(const L& at, const Slot& s, double k, const MemberRow& row, const NearRow<T>& by, const Want& want) {
  NearFound found = {true, true, true, 0, T(0), {}};
  T max_b;
  maxima(at, s, found.max_a, max_b);
  found.part = near_part(row, (double)found.max_a);
  Scores x = {}, y = {};
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {   // scores about 0; then about their mean, if they are not balanced
    if (pass == 1 && !__any_sync(ALL_LANES, !(are_balanced(x) && are_balanced(y)))) break;
    typename L::template Sums<7> sums;
    T centre_x = pass == 0 ? T(0) : centre_of(x), centre_y = pass == 0 ? T(0) : centre_of(y);
#pragma unroll 1
    for (int part = 0; part < at.steps() * (L::E / 4); part++) {   // four classes at a time
      T w_x[4], w_y[4], v[4], d_x[4], d_y[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        w_x[e] = w_y[e] = v[e] = d_x[e] = d_y[e] = T(0);
        int i = at.index(part * 4 / L::E, part * 4 % L::E + e);
        if (i >= at.n) continue;
        NearClass c;
        found.near &= near_class_at<M>(x_of(s, i), y_of(s, i), found.max_a, by, k, c);
        w_x[e] = c.w_x;
        w_y[e] = c.w_y;
        v[e] = c.value;
        d_x[e] = c.x - centre_x;
        d_y[e] = c.y - centre_y;
        if (want.term) s.extra[i] = ((c.w_x * c.value) * (T)found.part) * want.of_term;
      }
      auto side = [&](int q, const T* w, T* d) {
        if (pass == 0) sums.add_four(q, w);
        sums.add_four_products(q + 1, w, d);
#pragma unroll
        for (int e = 0; e < 4; e++) d[e] = absolute(d[e]);
        sums.add_four_products(q + 2, w, d);
      };
      sums.add_four_products(0, w_x, v);
      if (OUT_DX) side(1, w_x, d_x);
      if (OUT_DY) side(4, w_y, d_y);
    }
    auto finish = [&](int q, Scores& all, Side& to, bool& apart) {
      double mass = at.total(sums, q), sum = at.total(sums, q + 1), size = at.total(sums, q + 2);
      if (pass == 0) all = {mass, sum, size}, to = near_side(all, 0.0, sum, found.part);
      else if (!are_balanced(all)) to = near_side(all, centre_of(all), sum, found.part), apart = are_apart(size, all, APART<OP>);
    };
    if (pass == 0) found.sums.value = at.total(sums, 0) * found.part;
    if (OUT_DX) finish(1, x, found.sums.x, found.x);
    if (OUT_DY) finish(4, y, found.sums.y, found.y);
  }
  found.near = at.every(found.near);
  found.x &= found.near;
  found.y &= found.near;
  return found;
}

template <class M, class L, class Sink>
KL_DEVICE void members_chunk(const Plan& p, const L& at, const Slot& s, int sweep, const Local& local, const Want& want,
                             const Sink& sink, double* state) {
  const double k = p.parameter;
  MemberRow row = member_row(local.stats, local.it);
  NearFound near = {};
  NearRow<T> by = {};
  if constexpr (GOES_NEAR) {
    by = near_row<T>(row, k);
    Want terms = want;
    terms.term &= sweep == 1;
    near = near_chunk<M>(at, s, k, row, by, terms);
  }
  bool left_x = OUT_DX && !near.x, left_y = OUT_DY && !near.y;   // what is computed in double
  bool in_double = __any_sync(ALL_LANES, at.n > 0 && (!near.near || left_x || left_y));
  Members found = near.sums;
  if (sweep == 1 && in_double) {
    if constexpr (OUT_DX) {
      int top = likeliest<true>(at, s);
      if (at.n > 0) {
        Class<double> c = class_of((double)x_of(s, top), (double)y_of(s, top), row);
        row.x = side_from(score_x<M>(c, k, false), score_x<M>(c, k, true));
      }
    }
    if constexpr (OUT_DY) {
      int top = likeliest<false>(at, s);
      if (at.n > 0) {
        Class<double> c = class_of((double)x_of(s, top), (double)y_of(s, top), row);
        row.y = side_from(score_y<M>(c, k, false), score_y<M>(c, k, true));
      }
    }
  }
  if (sweep == 1) __syncwarp();   // the state may overlap the stats
  Slope<T> slope_x = {}, slope_y = {};
  if constexpr (GOES_NEAR) {
    double x_limit = 0, y_limit = 0;
    if constexpr (M::saturates) x_limit = M::p_limit(k), y_limit = M::q_limit(k);
    slope_x = near_slope<T>(row, row.x, x_limit, near.part);
    slope_y = near_slope<T>(row, row.y, y_limit, near.part);
  }
  typename L::template Sums<5, double> sums;
#pragma unroll 1
  for (int part = 0; (in_double || sweep > 1) && part < at.steps() * (L::E / 4); part++) {   // four classes at a time
    double v[5][4];
#pragma unroll 1
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int q = 0; q < 5; q++) v[q][e] = 0.0;
      int i = at.index(part * 4 / L::E, part * 4 % L::E + e);
      if (i >= at.n) continue;
      T a = x_of(s, i), b = y_of(s, i);   // gradients may overwrite these
      if (sweep > 1 && (near.x || near.y)) {
        if constexpr (GOES_NEAR) {
          NearClass c;
          near_class_at<M>(a, b, near.max_a, by, k, c);
          if (OUT_DX && near.x) sink.dx(i, near_derivative(c.w_x, c.x, slope_x) * want.of_gradient);
          if (OUT_DY && near.y) sink.dy(i, near_derivative(c.w_y, c.y, slope_y) * want.of_gradient);
        }
        if (!left_x && !left_y) continue;
      }
      Class<double> c = class_of((double)a, (double)b, row);
      if (sweep == 1) {
        v[0][e] = M::value(c, k);
        if (want.term && !near.near) s.extra[i] = (T)v[0][e] * want.of_term;
      }
      if constexpr (OUT_DX) {
        v[1][e] = centred_score(c.p, score_x<M>(c, k, row.x.far != 0), M::da(c, k), row.x.centre);
        v[2][e] = c.p;
      }
      if constexpr (OUT_DY) {
        v[3][e] = centred_score(c.q, score_y<M>(c, k, row.y.far != 0), M::db(c, k), row.y.centre);
        v[4][e] = c.q;
      }
      if (sweep == 1) continue;
      if (left_x) sink.dx(i, (T)((v[1][e] - c.p * row.x.sum) * row.it) * want.of_gradient);
      if (left_y) sink.dy(i, (T)((v[3][e] - c.q * row.y.sum) * row.it) * want.of_gradient);
    }
#pragma unroll
    for (int q = 0; q < 5; q++)
      if (sweep == 1) sums.add_four(q, v[q]);
  }
  if (sweep != 1) return;
  if (in_double) {
    double value = at.total(sums, 0);
    Side x = {row.x.far, row.x.centre, at.total(sums, 1), at.total(sums, 2)};
    Side y = {row.y.far, row.y.centre, at.total(sums, 3), at.total(sums, 4)};
    if (!near.near) found.value = value;
    if (left_x) found.x = x;
    if (left_y) found.y = y;
  }
  if (at.leads()) *(Members*)state = found;
}

// Rényi divergence: the norms of tilted rows, and their gradients
template <class L> KL_DEVICE void tilt_chunk(const Plan& p, const L& at, const Slot& s, const Local& local, bool mine, double* state) {
  const double *stats = local.stats, it = local.it;
  const double *of_x = stats + (OF_MEMBERS ? (int)MEMBER_MAX_A : (int)NORM_X), *of_y = stats + (OF_MEMBERS ? (int)MEMBER_MAX_B : (int)NORM_Y);
  Norm u = norm_of(at, 1.0, [&](int i) {
    return tilt_of(rough(SX, SY, (double)x_of(s, i), (double)y_of(s, i), of_x, of_y, stats, it), p.parameter);
  });
  [[maybe_unused]] Norm x = {}, y = {};
  if constexpr (OF_MEMBERS) {
    x = norm_of(at, it, [&](int i) { return (double)x_of(s, i); });
    y = norm_of(at, it, [&](int i) { return (double)y_of(s, i); });
  }
  __syncwarp();   // the state may overlap the stats
  if (!mine) return;
  ((Norm*)state)[0] = u;
  if constexpr (OF_MEMBERS) ((Norm*)state)[1] = x, ((Norm*)state)[2] = y;
}
template <class L, class Sink>
KL_DEVICE void tilt_outputs(const Plan& p, const L& at, const Slot& s, const Local& local, const Want& want, const Sink& sink) {
  TiltRow row = tilt_row(SX, SY, p.parameter, local.stats);
#pragma unroll 1
  for (int j = 0; j < at.steps() * L::E; j++) {
    int i = at.index(j / L::E, j % L::E);
    if (i >= at.n) continue;
    TiltSlopes d = tilt_slopes(SX, SY, (double)x_of(s, i), (double)y_of(s, i), row, local.stats, local.it);
    if (want.dx) sink.dx(i, (T)d.dx * want.of_gradient);
    if (want.dy) sink.dy(i, (T)d.dy * want.of_gradient);
  }
}

struct NeverAgain {   // nothing was kept in the slot
  KL_DEVICE void operator()() const {}
};

// One chunk of one row. The sweep leaves its state in shared memory, and its outputs in the slot. `keep`: for two rows of logits,
// both sweeps use the same slot.
template <class L, class Sink, class Restage>
KL_DEVICE void sums_chunk(const Plan& p, const L& at, const Slot& s, int sweep, const Local& local, const Want& want,
                          const Sink& sink, double* state, bool keep, const Restage& restage) {
  if constexpr (OF_LOGITS) {
    if (sweep == 0) spread_chunk(at, s, local.it, keep, restage, state);
    else if constexpr (KL_OUTPUTS != 0) spread_outputs(at, s, local, keep, want, sink);
  } else if constexpr (OF_CROSS) {
    if (sweep == 0) cross_state(at, s, local.it, state);
    else if constexpr (KL_OUTPUTS != 0) cross_outputs(at, s, local.stats, local.it, want, sink);
  } else if constexpr (OF_MEMBERS) {
    if (sweep == 0) spread_chunk(at, s, local.it, false, restage, state);
    else members_chunk<Member<summed(OP)>>(p, at, s, sweep, local, want, sink, state);
  } else if constexpr (NORMALISED) {
    if (sweep == 0) {
      if (at.leads()) *(Norm*)state = *(Norm*)(state + NORM_STATES) = {};
      if constexpr (NORM_OF_X) side_chunk<SX, DX>(at, s.x, local.it, state);
      if constexpr (NORM_OF_Y) side_chunk<SY, DY>(at, s.y, local.it, state + NORM_STATES);
    } else {
      normalised_chunk(p, at, s, sweep, local, want, sink, state);
    }
  } else {
    double sum = terms_chunk(p, at, s, want, sink);
    if (at.leads() && sweep == 0) state[0] = sum;
  }
}

// The same for every operation. Some rows of a warp may be tilted: all lanes take part in each step, but without classes if the
// step is not for their row.
template <class L, class Sink, class Restage>
KL_DEVICE void chunk(const Plan& p, const L& at, const Slot& s, int sweep, const Local& local, const Want& want,
                     const Sink& sink, double* state, bool keep, const Restage& restage) {
  if (!IS_RENYI || sweep <= SUM_SWEEP) return sums_chunk(p, at, s, sweep, local, want, sink, state, keep, restage);
  bool tilted = is_tilted(local.stats) & (at.n > 0);
  double slope = local.stats[RENYI_SLOPE];
  L here = at, others = at;
  here.n = tilted ? at.n : 0;
  others.n = tilted ? 0 : at.n;
  if (sweep == VALUE_SWEEP) {
    if (__any_sync(ALL_LANES, tilted)) tilt_chunk(p, here, s, local, tilted && at.leads(), state);
    return;
  }
  if (__any_sync(ALL_LANES, tilted)) tilt_outputs(p, here, s, local, want, sink);
  Want scaled = want;
  scaled.of_gradient = want.weight * slope * gradient_scale(p);
  if (__any_sync(ALL_LANES, others.n > 0))
    sums_chunk(p, others, s, SUM_SWEEP + 1, local, scaled, sink, state, keep, restage);
}

constexpr int TERM_SWEEP = ONE_SWEEP ? 0 : 1;
constexpr int GRADIENT_SWEEP = ONE_SWEEP ? 0 : OF_LOGITS || OF_CROSS ? 1 : VALUE_SWEEP + 1;

// ---- merging states --------------------------------------------------------------------------------------------------------
//
// The sums of f(i, v), 0 <= i < count <= CHUNK, in the order of kl_tree.h; all in double. Lane l owns columns l + 32 k.
template <int Q, class F> KL_DEVICE void sum_column(int count, int k, F f, double* column) {
#pragma unroll
  for (int q = 0; q < Q; q++) column[q] = 0.0;
#pragma unroll 1
  for (int i = 32 * k + lane_of(); i < count; i += COLUMNS) {
    double v[Q];
    f(i, v);
#pragma unroll
    for (int q = 0; q < Q; q++) column[q] += v[q];
  }
}
template <int Q> KL_DEVICE void sum_lanes(double* total) {
#pragma unroll
  for (int q = 0; q < Q; q++) {
#pragma unroll
    for (int o = 16; o; o /= 2) total[q] += __shfl_xor_sync(ALL_LANES, total[q], o);
    total[q] += 0.0;
  }
}
template <int Q, class F> KL_DEVICE void sum_states(int count, F f, double* total) {
#pragma unroll
  for (int q = 0; q < Q; q++) total[q] = 0.0;
#pragma unroll 1
  for (int odd = 0; odd < 2; odd++) {          // (column 0 + column 2) + (column 1 + column 3): + 64, + 32
    double both[Q];
#pragma unroll
    for (int q = 0; q < Q; q++) both[q] = 0.0;
#pragma unroll 1
    for (int k = odd; k < 4; k += 2) {
      double column[Q];
      sum_column<Q>(count, k, f, column);
#pragma unroll
      for (int q = 0; q < Q; q++) both[q] += column[q];
    }
#pragma unroll
    for (int q = 0; q < Q; q++) total[q] += both[q];
  }
  sum_lanes<Q>(total);
}

// Who sums: one warp,
struct Alone {
  static constexpr int warps = 1;
  template <int Q, class F> KL_DEVICE void sum(int count, F f, double* total) const { sum_states<Q>(count, f, total); }
};
// or the first warps of a block, each for some values of k. They exchange sums through shared memory, and all get the totals.
struct Together {
  int warps;
  double* columns;                             // [4][Q][WARP]
  template <int Q, class F> KL_DEVICE void sum(int count, F f, double* total) const {
    double* mine = columns + lane_of();
#pragma unroll 1
    for (int k = warp_of(); k < 4; k += warps) {
      double column[Q];
      sum_column<Q>(count, k, f, column);
#pragma unroll
      for (int q = 0; q < Q; q++) mine[(k * Q + q) * WARP] = column[q];
    }
    warps_barrier(warps);
#pragma unroll
    for (int q = 0; q < Q; q++)
      total[q] = (mine[q * WARP] + mine[(2 * Q + q) * WARP]) + (mine[(Q + q) * WARP] + mine[(3 * Q + q) * WARP]);
    sum_lanes<Q>(total);
    warps_barrier(warps);                      // before the next sums overwrite the columns
  }
};
// Two rows of logits have the most work per state. As many warps as there are k with any states.
KL_DEVICE auto folders(int warps, int count, char* columns) {
  if constexpr (OF_LOGITS) {
    static_assert(4 * 3 * WARP * sizeof(double) <= CHUNK * sizeof(T), "the columns of three sums");
    int busy = (count + WARP - 1) / WARP, most = warps < 4 ? warps : 4;
    return Together{busy < most ? busy : most, (double*)columns};
  } else {
    return Alone{};
  }
}

KL_DEVICE double lanes_max(double m) {
#pragma unroll
  for (int o = 16; o; o /= 2) {
    m = larger(__shfl_xor_sync(ALL_LANES, m, o), m);
  }
  return m;
}

struct States {               // of `count` chunks: number k of state i is from[k * pitch + i]
  const double* from;
  i64 pitch;
  int count;
  KL_DEVICE double get(int i, int k) const { return from[k * pitch + i]; }
  KL_DEVICE Spread spread(int i) const {
    return {get(i, 0), get(i, 1), get(i, 2), get(i, 3), get(i, 4), get(i, 5), get(i, 6), get(i, 7), get(i, 8)};
  }
  KL_DEVICE Cross cross(int i) const { return cross_at(from + i, pitch); }
  KL_DEVICE Side side(int i, int base) const { return {get(i, base), get(i, base + 1), get(i, base + 2), get(i, base + 3)}; }
  KL_DEVICE Norm norm(int i, int base) const { return {get(i, base), get(i, base + 1), get(i, base + 2)}; }
};

template <class Who> KL_DEVICE Spread fold_spreads(const Who& who, const States& s, double it) {
  if (s.count == 1) return s.spread(0);
  double max_a = -infinity<double>(), max_b = max_a, sum[3];
  bool far = false, impossible = false;
#pragma unroll 1
  for (int i = lane_of(); i < s.count; i += WARP) {
    max_a = larger(s.get(i, AT_MAX_A), max_a);
    max_b = larger(s.get(i, AT_MAX_B), max_b);
    far |= is_far(s.get(i, AT_KIND));
    impossible |= is_impossible(s.get(i, AT_KIND));
  }
  max_a = lanes_max(max_a);
  max_b = lanes_max(max_b);
  Tops top = tops(max_a, max_b);
  who.template sum<3>(s.count, [&](int i, double* v) {
    Spread k = s.spread(i);
    v[0] = merge_weight(k.max_a, top.a, it) * k.s;
    v[1] = v[0] * merge_mean(k, top);
    v[2] = merge_mass(k, top, it);
  }, sum);
  double weights = sum[0], mass = sum[2];
  Pair<double> m = merge_anchor(sum[1], weights);
  far = __any_sync(ALL_LANES, far);
  who.template sum<3>(s.count, [&](int i, double* v) {
    Moved k = moved(s.spread(i), top, m, it);
    v[0] = k.x;
    v[1] = k.g;
    v[2] = k.far ? 1.0 : 0.0;
  }, sum);
  return merged(max_a, max_b, weights, m, sum[0], sum[1], mass, far || sum[2] > 0, __any_sync(ALL_LANES, impossible));
}

template <class Who> KL_DEVICE Cross fold_crosses(const Who& who, const States& s, double it) {
  double max_a = -infinity<double>(), max_b = max_a, sum[4];
  bool impossible = false;
#pragma unroll 1
  for (int i = lane_of(); i < s.count; i += WARP) {
    Cross k = s.cross(i);
    max_a = larger(k.max_a, max_a);
    max_b = larger(k.max_b, max_b);
    impossible |= is_impossible(k.kind);
  }
  max_a = lanes_max(max_a);
  max_b = lanes_max(max_b);
  who.template sum<4>(s.count, [&](int i, double* v) {
    Paid k = paid(s.cross(i), max_a, max_b, it);
    v[0] = k.s;
    v[1] = k.cost;
    v[2] = k.count;
    v[3] = k.rest;
  }, sum);
  return {max_a, sum[0], max_b, sum[2], sum[3], sum[1], kind_of(false, __any_sync(ALL_LANES, impossible))};
}

KL_DEVICE Norm fold_norms(const States& s, int base, double it) {
  double top = -infinity<double>(), sum[2];
#pragma unroll 1
  for (int i = lane_of(); i < s.count; i += WARP) top = s.get(i, base) > top ? s.get(i, base) : top;
  top = lanes_max(top);
  double zero = top_of(top);
  sum_states<2>(s.count, [&](int i, double* v) {
    Norm k = s.norm(i, base);
    v[0] = k.max == top ? k.count : 0.0;
    v[1] = merge_rest(k, top, zero, it);
  }, sum);
  return {top, sum[0], sum[1]};
}

template <int S> KL_DEVICE void fold_side(const States& s, int base, double it, double* to) {
  if constexpr (S == LOGITS) {
    *(Norm*)to = fold_norms(s, base, it);
  } else {
    sum_states<NORM_STATES>(s.count, [&](int i, double* v) {
#pragma unroll
      for (int q = 0; q < NORM_STATES; q++) v[q] = s.get(i, base + q);
    }, to);
  }
}
template <int S> KL_DEVICE void finish_side(const double* state, double* norm) {
  if constexpr (S == LOGITS) {
    norm[0] = state[0];
    norm[1] = log_norm(*(const Norm*)state);
  } else {
    tally_finish(*(const Tally*)state, norm);
  }
}

// x's side of the states, which begins at 1, or y's
template <class Who> KL_DEVICE Side fold_sides(const Who& who, const States& s, int base, double limit) {
  double top = -infinity<double>(), first = -(double)s.count, sum[2];
#pragma unroll 1
  for (int i = lane_of(); i < s.count; i += WARP) top = larger(s.get(i, base + 3), top);
  top = lanes_max(top);
#pragma unroll 1
  for (int i = lane_of(); i < s.count; i += WARP)
    if (s.get(i, base + 3) == top) first = larger(-(double)i, first);
  int found = (int)-lanes_max(first);
  Side all = s.side(found < s.count ? found : 0, base);
  who.template sum<2>(s.count, [&](int i, double* v) {
    Side k = s.side(i, base);
    v[0] = moved_score(k, all, limit);
    v[1] = k.mass;
  }, sum);
  return {all.far, all.centre, sum[0], sum[1]};
}
template <class M, class Who> KL_DEVICE Members fold_members(const Who& who, const States& s, double k) {
  double value, x_limit = 0, y_limit = 0;
  if constexpr (M::saturates) x_limit = M::p_limit(k), y_limit = M::q_limit(k);
  who.template sum<1>(s.count, [&](int i, double* v) { v[0] = s.get(i, 0); }, &value);
  return {value, fold_sides(who, s, 1, x_limit), fold_sides(who, s, 1 + SIDE_STATES, y_limit)};
}

template <class Who> KL_DEVICE void fold(const Plan& p, double it, int sweep, const Who& who, const States& s, double* to) {
  if (IS_RENYI && sweep == VALUE_SWEEP) {
    for (int k = 0; k < TILT_STATES; k += NORM_STATES) fold_side<LOGITS>(s, k, k == 0 ? 1.0 : it, to + k);
    return;
  }
  if constexpr (OF_LOGITS) {
    *(Spread*)to = fold_spreads(who, s, it);
  } else if constexpr (OF_CROSS) {
    *(Cross*)to = fold_crosses(who, s, it);
  } else if constexpr (OF_MEMBERS) {
    if (sweep == 0) *(Spread*)to = fold_spreads(who, s, it);
    else *(Members*)to = fold_members<Member<summed(OP)>>(who, s, p.parameter);
  } else if (NORMALISED && sweep == 0) {
    if constexpr (NORM_OF_X) fold_side<SX>(s, 0, it, to);
    if constexpr (NORM_OF_Y) fold_side<SY>(s, NORM_STATES, it, to + NORM_STATES);
  } else {
    constexpr int Q = NORMALISED ? (int)SUM_STATES : 1;
    sum_states<Q>(s.count, [&](int i, double* v) {
#pragma unroll
      for (int q = 0; q < Q; q++) v[q] = s.get(i, q);
    }, to);
  }
}

// the last state into the row's stats, the value first; `stats` may overlap the state
KL_DEVICE void finish(const Plan& p, double it, int sweep, const double* from, double* stats) {
  double state[MAX_STATES];
#pragma unroll
  for (int k = 0; k < MAX_STATES; k++)
    if (k < states_of(sweep)) state[k] = from[k];
  if (sweep == 0)
    for (int k = 0; k < MAX_STATS; k++) stats[k] = 0.0;   // all of them are read, even unused ones
  if (IS_RENYI && sweep == VALUE_SWEEP) {
    if (!is_tilted(stats)) return renyi_finish(p.parameter, stats);   // there is no state
#pragma unroll
    for (int k = NORM_STATES, to = NORM_X; k < TILT_STATES; k += NORM_STATES, to += NORM_Y - NORM_X)   // x and y
      finish_side<LOGITS>(state + k, stats + to);
    return tilt_finish(SX, SY, p.parameter, *(const Norm*)state, stats);
  }
  if constexpr (OF_LOGITS) {
    logits_finish(*(const Spread*)state, it, stats);
  } else if constexpr (OF_CROSS) {
    const Cross& k = *(const Cross*)state;
    cross_finish<SX, CROSS_Y>(k, CROSS_Y == LOGITS ? log_norm({k.max_b, k.count, k.rest}) : 0.0, stats);
  } else if constexpr (OF_MEMBERS) {
    if (sweep == 0) members_begin(*(const Spread*)state, it, stats);
    else members_finish(*(const Members*)state, stats);
  } else if (NORMALISED && sweep == 0) {
    if constexpr (NORM_OF_X) finish_side<SX>(state, stats + NORM_X);
    if constexpr (NORM_OF_Y) finish_side<SY>(state + NORM_STATES, stats + NORM_Y);
  } else {
#pragma unroll
    for (int k = 0; k < (NORMALISED ? (int)SUM_STATES : 1); k++) stats[k] = state[k];
  }
  if (IS_RENYI && sweep == SUM_SWEEP) renyi_begin(p.parameter, stats);
}

// ---- rows in global memory -------------------------------------------------------------------------------------------------

struct Row {
  const char *x, *y, *factors;
  char *value, *dx, *dy;
  double weight, inverse_temperature;
};

// For a weighted mean, whose weights may be at an end of the range: WEIGHT_FACTORS. A weight does not become 0: its row counts.
KL_DEVICE double scaled(const Plan& p, double weight) {
  if (!p.denominator) return weight;
  double w = weight * p.denominator[1];
  return (w == 0) & (weight != 0) ? 0x1p-1074 : w;
}

KL_DEVICE double factor_of(const Plan& p) {   // a cotangent of 0 skips all rows
  return p.cotangent && *p.cotangent == 0 ? 0.0 : p.factor;
}
KL_DEVICE double read_number(const Array& a, const char* at) {
  return a.dtype == FLOAT32 ? (double)*(const float*)at : *(const double*)at;
}

#if defined(KL_TEMPERATURES)
constexpr bool EACH_TEMPERED = true;
#else
constexpr bool EACH_TEMPERED = false;
#endif
KL_DEVICE double inverse_temperature(const Plan& p) {   // for all rows. Multiplying by 1 changes nothing, and is omitted
#if defined(KL_TEMPERATURE)
  return p.inverse_temperature;
#else
  return 1.0;
#endif
}

KL_DEVICE Row locate(const Plan& p, i64 r) {
  Row row = {p.x.data, p.y.data, p.factors.data, p.value.data, p.dx.data, p.dy.data, 1.0, inverse_temperature(p)};
  const char *weight = p.weights.data, *temperature = p.temperatures.data;
#pragma unroll 1
  for (int d = (int)p.ndim - 1; d >= 0; d--) {
    i64 i = d > 0 ? r % p.shape[d] : r;
    r = d > 0 ? r / p.shape[d] : 0;
    row.x += i * p.x.batch[d];
    row.y += i * p.y.batch[d];
    if (FACTORS) row.factors += i * p.factors.batch[d];
    row.value += i * p.value.batch[d];
    row.dx += i * p.dx.batch[d];
    row.dy += i * p.dy.batch[d];
    weight += i * p.weights.batch[d];
    if (EACH_TEMPERED) temperature += i * p.temperatures.batch[d];
  }
  if (weight) {
    double w = read_number(p.weights, weight);
    bool good = p.any_weights || (w >= 0 && w < infinity<double>());
    row.weight = good ? w : nan<double>();   // an invalid weight makes its row NaN,
  }
  row.weight = scaled(p, row.weight) * factor_of(p);
  if (EACH_TEMPERED && temperature) {
    constexpr bool NARROW = DX != FLOAT64 && DY != FLOAT64;
    double t = read_number(p.temperatures, temperature);
    bool good = (t >= (NARROW ? COLDEST_NARROW : COLDEST)) & (t <= (NARROW ? HOTTEST_NARROW : HOTTEST));
    row.inverse_temperature = good ? 1 / t : 1.0;
    row.weight = good | (row.weight == 0) ? row.weight : nan<double>();   // and so does an invalid temperature
  }
  return row;
}
KL_DEVICE double weight_of(const Plan& p, i64 r) { return EACH_TEMPERED || p.weights.data ? locate(p, r).weight : factor_of(p); }
KL_DEVICE double inverse_temperature(const Plan& p, i64 r) {
  return EACH_TEMPERED ? locate(p, r).inverse_temperature : inverse_temperature(p);
}

KL_DEVICE void write_number(i64 dtype, char* at, double v) {
  if (dtype == FLOAT32) *(float*)at = (float)v;
  else if (dtype == FLOAT64) *(double*)at = v;
  else if (dtype == FLOAT16) *(unsigned short*)at = Stored<FLOAT16>::narrow(v);
  else *(unsigned short*)at = Stored<BFLOAT16>::narrow(v);
}

KL_DEVICE Want wanted(const Plan& p, int sweep, double weight) {
  return {OUT_TERMS && sweep == TERM_SWEEP, OUT_DX && sweep == GRADIENT_SWEEP, OUT_DY && sweep == GRADIENT_SWEEP,
          weight, weight * gradient_scale(p), weight};
}

KL_DEVICE void write_value(const Plan& p, char* at, double weight, double value) {
  double v = weight == 0 ? 0.0 : weight == 1 ? value : value * weight;
  write_number(p.value.dtype, at, v);
}

template <int BYTES, class U> KL_DEVICE int copy_in(U* slot, const char* from, int n) {   // returns how many numbers were copied
  int vectors = n * (int)sizeof(U) / BYTES;
#pragma unroll 4
  for (int v = lane_of(); v < vectors; v += WARP) {
#if KL_ARCH >= 800
    copy_async<BYTES>((char*)slot + v * BYTES, from + v * BYTES);
#else
    copy_vector<BYTES>((char*)slot + v * BYTES, from + v * BYTES);
#endif
  }
  return vectors * (BYTES / (int)sizeof(U));
}
template <int BYTES, class U> KL_DEVICE int copy_out(char* to, const U* slot, int n) {
  int vectors = n * (int)sizeof(U) / BYTES;
#pragma unroll 4
  for (int v = lane_of(); v < vectors; v += WARP) copy_vector<BYTES>(to + v * BYTES, (const char*)slot + v * BYTES);
  return vectors * (BYTES / (int)sizeof(U));
}
KL_DEVICE void arrived() {    // wait for the copies of this lane
#if KL_ARCH >= 800
  wait_copies();
#endif
}
KL_DEVICE int alignment(const void* p) { return (int)((unsigned long long)p & 15); }

// The same for 16-bit numbers that begin in the middle of a word: each pair is half of one word and half of the next. (The word
// that the first number shares with its predecessor is in the same allocation.)
KL_DEVICE int copy_in_halves(void* slot, const char* from, int n) {
  const unsigned* words = (const unsigned*)(from - 2);
  int pairs = (n - 1) / 2;   // pairs whose second word does not extend beyond the row
#pragma unroll 8
  for (int j = lane_of(); j < pairs; j += WARP) ((unsigned*)slot)[j] = words[j] >> 16 | words[j + 1] << 16;
  return 2 * pairs;
}

// n numbers, contiguous or `stride` apart, from global memory to a slot, by one warp: in the widest vectors that are aligned.
template <class U> KL_DEVICE void stage(U* slot, const char* from, i64 stride, int n) {
  int done = 0;
  if (stride == (i64)sizeof(U)) {
    int a = alignment(from);
    if (a == 0) done = copy_in<16>(slot, from, n);
    else if (a % 8 == 0) done = copy_in<8>(slot, from, n);
    else if (a % 4 == 0) done = copy_in<4>(slot, from, n);
    else if (a % 4 == 2) done = copy_in_halves(slot, from, n);
  }
#pragma unroll 4
  for (int i = done + lane_of(); i < n; i += WARP) slot[i] = *(const U*)(from + i * stride);
}
template <class U> KL_DEVICE void unstage(char* to, i64 stride, const U* slot, int n) {
  int done = 0;
  if (stride == (i64)sizeof(U)) {
    int a = alignment(to);
    if (a == 0) done = copy_out<16>(to, slot, n);
    else if (a % 8 == 0) done = copy_out<8>(to, slot, n);
    else if (a % 4 == 0) done = copy_out<4>(to, slot, n);
  }
#pragma unroll 4
  for (int i = done + lane_of(); i < n; i += WARP) *(U*)(to + i * stride) = slot[i];
}
// terms have type T, and may be wanted in a narrower one
KL_DEVICE void unstage_terms(const Plan& p, char* to, const T* slot, int n) {
  if (p.value.dtype == code_of<T>()) return unstage(to, p.value.stride, slot, n);
#pragma unroll 1
  for (int i = lane_of(); i < n; i += WARP) write_number(p.value.dtype, to + i * p.value.stride, (double)slot[i]);
}

KL_DEVICE void put_zeros(const Slot& s, const Want& want, int n) {   // the outputs of a row of weight 0
#pragma unroll 1
  for (int i = lane_of(); i < n; i += WARP) {
    if (want.term) s.extra[i] = T(0);
    if (want.dx) s.x[i] = Stored<DX>::narrow(T(0));
    if (want.dy) s.y[i] = Stored<DY>::narrow(T(0));
  }
}
// fills the last step with copies of class 0: they are finite if it is, and far if it is
KL_DEVICE void pad(const Slot& s, int n) {
  int end = (n + 255) / 256 * 256;
#pragma unroll 1
  for (int i = n + lane_of(); i < end; i += WARP) {
    s.x[i] = s.x[0];
    if (HAS_Y) s.y[i] = s.y[0];
  }
}

// ---- shared memory ---------------------------------------------------------------------------------------------------------

KL_DEVICE void pack_all(const Plan& p, double it, const double* stats, double* states) {   // of a row, by a warp
#pragma unroll 1
  for (int c = lane_of(); c < (int)p.chunks; c += WARP) pack(stats, states + c, (int)p.chunks, it);
}

// Wide, for each warp: `slots` chunks of x and y, one of `extra` if it is used, a row's stats, and a chunk's state.
constexpr int KNOWN = 2 * MAX_STATS;
static_assert(KNOWN <= WARP && MAX_STATS % 2 == 0);   // one lane for each; what follows them is aligned
constexpr bool HAS_EXTRA = ((OF_LOGITS || OF_MEMBERS) && EXACT<T>) || OUT_TERMS;
constexpr int SLOT_BYTES = CHUNK * (int)(sizeof(X) + (HAS_Y ? sizeof(Y) : 0));
KL_DEVICE int warp_bytes(const Plan& p) {
  return (int)p.slots * SLOT_BYTES + (HAS_EXTRA ? CHUNK * (int)sizeof(T) : 0) + KNOWN * 8;
}
KL_DEVICE double* stats_of(const Plan& p, char* shared) {
  return (double*)(shared + (warp_of() + 1) * warp_bytes(p)) - KNOWN;
}
KL_DEVICE Slot slot_of(const Plan& p, char* shared, int j) {
  char* mine = shared + warp_of() * warp_bytes(p);
  char* x = mine + j * SLOT_BYTES;
  return {(X*)x, (Y*)(x + CHUNK * sizeof(X)), (T*)(mine + (int)p.slots * SLOT_BYTES), nullptr};
}

KL_DEVICE void store_outputs(const Plan& p, const Row& row, i64 start, int n, const Slot& s, const Want& want) {
  __syncwarp();
  if (want.term) unstage_terms(p, row.value + start * p.value.stride, s.extra, n);
  if (want.dx) unstage(row.dx + start * p.dx.stride, p.dx.stride, s.x, n);
  if (want.dy) unstage(row.dy + start * p.dy.stride, p.dy.stride, s.y, n);
  __syncwarp();
}

// Whether full chunks of a row need no slot: they are swept once, and all reads and writes are whole aligned vectors.
constexpr bool DIRECT = ONE_SWEEP && !OUT_TERMS && !FACTORS;
template <class U> KL_DEVICE bool in_vectors(const char* at, i64 stride) {
  return (stride == (i64)sizeof(U)) & (alignment(at) % (sizeof(U) == 2 ? 8 : 16) == 0);
}
KL_DEVICE bool is_direct(const Plan& p, const Row& row) {
  return DIRECT && in_vectors<X>(row.x, p.x.stride) && (!HAS_Y || in_vectors<Y>(row.y, p.y.stride)) &&
         (!OUT_DX || in_vectors<X>(row.dx, p.dx.stride)) && (!OUT_DY || in_vectors<Y>(row.dy, p.dy.stride));
}

KL_DEVICE double chunk_direct(const Plan& p, const Row& row, i64 c, const Want& want) {
  Slot from = {(X*)row.x + c * CHUNK, (Y*)row.y + c * CHUNK, nullptr, nullptr};
  return terms_direct(p, from, want, InPlace{{(X*)row.dx + c * CHUNK, (Y*)row.dy + c * CHUNK, nullptr, nullptr}});
}

struct Unit {   // a chunk of a row
  i64 row;
  int chunk;
};

KL_DEVICE int classes(const Plan& p, i64 c) {
  i64 left = p.n - c * CHUNK;
  return left < CHUNK ? (int)left : CHUNK;
}

KL_DEVICE void stage_chunk(const Plan& p, const Row& row, i64 c, const Slot& s) {
  stage(s.x, row.x + c * CHUNK * p.x.stride, p.x.stride, classes(p, c));
  if constexpr (HAS_Y) stage(s.y, row.y + c * CHUNK * p.y.stride, p.y.stride, classes(p, c));
}

// the same for a chunk that was staged before
KL_DEVICE void stage_again(const Plan& p, const Unit& unit, const Slot& s) {
  __syncwarp();
  stage_chunk(p, locate(p, unit.row), unit.chunk, s);
  arrived();
  __syncwarp();
  pad(s, classes(p, unit.chunk));
  __syncwarp();
}

KL_DEVICE Slot with_factors(const Plan& p, Slot s, i64 r, i64 c) {
  if (FACTORS) s.factors = locate(p, r).factors + c * CHUNK * p.factors.stride;
  return s;
}

}  // namespace kl

using namespace kl;

// ---- the kernels -----------------------------------------------------------------------------------------------------------
//
// kl_units: rows of one chunk, all sweeps. With `states`, for longer rows and for rows in parts: the sweeps from `first` to
// `last`, whose states go to states[(row * K + k) * chunks + chunk], K per chunk; stats[row * MAX_STATS] holds the results of
// earlier sweeps.
// Each warp processes one chunk of one row at a time. If neighbouring rows are side by side in memory, the warps of a block take
// neighbouring rows and read them together.
#if defined(KL_UNITS)
KL_DEVICE Unit unit_of(const Plan& p, i64 tile) {
  if (p.columns) return {tile / p.chunks * warps_of() + warp_of(), (int)(tile % p.chunks)};
  i64 unit = tile * warps_of() + warp_of();
  if (p.chunks == 1) return {unit, 0};
  return {unit / p.chunks, (int)(unit % p.chunks)};
}

KL_DEVICE Unit after(const Plan& p, const Unit& u) {
  int chunk = u.chunk + (int)p.chunks_on;
  bool over = chunk >= (int)p.chunks;
  return {u.row + p.rows_on + (over ? p.columns ? warps_of() : 1 : 0), over ? chunk - (int)p.chunks : chunk};
}
// The results of earlier sweeps for a unit: its row's stats in the first lanes, then, for two rows of logits, its own state
KL_DEVICE double found_out(const Plan& p, const Unit& u) {
  int k = lane_of() - MAX_STATS;
  if (k < 0) return p.stats[u.row * MAX_STATS + lane_of()];
  return OF_LOGITS && k < LOGITS_STATES ? p.states[(u.row * LOGITS_STATES + k) * p.chunks + u.chunk] : 0.0;
}

extern "C" __global__ void __launch_bounds__(THREADS, OF_LOGITS && BLOCKS > 4 ? 4 : BLOCKS) kl_units(const Plan p) {
  KL_SHARED_MEMORY(shared);
  const int W = warps_of();
  Slot s = slot_of(p, shared, 0);
  double* stats = stats_of(p, shared);
  for (Unit unit = unit_of(p, blockIdx.x); unit.row - (p.columns ? warp_of() : 0) < p.rows; unit = after(p, unit)) {
    bool active = unit.row < p.rows, live = active && weight_of(p, unit.row) != 0;
    int n = classes(p, unit.chunk);
    double known = p.first > 0 && live ? found_out(p, unit) : 0.0;
    if constexpr (DIRECT)
      if (live && n == CHUNK && !p.columns) {
        Row row = locate(p, unit.row);
        if (is_direct(p, row)) {
          double sum = chunk_direct(p, row, unit.chunk, wanted(p, 0, row.weight));
          if (lane_of() == 0) {
            row = locate(p, again(unit.row));
            if (p.states) p.states[unit.row * p.chunks + unit.chunk] = sum;
            else if (p.value.data) write_value(p, row.value, row.weight, sum);
          }
          continue;
        }
      }
    if (p.columns) {   // thread t loads classes of row t mod W: neighbouring threads read neighbouring numbers
      int of = (int)threadIdx.x % W;
      Slot theirs = slot_of(p, shared + (of - warp_of()) * warp_bytes(p), 0);
      i64 r = unit.row - warp_of() + of;
      __syncthreads();
      if (r < p.rows && weight_of(p, r) != 0) {
        Row row = locate(p, r);
#pragma unroll 2
        for (int i = (int)threadIdx.x / W; i < n; i += WARP) {
          i64 k = (i64)unit.chunk * CHUNK + i;
          theirs.x[i] = *(const X*)(row.x + k * p.x.stride);
          if (HAS_Y) theirs.y[i] = *(const Y*)(row.y + k * p.y.stride);
        }
      }
      __syncthreads();
    } else if (live) {
      stage_chunk(p, locate(p, unit.row), unit.chunk, s);
      arrived();
    }
    if (p.first > 0 && lane_of() < KNOWN) stats[lane_of()] = known;
    __syncwarp();
    if (live) pad(s, n);
    __syncwarp();

#pragma unroll 1
    for (int sweep = (int)p.first; live && sweep < (int)p.last; sweep++) {
      double it = inverse_temperature(p, unit.row);
      Local local = {stats, stats + 1, 1, false, it};
      if (OF_LOGITS && sweep > 0 && p.states) local = {stats, stats + MAX_STATS, 1, PACKS && p.packed, it};
      bool keep = !p.states && p.last > 1 && !p.columns, none = IS_RENYI && sweep == VALUE_SWEEP && !is_tilted(stats);
      chunk(p, Wide(n), with_factors(p, s, unit.row, unit.chunk), sweep, local, wanted(p, sweep, weight_of(p, unit.row)),
            InPlace{s}, stats, keep, [&] { stage_again(p, unit, s); });
      __syncwarp();
      int count = states_of(sweep);
      if (count > 0 && !p.states && lane_of() == 0) finish(p, it, sweep, stats, stats);
      if (lane_of() < count && p.states) {
        p.states[(unit.row * count + lane_of()) * p.chunks + unit.chunk] = none ? 0.0 : stats[lane_of()];
      }
      __syncwarp();
    }
    active = unit.row < p.rows;
    n = classes(p, unit.chunk);
    if (!p.states && active) {
      if (lane_of() == 0 && !OUT_TERMS && p.value.data) {
        Row row = locate(p, unit.row);
        write_value(p, row.value, row.weight, stats[VALUE]);
      }
      if (p.stats && live && lane_of() < MAX_STATS) p.stats[unit.row * MAX_STATS + lane_of()] = stats[lane_of()];
    }
    Want all = {};
    for (int sweep = (int)p.first; sweep < (int)p.last; sweep++) {
      all.term |= OUT_TERMS && sweep == TERM_SWEEP;
      all.dx |= OUT_DX && sweep == GRADIENT_SWEEP;
      all.dy |= OUT_DY && sweep == GRADIENT_SWEEP;
    }
    if (!all.term && !all.dx && !all.dy) continue;
    if (active && !live) put_zeros(s, all, n);
    if (!p.columns) {
      if (active) store_outputs(p, locate(p, unit.row), (i64)unit.chunk * CHUNK, n, s, all);
      continue;
    }
    int of = (int)threadIdx.x % W;
    Slot theirs = slot_of(p, shared + (of - warp_of()) * warp_bytes(p), 0);
    i64 r = unit.row - warp_of() + of;
    __syncthreads();
    if (r >= p.rows) continue;
    Row row = locate(p, r);
#pragma unroll 2
    for (int i = (int)threadIdx.x / W; i < n; i += WARP) {
      i64 k = (i64)unit.chunk * CHUNK + i;
      if (all.term) write_number(p.value.dtype, row.value + k * p.value.stride, (double)theirs.extra[i]);
      if (all.dx) *(X*)(row.dx + k * p.dx.stride) = theirs.x[i];
      if (all.dy) *(Y*)(row.dy + k * p.dy.stride) = theirs.y[i];
    }
  }
}
#endif

// Rows of at most 128 classes: `count` of them at a time in a warp. They are staged together, summed side by side, and finished
// with one row per lane.
#if defined(KL_NARROW)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) kl_narrow(const Plan p) {
  KL_SHARED_MEMORY(shared);
  const int R = (int)p.count, n = (int)p.n;
  const int some = R * n, SIZE = (some + COLUMNS + 7) / 8 * 8;   // after the rows, an unused one for lanes without a row
  int bytes = SIZE * (int)(sizeof(X) + (HAS_Y ? sizeof(Y) : 0) + (HAS_EXTRA ? sizeof(T) : 0)) + R * MAX_STATS * 8;
  char* mine = shared + warp_of() * bytes;
  double* known = (double*)mine;           // [R][MAX_STATS]: first a row's state, then its stats
  Slot s;
  s.x = (X*)(mine + R * MAX_STATS * 8);
  s.y = (Y*)((char*)s.x + SIZE * sizeof(X));
  s.extra = (T*)((char*)s.y + (HAS_Y ? SIZE * sizeof(Y) : 0));
  for (int i = some + lane_of(); i < SIZE; i += WARP) {
    s.x[i] = Stored<DX>::narrow(T(0));
    if (HAS_Y) s.y[i] = Stored<DY>::narrow(T(0));
  }
  int lanes = 1;
  while (4 * lanes < n) lanes *= 2;
  Narrow at(n, lanes);
  // here the state lies among the stats, which terms out of range need unchanged
  const bool packs = PACKS && !OUT_TERMS && p.last > 1 && !p.stats;
  const int side_by_side = WARP / lanes;
  i64 groups = (p.rows + R - 1) / R;
  for (i64 g = (i64)blockIdx.x * warps_of() + warp_of(); g < groups; g += (i64)gridDim.x * warps_of()) {
    i64 r0 = g * R;
    int rows = p.rows - r0 < R ? (int)(p.rows - r0) : R;
    Row first = locate(p, r0);
    __syncwarp();
    if (p.dense) {
      stage(s.x, first.x, sizeof(X), rows * n);
      if constexpr (HAS_Y) stage(s.y, first.y, sizeof(Y), rows * n);
      arrived();
    } else {
#pragma unroll 1
      for (int e = lane_of(); e < rows * n; e += WARP) {
        int r = p.columns ? e % rows : e / n, i = p.columns ? e / rows : e % n;
        Row row = locate(p, r0 + r);
        if (row.weight == 0) continue;
        s.x[r * n + i] = *(const X*)(row.x + i * p.x.stride);
        if constexpr (HAS_Y) s.y[r * n + i] = *(const Y*)(row.y + i * p.y.stride);
      }
    }
    __syncwarp();

    Want all = {};
#pragma unroll 1
    for (int sweep = (int)p.first; sweep < (int)p.last; sweep++) {
      Want every = wanted(p, sweep, 1.0);
      all.term |= every.term;
      all.dx |= every.dx;
      all.dy |= every.dy;
#pragma unroll 1
      for (int r = lane_of() / lanes; r - lane_of() / lanes < rows; r += side_by_side) {
        bool is_row = r < rows;
        double weight = is_row ? weight_of(p, r0 + r) : 0.0;
        bool live = is_row && weight != 0;
        int offset = live ? r * n : some;
        Slot row = {s.x + offset, s.y + offset, s.extra + offset, nullptr};
        if (FACTORS && live) row = with_factors(p, row, r0 + r, 0);
        Want want = wanted(p, sweep, weight);
        Narrow here = at;
        if (!live) {
          want = Want{};
          here.n = 0;
        }
        double* mine = known + (live ? r : 0) * MAX_STATS;
        Local local = {mine, mine + 1, 1, packs, inverse_temperature(p, r0 + (is_row ? r : 0))};
        chunk(p, here, row, sweep, local, want, InPlace{row}, mine, p.last > 1, NeverAgain{});
      }
      __syncwarp();
      if (states_of(sweep) == 0) continue;
#pragma unroll 1
      for (int r = lane_of(); r < rows; r += WARP) {
        double* row = known + r * MAX_STATS;
        double it = inverse_temperature(p, r0 + r);
        finish(p, it, sweep, row, row);
        if (packs) pack(row, row + 1, 1, it);
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int r = lane_of(); r < rows; r += WARP) {
      if (!p.weights.data && factor_of(p) != 0 && !p.stats && !(!OUT_TERMS && p.value.data)) break;
      Row row = locate(p, r0 + r);
      if (!OUT_TERMS && p.value.data) write_value(p, row.value, row.weight, known[r * MAX_STATS + VALUE]);
      if (p.stats)
        for (int k = 0; k < MAX_STATS; k++) p.stats[(r0 + r) * MAX_STATS + k] = known[r * MAX_STATS + k];
      if (row.weight != 0) continue;
#pragma unroll 1
      for (int i = r * n; i < (r + 1) * n; i++) {
        if (all.term) s.extra[i] = T(0);
        if (all.dx) s.x[i] = Stored<DX>::narrow(T(0));
        if (all.dy) s.y[i] = Stored<DY>::narrow(T(0));
      }
    }
    __syncwarp();
    if (p.dense) {
      if (all.dx) unstage(first.dx, sizeof(X), s.x, rows * n);
      if (all.dy) unstage(first.dy, sizeof(Y), s.y, rows * n);
    }
    if ((!p.dense && (all.dx || all.dy)) || all.term)
#pragma unroll 1
      for (int e = lane_of(); e < rows * n; e += WARP) {
        int r = p.columns ? e % rows : e / n, i = p.columns ? e / rows : e % n;
        Row row = locate(p, r0 + r);
        if (all.term) write_number(p.value.dtype, row.value + i * p.value.stride, (double)s.extra[r * n + i]);
        if (!p.dense && all.dx) *(X*)(row.dx + i * p.dx.stride) = s.x[r * n + i];
        if (!p.dense && all.dy) *(Y*)(row.dy + i * p.dy.stride) = s.y[r * n + i];
      }
    __syncwarp();
  }
}
#endif

// Long rows: one block per row, which distributes the chunks over its warps. Their states are merged in shared memory. Rows that
// are swept several times stay there.
#if defined(KL_ROWS)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) kl_rows(const Plan p) {
  KL_SHARED_MEMORY(shared);
  const int W = warps_of(), chunks = (int)p.chunks, slots = (int)p.slots;
  double* states = (double*)(shared + W * warp_bytes(p));   // [k * chunks + chunk]
  double* stats = states + MAX_STATES * chunks;
  for (i64 r = blockIdx.x; r < p.rows; r += gridDim.x) {
    bool live = weight_of(p, r) != 0;
    Row row = locate(p, r);
    bool direct = live && is_direct(p, row);
    if (live && !ONCE) {
#pragma unroll 1
      for (int c = warp_of(), j = 0; c < chunks; c += W, j++) stage_chunk(p, locate(p, r), c, slot_of(p, shared, j));
      arrived();
      __syncwarp();
#pragma unroll 1
      for (int c = warp_of(), j = 0; c < chunks; c += W, j++) pad(slot_of(p, shared, j), classes(p, c));
      __syncwarp();
    }
#pragma unroll 1
    for (int sweep = 0; sweep < (ONCE ? 1 : (int)p.last); sweep++) {
      Want want = wanted(p, sweep, weight_of(p, r));
#pragma unroll 1
      for (int c = warp_of(), j = 0; c < chunks; c += W, j++) {
        int n = classes(p, c);
        if constexpr (DIRECT)
          if (direct && n == CHUNK) {
            double sum = chunk_direct(p, row, c, want);
            if (lane_of() == 0) states[c] = sum;
            continue;
          }
        Slot s = slot_of(p, shared, ONCE ? 0 : j);
        if (live && ONCE) {
          stage_chunk(p, locate(p, r), c, s);
          arrived();
          __syncwarp();
          pad(s, n);
          __syncwarp();
        }
        if (live) {
          double* state = stats_of(p, shared);
          Local local = {stats, states + c, chunks, PACKS, inverse_temperature(p, r)};
          chunk(p, Wide(n), with_factors(p, s, r, c), sweep, local, want, InPlace{s}, state, !ONCE,
                [&] { stage_again(p, {again(r), c}, s); });
          __syncwarp();
          if (lane_of() < states_of(sweep)) states[lane_of() * chunks + c] = state[lane_of()];
          __syncwarp();
        } else {
          put_zeros(s, want, n);
        }
        if (want.term || want.dx || want.dy) store_outputs(p, locate(p, again(r)), (i64)c * CHUNK, n, s, want);
        __syncwarp();
      }
      if (states_of(sweep) == 0) continue;
      __syncthreads();
      // where warps exchange sums: the `extra` of the first one, which is free between sweeps
      const auto who = folders(W, chunks, HAS_EXTRA ? shared + slots * SLOT_BYTES : (char*)(stats + MAX_STATS));
      if (warp_of() < who.warps && weight_of(p, again(r)) != 0) {
        double state[MAX_STATES];
        double it = inverse_temperature(p, again(r));
        fold(p, it, sweep, who, States{states, chunks, chunks}, state);
        if (threadIdx.x == 0) {
          finish(p, it, sweep, state, stats);
          if (p.stats && sweep + 1 == (int)p.last)
            for (int k = 0; k < MAX_STATS; k++) p.stats[r * MAX_STATS + k] = stats[k];
        }
        if (PACKS && warp_of() == 0) {
          __syncwarp();
          pack_all(p, it, stats, states);
        }
      }
      __syncthreads();
    }
    if (threadIdx.x == 0 && !OUT_TERMS && p.value.data) write_value(p, locate(p, r).value, weight_of(p, r), stats[VALUE]);
  }
}
#endif

// Merges every 1024 states of each row, those of its `count` chunks or groups of chunks, into one. The results lie in `sums` as the
// states did in `states`; without `sums`, the last one finishes the row.
#if defined(KL_FOLD)
extern "C" __global__ void __launch_bounds__(256, 2) kl_fold(const Plan p) {
  int sweep = (int)p.first, K = states_of(sweep);
  for (i64 item = (i64)blockIdx.x * warps_of() + warp_of(); item < p.rows * p.groups;
       item += (i64)gridDim.x * warps_of()) {
    i64 r = item / p.groups, g = item % p.groups, left = p.count - g * CHUNK;
    Row row = locate(p, r);
    double state[MAX_STATES] = {0};   // 0 for a side that needs no norm
    if (row.weight != 0)
      fold(p, row.inverse_temperature, sweep, Alone{}, States{p.states + r * K * p.count + g * CHUNK, p.count, left < CHUNK ? (int)left : CHUNK}, state);
    double* stats = p.stats + r * MAX_STATS;
    if (lane_of() == 0 && p.sums && row.weight != 0)
#pragma unroll
      for (int k = 0; k < MAX_STATES; k++)
        if (k < K) p.sums[(r * K + k) * p.groups + g] = state[k];
    if (p.sums) continue;
    if (lane_of() == 0) {
      if (row.weight != 0) finish(p, row.inverse_temperature, sweep, state, stats);
      if (sweep == VALUE_SWEEP && p.output != TERMS && p.value.data) write_value(p, row.value, row.weight, stats[VALUE]);
    }
    if (PACKS && p.packed && row.weight != 0) {
      __syncwarp();
      pack_all(p, row.inverse_temperature, stats, p.states + r * K * p.chunks);
    }
  }
}
#endif

// The sum of `count` doubles in `states`: every 1024 into one, left in `sums`; the last sum, divided, is the value.
#if defined(KL_SUM)
extern "C" __global__ void __launch_bounds__(256) kl_sum(const Plan p) {
  for (i64 g = (i64)blockIdx.x * warps_of() + warp_of(); g < p.groups; g += (i64)gridDim.x * warps_of()) {
    i64 left = p.count - g * CHUNK;
    double total;
    sum_states<1>(left < CHUNK ? (int)left : CHUNK, [&](int i, double* v) { v[0] = p.states[g * CHUNK + i]; }, &total);
    if (lane_of() != 0) continue;
    if (!p.value.data) {
      p.sums[g] = total;
    } else {
      double d = p.denominator ? *p.denominator : p.scale;
      write_number(p.value.dtype, p.value.data, d != 0 ? total / d : nan<double>());
    }
  }
}
// The same for the weights, times each of WEIGHT_FACTORS: lines of `groups` sums. The last step chooses the factor whose sum is in
// the middle of the range; sums[0] is then the divisor of a mean with these weights, sums[1] the factor.
extern "C" __global__ void __launch_bounds__(256) kl_weights(const Plan p) {
  const double factors[] = {1, 0x1p-600, 0x1p600};   // WEIGHT_FACTORS in klcore/backends/rows.py
  for (i64 g = (i64)blockIdx.x * warps_of() + warp_of(); g < p.groups; g += (i64)gridDim.x * warps_of()) {
    i64 left = p.count - g * CHUNK;
    double total[3];
    sum_states<3>(left < CHUNK ? (int)left : CHUNK, [&](int i, double* v) {
      double w = p.weights.data ? locate(p, g * CHUNK + i).weight : 0.0;
#pragma unroll
      for (int k = 0; k < 3; k++) v[k] = p.weights.data ? w * factors[k] : p.states[k * p.count + g * CHUNK + i];
    }, total);
    if (lane_of() != 0) continue;
    if (p.groups > 1) {
#pragma unroll
      for (int k = 0; k < 3; k++) p.sums[k * p.groups + g] = total[k];
    } else {
      double sum = total[0], factor = factors[0];
      if (total[0] > 0x1p500) sum = total[1], factor = factors[1];
      if (total[0] > 0 && total[0] < 0x1p-500) sum = total[2], factor = factors[2];
      double given = p.denominator ? *p.denominator : p.scale;
      p.sums[0] = p.denominator || given == given ? given * factor : sum;
      p.sums[1] = factor;
    }
  }
}
#endif

// The gradient of an operand that is broadcast over `inner` rows: every 1024 of them are summed, row by row, in double, into
// sums[(operand's row * groups + group) * n + class];
#if defined(KL_SUMMED)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS < 4 ? BLOCKS : 4) kl_summed(const Plan p) {
  KL_SHARED_MEMORY(shared);
  int bytes = SLOT_BYTES + CHUNK * (int)sizeof(T) + CHUNK * 8;
  char* at = shared + warp_of() * bytes;
  double* sums = (double*)at;
  Slot s = {(X*)(at + CHUNK * 8), (Y*)(at + CHUNK * (8 + sizeof(X))), (T*)(at + CHUNK * 8 + SLOT_BYTES), nullptr};
  int sweep = (int)p.first;
  i64 items = p.rows / p.inner * p.groups * p.chunks;
  for (i64 item = (i64)blockIdx.x * warps_of() + warp_of(); item < items; item += (i64)gridDim.x * warps_of()) {
    i64 c = item % p.chunks, g = item / p.chunks % p.groups, outer = item / p.chunks / p.groups;
    int n = classes(p, c);
    i64 end = (g + 1) * CHUNK < p.inner ? (g + 1) * CHUNK : p.inner;
#pragma unroll 1
    for (int i = lane_of(); i < CHUNK; i += WARP) sums[i] = 0.0;
    for (i64 i = g * CHUNK; i < end; i++) {
      i64 r = outer * p.inner + i;
      Row row = locate(p, r);
      if (row.weight == 0) continue;
      __syncwarp();
      stage_chunk(p, row, c, s);
      arrived();
      __syncwarp();
      pad(s, n);
      __syncwarp();
      Want want = wanted(p, sweep, row.weight);
      want.term = false;
      double* state = (double*)s.extra;   // the chunk's state was not kept: it is computed again
      if constexpr (OF_LOGITS) spread_chunk(Wide(n), s, row.inverse_temperature, false, NeverAgain{}, state);
      __syncwarp();
      chunk(p, Wide(n), with_factors(p, s, r, c), sweep, Local{p.stats + r * MAX_STATS, state, 1, false, row.inverse_temperature}, want,
            Added{sums}, state, false, NeverAgain{});
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane_of(); i < n; i += WARP) p.sums[(outer * p.groups + g) * p.n + c * CHUNK + i] = sums[i];
    __syncwarp();
  }
}
// then the groups in order.
extern "C" __global__ void __launch_bounds__(256) kl_summed_fold(const Plan p) {
  i64 all = p.rows / p.inner * p.n;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < all; e += (i64)gridDim.x * blockDim.x) {
    i64 outer = e / p.n, i = e % p.n;
    double sum = 0.0;
#pragma unroll 4
    for (i64 g = 0; g < p.groups; g++) sum += p.sums[(outer * p.groups + g) * p.n + i];
    Row row = locate(p, outer * p.inner);
    if (p.dx.data) *(X*)(row.dx + i * p.dx.stride) = Stored<DX>::narrow(sum);
    else *(Y*)(row.dy + i * p.dy.stride) = Stored<DY>::narrow(sum);
  }
}
#endif
