// All of klcore's mathematics: elementary functions, the terms of every divergence, and their derivatives. Compiled by the
// C++ compiler (through kl_rows.h) and by NVRTC (ahead of kl_cuda.cu). Includes nothing. The derivations are in docs/maths.md.
// Uses only IEEE + - * /, fma and sqrt, in a fixed order, so that every processor computes the same bits: compile without
// contraction and without fast-math. There are no branches, so that compilers can vectorise: each special case is a select on
// a single comparison, and where several apply the last one wins.
#pragma once

#if defined(__CUDACC__)
#define KL_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define KL_FN __forceinline
#else
#define KL_FN inline __attribute__((always_inline))
#endif

namespace kl {

// ---- the two number types -------------------------------------------------------------------------------------------
template <typename T> struct Real;

template <> struct Real<float> {
  typedef unsigned int Bits;
  static constexpr int mantissa = 23;                   // explicit bits
  static constexpr Bits one = 0x3f800000u;              // bits of 1
  static constexpr Bits sign = 0x80000000u;             // also 256 octaves: the offset that makes an octave count positive
  static constexpr Bits octaves = 0xff800000u;          // all but the mantissa
  static constexpr Bits half_octave = 0x00400000u;
  static constexpr Bits two_mantissa = 0x4b000000u;     // bits of 2^23
  static constexpr float octave_offset = 8388864.f;     // 2^23 + 256
  static constexpr float round = 12582912.f;            // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float log2e = 0x1.715476p+0f, ln2 = 0x1.62e430p-1f;
  static constexpr float ln2_hi = 0x1.62e400p-1f, ln2_lo = 0x1.7f7d1cp-20f;  // ln2_hi * integer is exact up to 2^9
  static constexpr float tiny = 0x1p-64f, up = 0x1p64f, down = 0x1p-64f;     // below tiny, scale before taking bits apart
  static constexpr float huge = 0x1p60f;                                     // quotients of numbers in between are normal
  static constexpr float scale_octaves = 64.f;
  static constexpr float exp_max = 89.f, exp_min = -104.f;                   // beyond these e^x is infinite, or zero
  static constexpr float exp_far = 200.f;                                    // beyond this m e^x is infinite, or zero, for every m
  static constexpr float exp_ordinary = 88.f;
  static constexpr float flush = -86.5f;                                     // exp_flushed is zero below
  static constexpr float expm1_overflow = 0x1.62e42ep+6f;                    // largest x with finite expm1
  static constexpr float expm1_is_minus_one = -18.f;                         // expm1 is -1 to within half an ulp below
  static constexpr float eps = 0x1p-23f;
  static constexpr float far = 32.f;   // e^-far (1 + far) is below the rounding error of the result, float or
                                       // double; beyond, the rounding error of t itself would show in e^t
};

template <> struct Real<double> {
  typedef unsigned long long Bits;
  static constexpr int mantissa = 52;
  static constexpr Bits one = 0x3ff0000000000000ull;
  static constexpr Bits sign = 0x8000000000000000ull;   // also 2048 octaves
  static constexpr Bits octaves = 0xfff0000000000000ull;
  static constexpr Bits half_octave = 0x0008000000000000ull;
  static constexpr Bits two_mantissa = 0x4330000000000000ull;
  static constexpr double octave_offset = 4503599627372544.;   // 2^52 + 2048
  static constexpr double round = 6755399441055744.;           // 1.5 * 2^52
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2 = 0x1.62e42fefa39efp-1;
  static constexpr double ln2_hi = 0x1.62e42fefa3800p-1, ln2_lo = 0x1.ef35793c76730p-45;  // exact up to 2^11
  static constexpr double tiny = 0x1p-512, up = 0x1p512, down = 0x1p-512;
  static constexpr double huge = 0x1p508;
  static constexpr double scale_octaves = 512.;
  static constexpr double exp_max = 710., exp_min = -746.;
  static constexpr double exp_far = 1460.;
  static constexpr double exp_ordinary = 709.;
  static constexpr double flush = -707.;
  static constexpr double expm1_overflow = 0x1.62e42fefa39efp+9;
  static constexpr double expm1_is_minus_one = -38.;
  static constexpr double eps = 0x1p-52;
  static constexpr double far = 64.;
};

#if defined(__CUDA_ARCH__)
KL_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KL_FN double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
KL_FN float sqrt(float x) { return __fsqrt_rn(x); }
KL_FN double sqrt(double x) { return __dsqrt_rn(x); }
KL_FN unsigned int bits(float x) { return __float_as_uint(x); }
KL_FN unsigned long long bits(double x) { return (unsigned long long)__double_as_longlong(x); }
KL_FN float real(unsigned int b) { return __uint_as_float(b); }
KL_FN double real(unsigned long long b) { return __longlong_as_double((long long)b); }
KL_FN float hardware_exp2(float x) {   // error at most 2 ulp; zero below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KL_FN float hardware_reciprocal(float x) {   // error at most 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
#if defined(_MSC_VER) && !defined(__clang__)
KL_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
KL_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
KL_FN float sqrt(float x) { return ::sqrtf(x); }
KL_FN double sqrt(double x) { return ::sqrt(x); }
#define KL_COPY memcpy
#else
KL_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
KL_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
KL_FN float sqrt(float x) { return __builtin_sqrtf(x); }
KL_FN double sqrt(double x) { return __builtin_sqrt(x); }
#define KL_COPY __builtin_memcpy
#endif
KL_FN unsigned int bits(float x) { unsigned int b; KL_COPY(&b, &x, 4); return b; }
KL_FN unsigned long long bits(double x) { unsigned long long b; KL_COPY(&b, &x, 8); return b; }
KL_FN float real(unsigned int b) { float x; KL_COPY(&x, &b, 4); return x; }
KL_FN double real(unsigned long long b) { double x; KL_COPY(&x, &b, 8); return x; }
#undef KL_COPY
#endif

// a/b. Ordinary: b and the quotient, unless it is 0, are far from the ends of the range.
template <bool ALL = true, typename T> KL_FN T quotient(T a, T b) {
#if defined(__CUDA_ARCH__) || defined(KL_EMULATOR)   // the code NVRTC generates for a/b, without the check of that range
  if constexpr (!ALL && sizeof(T) == sizeof(float)) {
    T r = hardware_reciprocal(b);
#if defined(KL_FAST16)
    return a * r;
#endif
    r = fma(fma(-b, r, 1.f), r, r);
    T q = a * r;
    q = fma(fma(-b, q, a), r, q);
    return fma(fma(-b, q, a), r, q);
  }
#endif
  return a / b;
}

template <typename T> KL_FN T infinity() { return real(Real<T>::octaves & ~Real<T>::sign); }
template <typename T> KL_FN T nan() { return real((Real<T>::octaves & ~Real<T>::sign) | Real<T>::half_octave); }
template <typename T> KL_FN T absolute(T x) { return real(bits(x) & ~Real<T>::sign); }

template <typename T> KL_FN T horner(T, T c) { return c; }
template <typename T, typename... C> KL_FN T horner(T x, T c, C... rest) { return fma(horner(x, rest...), x, c); }

// ---- polynomials (docs/minimax.py prints them with their errors) ------------------------------------------------------
// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2, relative error 2^-26.5 and 2^-57.5
KL_FN float exp_tail(float r) {
  return horner(r, 0x1.000000p-1f, 0x1.555556p-3f, 0x1.5554e8p-5f, 0x1.1110e0p-7f, 0x1.6d434ep-10f, 0x1.a12516p-13f);
}
KL_FN double exp_tail(double r) {
  return horner(r, 0x1.0000000000000p-1, 0x1.5555555555557p-3, 0x1.5555555555556p-5, 0x1.11111111100d3p-7,
                0x1.6c16c16c162cfp-10, 0x1.a01a01abeccc3p-13, 0x1.a01a01a6db488p-16, 0x1.71de02225a2f3p-19,
                0x1.27e4db5bb725ap-22, 0x1.af4e092e1705bp-26, 0x1.1f7315649f2d7p-29);
}
// 2 atanh(s)/s - 2 with w = s^2 <= 0.04, error against 2 atanh(s)/s 2^-30 and 2^-60
KL_FN float atanh_tail(float w) {
  return w * horner(w, 0x1.555556p-1f, 0x1.999a6ep-2f, 0x1.242bd4p-2f, 0x1.e68266p-3f);
}
KL_FN double atanh_tail(double w) {
  return w * horner(w, 0x1.5555555555555p-1, 0x1.9999999999f4ap-2, 0x1.24924923d8d53p-2, 0x1.c71c72e6a0bf3p-3,
                    0x1.745caa083f891p-3, 0x1.3b2a29705fb2cp-3, 0x1.0e857c4765545p-3, 0x1.16d0d0a09926bp-3);
}
// (2 atanh(s)/s - 2 - 2/3 w) / w^2 with w = s^2 <= 0.0108, relative error 2^-25.4
KL_FN float atanh_rest(float w) { return horner(w, 0x1.99999ap-2f, 0x1.248f1ep-2f, 0x1.cd34bep-3f); }

// ---- exponentials -----------------------------------------------------------------------------------------------------
// x = n ln 2 + r, |r| <= ln(2)/2; the low bits of `k` hold n
template <typename T> struct Octave { T k, n, r; };
template <typename T> KL_FN Octave<T> octave(T x) {
  typedef Real<T> R;
  T k = fma(x, R::log2e, R::round), n = k - R::round;
  return {k, n, fma(n, -R::ln2_lo, fma(n, -R::ln2_hi, x))};
}
// 2^n for -(bias-1) <= n <= bias
template <typename T> KL_FN T power_of_two(T k) { return real((bits(k) << Real<T>::mantissa) + Real<T>::one); }

// ALL = false: the caller guarantees that the arguments are ordinary. The steps for the rest of the domain are then omitted;
// the bits are the same.

// An unevaluated sum of two numbers, `low` being tiny compared with `value`
template <typename T> struct Pair { T value, low; };
template <typename T> KL_FN Octave<T> octave(const Pair<T>& x) {
  Octave<T> o = octave(x.value);
  o.r = o.r + x.low;
  return o;
}

// e^(r + n ln 2) for an ordinary octave
template <typename T> KL_FN T exp_of(const Octave<T>& o) {
  T y = fma(o.r * o.r, exp_tail(o.r), o.r) + T(1);
  return real(bits(y) + (bits(o.k) << Real<T>::mantissa));
}

// e^x; ordinary: flush < x < exp_ordinary
template <bool ALL = true, typename T> KL_FN T exp(T x) {
  typedef Real<T> R;
  if constexpr (!ALL) {
#if defined(KL_FAST16)   // two 16-bit inputs on the GPU: the polynomials would take longer than memory
    if constexpr (sizeof(T) == sizeof(float)) return hardware_exp2(x * R::log2e);
#endif
    return exp_of(octave(x));
  }
  x = x > R::exp_max ? R::exp_max : x;
  x = x < R::exp_min ? R::exp_min : x;
  Octave<T> o = octave(x);
  T y = fma(o.r * o.r, exp_tail(o.r), o.r) + T(1);
  T half = fma(o.n, T(0.5), R::round);      // two factors, so that only the last product rounds when the result is subnormal
  T rest = (o.n - (half - R::round)) + R::round;
  return (y * power_of_two(half)) * power_of_two(rest);
}

// m e^x, with one rounding more than e^x. It may be in range where e^x is subnormal, infinite or zero; elsewhere it is one product.
template <typename T> KL_FN T times_exp(T m, const Octave<T>& o, T x) {   // o: the octave of not_too_far(x)
  typedef Real<T> R;
  T y = fma(o.r * o.r, exp_tail(o.r), o.r) + T(1);
  T third = fma(o.n, T(1) / T(3), R::round), n = third - R::round, p = power_of_two(third);
  T v = y * p;
  v = ((v * m) * p) * power_of_two(((o.n - n) - n) + R::round);
  v = x < -R::exp_far ? T(0) : v;
  T e = exp_of(o);
  return (x > R::flush) & (x < R::exp_ordinary) ? m * e : v;
}
template <typename T> KL_FN T not_too_far(T x) {
  T c = x > Real<T>::exp_far ? Real<T>::exp_far : x;
  return c < -Real<T>::exp_far ? -Real<T>::exp_far : c;
}
template <typename T> KL_FN T times_exp(T m, T x) { return times_exp(m, octave(not_too_far(x)), x); }
template <typename T> KL_FN T times_exp(T m, const Pair<T>& x) {
  return times_exp(m, octave(Pair<T>{not_too_far(x.value), x.low}), x.value);
}

// e^x for x <= 0, zero below 2^-124 (double: 2^-1020): softmax weights, the largest of which is 1. Not for NaN.
template <typename T> KL_FN T exp_flushed(T x) {
  T y = exp<false>(x);
  return x < Real<T>::flush ? T(0) : y;
}
template <typename T> KL_FN T exp_flushed(const Pair<T>& x) {
  T y = exp_of(octave(x));
  return x.value < Real<T>::flush ? T(0) : y;
}

// e^x - 1 = 2 (2^(n-1) y + 2^(n-1) - 1/2) with y = e^r - 1; 2^n itself may overflow where the result does not
template <typename T> KL_FN T expm1(T x) {
  typedef Real<T> R;
  T c = x > R::exp_max ? R::exp_max : x;
  c = c < T(-60) ? T(-60) : c;
  Octave<T> o = octave(c);
  T high = fma(o.n, -R::ln2_hi, c), low = fma(o.n, -R::ln2_lo, high - o.r);   // the rounding error of r = high - n ln2_lo
  T h = fma(o.r * o.r, exp_tail(o.r), fma(low, o.r, low)), y = o.r + h;
  T s = power_of_two(o.k - T(1));
  bool large = o.n > T(R::mantissa + 1);    // s - 1/2 would round: subtract the 1 from the other factor
  T small = power_of_two(R::round - (o.n < T(100) ? o.n : T(100)));
  T z = fma(s, large ? y - small : y, large ? s : s - T(0.5));
  z = (o.n == T(1)) & (o.r < T(-0.25)) ? (T(0.5) + o.r) + h : z;   // 1/2 + y would double the rounding error of y
  z = o.n == T(0) ? y : z + z;
  z = x == T(0) ? x : z;                    // keeps the sign of zero
  return x > R::expm1_overflow ? infinity<T>() : z;
}

template <typename T> KL_FN T expm1_minus_of(const Octave<T>& o) {
  T h = (o.r * o.r) * exp_tail(o.r), s = power_of_two(o.k);
  return fma(s - T(1), T(1) + o.r, fma(s, h, o.n * -Real<T>::ln2));
}
#if defined(KL_FAST16)
KL_FN float expm1_minus_near(float t) {   // e^t - 1 - t for |t| <= 1/2, relative error 2^-20.1
  return (t * t) * horner(t, 0x1.000000p-1f, 0x1.55534ap-3f, 0x1.555450p-5f, 0x1.131b00p-7f, 0x1.6e2054p-10f);
}
KL_FN float expm1_fast(float t) {   // e^t - 1
  float apart = hardware_exp2(t * Real<float>::log2e) - 1.f, near = t + expm1_minus_near(t);
  return absolute(t) < 0.5f ? near : apart;
}
#endif
// e^t - 1 - t >= 0 for t <= far, without cancellation near 0; ordinary: |t| < far
template <bool ALL = true, typename T> KL_FN T expm1_minus(T t) {
#if defined(KL_FAST16)
  if constexpr (sizeof(T) == sizeof(float)) {
    T apart = (hardware_exp2(t * Real<T>::log2e) - T(1)) - t, near = expm1_minus_near(t);
    return absolute(t) < T(0.5) ? near : apart;
  }
#endif
  T g = expm1_minus_of(octave(t));
  return ALL & (t < T(-64)) ? T(-1) - t : g;   // below every ordinary t
}
template <typename T> KL_FN T expm1_minus(const Pair<T>& t) { return expm1_minus_of(octave(t)); }   // ordinary
// e^t - 1 from g = e^t - 1 - t, with an error of a few eps
template <typename T> KL_FN T expm1_of(T t, T g) {
  T e = g + t;
  return t < Real<T>::expm1_is_minus_one ? T(-1) : e;
}

// ---- logarithms -------------------------------------------------------------------------------------------------------
// y/x = 2^k (1+s)/(1-s) with |s| <= 0.2. `from` and `to` are x and y scaled to the same octave; their difference is exact.
// Ordinary: x and y lie between tiny and huge.
template <typename T> struct Ratio { T from, to, k; };
template <bool ALL = true, typename T> KL_FN Ratio<T> ratio(T x, T y) {
  typedef Real<T> R;
  bool sx = ALL & (x < R::tiny), sy = ALL & (y < R::tiny), hx = ALL & (x >= R::huge);
  T xn = sx ? x * R::up : x, yn = sy ? y * R::up : y;
  xn = hx ? x * R::down : xn;                // from + to is finite
  xn = ALL & (x == T(0)) ? T(1) : xn;        // the caller handles zero, whose bits would be taken for those of a
  yn = ALL & (y == T(0)) ? T(1) : yn;        // subnormal number, and these are slow
  typename R::Bits o = bits(yn) - bits(xn) + (R::half_octave + R::sign);
  T k = real((o >> R::mantissa) | R::two_mantissa) - R::octave_offset;
  T to = real(bits(yn) + R::sign - (o & R::octaves));
  k = sx ? k + R::scale_octaves : k;
  k = sy ? k - R::scale_octaves : k;
  k = hx ? k - R::scale_octaves : k;
  return {xn, to, k};
}

// For positive finite x and y: `value` is log(y/x), and `deviance` is x log(x/y) - x + y >= 0, computed as x*(d - log1p(d))
// with d = (y-x)/x.
template <typename T> struct LogRatio { T value, deviance; };
template <bool ALL = true, typename T> KL_FN LogRatio<T> log_ratio(T x, T y) {
  typedef Real<T> R;
  Ratio<T> q = ratio<ALL>(x, y);
  T d = q.to - q.from, s = quotient<ALL>(d, q.to + q.from), t = atanh_tail(s * s);
  T value = fma(q.k, R::ln2, fma(s, t, s + s));
  T near = s * fma(-q.from, t, d);          // same octave: Loader's form, no cancellation
  near = ALL & (x < R::tiny) ? near * R::down : near;
  near = ALL & (x >= R::huge) ? near * R::up : near;
  T deviance = q.k == T(0) ? near : fma(-x, value, y - x);
  bool infinite = ALL & (y == infinity<T>());
  return {infinite ? y - x : value, infinite ? y - x : deviance};
}

// e^x/m for m > 0, wherever the quotient is in range
template <typename T> KL_FN T exp_over(const Octave<T>& o, T x, T m) {   // o: the octave of not_too_far(x)
  typedef Real<T> R;
  Ratio<T> q = ratio(T(1), m);
  T v = (fma(o.r * o.r, exp_tail(o.r), o.r) + T(1)) / q.to, n = o.n - q.k;   // e^x/m = 2^n v
  n = n > R::exp_far ? R::exp_far : n;
  n = n < -R::exp_far ? -R::exp_far : n;
  T third = fma(n, T(1) / T(3), R::round), t = third - R::round, p = power_of_two(third);
  v = ((v * p) * p) * power_of_two(((n - t) - t) + R::round);
  v = m == infinity<T>() ? T(0) : v;
  return x < -R::exp_far ? T(0) : v;
}
template <typename T> KL_FN T exp_over(T x, T m) { return exp_over(octave(not_too_far(x)), x, m); }
template <typename T> KL_FN T exp_over(const Pair<T>& x, T m) {
  return exp_over(octave(Pair<T>{not_too_far(x.value), x.low}), x.value, m);
}

// log(1 + f) + k ln 2 for f = to - 1, with `low` the part of f that `to` could not hold
template <typename T> KL_FN T log_of(T to, T low, T k) {
  typedef Real<T> R;
  T f = (to - T(1)) + low, s = f / (T(2) + f), t = atanh_tail(s * s);
  T y = f - s * (f - t);
  T z = fma(k, R::ln2_hi, fma(k, R::ln2_lo, -(s * (f - t))) + f);
  return k == T(0) ? y : z;
}

template <typename T> KL_FN T log(T x) {
  Ratio<T> q = ratio(T(1), x);
  T y = log_of(q.to, T(0), q.k);
  y = x == infinity<T>() ? x : y;
  y = x == T(0) ? -infinity<T>() : y;
  return x >= T(0) ? y : nan<T>();
}

// y - log x for x > 0. In float the error is 2 eps of the result, or 2^-38 where the result is small; rounding log x to float
// first would lose most of a small result. So log x is subtracted in parts, the largest first, and where these nearly cancel
// every difference is exact (Sterbenz). The parts are k log 2, plus log(4/3) if x is scaled by 3/4; then 2 atanh(s) =
// 2 s + 2/3 s^3 + ...; then the rounding errors of these.
template <bool ALL = true> KL_FN float minus_log(const Pair<float>& y, float x) {
  typedef Real<float> R;
  constexpr float two_thirds = 0x1.555556p-1f, two_thirds_lo = -0x1.555556p-26f;
  Ratio<float> q = ratio<ALL>(1.125f, x);                     // `to` in [13/16, 13/8)
  bool high = q.to >= 1.2f;
  float f = fma(high ? 0.75f : 1.f, q.to, -1.f);              // in [-3/16, 7/32), exact
  float top = fma(q.k, R::ln2_hi, high ? 0x1.2696p-2f : 0.f);   // exact
  float low = fma(q.k, R::ln2_lo, high ? 0x1.089a6ep-21f : 0.f);
  float r = quotient<false>(1.f, 2.f + f), s = f * r, s2 = s + s;
  float e = fma(-s, f, f - s2) * (r + r);                     // 2 f/(2 + f) - 2 s
  float w = s * s, c = w * s, v = c * two_thirds;
  float w_low = fma(s, s, -w), c_low = fma(w_low, s, fma(w, s, -c));
  float tail = fma(c, fma(w, atanh_rest(w), two_thirds_lo), fma(c_low, two_thirds, fma(c, two_thirds, -v)));
  float h = s2 + v, h_low = v - (h - s2);
  low = (low + h_low) + (tail + fma(e, fma(w, w, w), e));     // d 2 atanh(s) = 2 ds/(1 - w)
  float d = ((y.value - top) - h) - (low - y.low);
  if constexpr (!ALL) return d;
  d = x == infinity<float>() ? y.value - x : d;
  return x == 0.f ? y.value + infinity<float>() : d;
}
template <bool ALL = true> KL_FN float minus_log(float y, float x) { return minus_log<ALL>(Pair<float>{y, 0.f}, x); }
template <bool ALL = true> KL_FN double minus_log(double y, double x) { return y - log(x); }

template <typename T> KL_FN T log1p(T x) {
  typedef Real<T> R;
  T u = T(1) + x, big = absolute(x) > T(1) ? x : T(1), small = absolute(x) > T(1) ? T(1) : x;
  T low = small - (u - big);
  Ratio<T> q = ratio(T(1), u);
  T shrink = fma(q.k, T(-0.5), R::round);   // 2^-k as two factors, either of which may be tiny
  T rest = (-q.k - (shrink - R::round)) + R::round;
  low = (low * power_of_two(shrink)) * power_of_two(rest);
  T y = log_of(q.to, low, q.k);
  y = x == infinity<T>() ? x : y;
  y = x == T(-1) ? -infinity<T>() : y;
  y = x == T(0) ? x : y;                    // keeps the sign of zero
  return x >= T(-1) ? y : nan<T>();
}

// ---- the terms ----------------------------------------------------------------------------------------------------------
// The space of an argument. Logits reach a term as log-probabilities, which kl_rows.h and kl_cuda.cu compute from them.
enum Space { PROBS = 0, LOG_PROBS = 1, LOGITS = 2, COUNTS = 3 };
KL_FN constexpr bool is_unnormalised(int space) { return space >= LOGITS; }

// How rows of logits are computed. BY_TERM: term by term, after the softmax. BY_RATIO, BY_COST: by a form of kl_logits.h that
// needs no softmax, from the ratio of the two rows (Spread) or from the cost of each class (Cross). BY_CLASS: from each
// class's p, q and their ratio, which follow from Spread (kl_family.h).
enum Form { BY_TERM, BY_RATIO, BY_COST, BY_CLASS };

// All operations, with name, form and number of arguments. klcore's own accept any spaces; the others are the losses of other
// systems and the per-token estimators. klcore.operations reads this list, and switches over operations are generated from it.
#define KL_FAMILY(ROW) \
  ROW(JS_DIV, BY_CLASS, 2) ROW(MIXED_KL_DIV, BY_CLASS, 2) ROW(SKEW_KL_DIV, BY_CLASS, 2) ROW(ALPHA_DIV, BY_CLASS, 2) \
  ROW(RENYI_DIV, BY_CLASS, 2) ROW(TV_DIST, BY_CLASS, 2) ROW(SQ_HELLINGER, BY_CLASS, 2) ROW(CHI2_DIV, BY_CLASS, 2)
#define KL_DIVERGENCES(ROW) \
  ROW(KL_DIV, BY_RATIO, 2) ROW(REL_ENTR, BY_RATIO, 2) ROW(CROSS_ENTROPY, BY_COST, 2) ROW(ENTROPY, BY_COST, 1) KL_FAMILY(ROW)
#define KL_LOSSES(ROW) ROW(PYTORCH, BY_TERM, 2) ROW(KERAS, BY_TERM, 2) ROW(MXNET, BY_TERM, 2) ROW(PUZZLELIB, BY_TERM, 2)
#define KL_ESTIMATORS(ROW) ROW(K1, BY_TERM, 2) ROW(K2, BY_TERM, 2) ROW(K3, BY_TERM, 2)
#define KL_OPERATIONS(ROW) KL_DIVERGENCES(ROW) KL_LOSSES(ROW) KL_ESTIMATORS(ROW)

struct OperationRow {
  const char* name;
  Form form;
  int arguments;
};
#define KL_CODE(name, form, arguments) name,
#define KL_ROW(name, form, arguments) {#name, form, arguments},
enum Operation { KL_OPERATIONS(KL_CODE) OPERATION_COUNT };
constexpr OperationRow OPERATIONS[] = {KL_OPERATIONS(KL_ROW)};
KL_FN constexpr int summed(int operation) { return operation == RENYI_DIV ? ALPHA_DIV : operation; }   // whose terms are summed
KL_FN constexpr bool has_y(int operation) { return OPERATIONS[operation].arguments > 1; }

// value, dx and dy of one term, with x and y in the spaces SX and SY. Operations of one argument ignore y.
template <int OP, int SX, int SY> struct Term;

// The properties of a term: whether it has a shorter form for ordinary arguments, and which arguments are ordinary; whether
// its functions take a parameter besides x and y; whether they take t = log q - log p, which `gap` computes; whether x or y is
// an unevaluated pair. Plain holds the defaults.
template <typename T> struct Same { typedef T Type; };
template <typename T> using Given = typename Same<T>::Type;   // a parameter, converted to the type of x and y
struct Plain {
  static constexpr bool has_ordinary = false, takes_parameter = false, has_gap = false, x_is_pair = false, y_is_pair = false;
  template <typename T> static KL_FN bool ordinary(T, T) { return false; }
};
// Whether a term's dy is final even if y holds logits. Otherwise dy is the derivative with respect to log y, and still has to
// go through the softmax.
KL_FN constexpr bool is_final(int operation) { return operation == PUZZLELIB; }

// v, or NaN if either argument is NaN
template <typename T> KL_FN T unless_nan(T x, T y, T v) {
  v = x == x ? v : x;
  return y == y ? v : y;
}

// v, or NaN unless both arguments are >= 0
template <typename T> KL_FN T on_probs(T x, T y, T v) {
  v = x >= T(0) ? v : nan<T>();
  return y >= T(0) ? v : nan<T>();
}
template <typename T> KL_FN T zero_over(T x, T y) {   // -x/y with 0/0 = 0, and -0 treated as 0
  T d = T(0) - x / (y + T(0));
  return x == T(0) ? T(0) : d;
}

template <> struct Term<KL_DIV, PROBS, PROBS> : Plain {
  static constexpr bool has_ordinary = true;
  template <typename T> static KL_FN bool ordinary(T x, T y) {
    return (x >= Real<T>::tiny) & (y >= Real<T>::tiny) & (x < Real<T>::huge) & (y < Real<T>::huge);
  }
  template <bool ALL = true, typename T> static KL_FN T value(T x, T y) {
    T v = log_ratio<ALL>(x, y).deviance;
    if constexpr (!ALL) return v;
    v = y == T(0) ? infinity<T>() : v;
    v = x == T(0) ? y : v;
    return on_probs(x, y, v);
  }
  template <bool ALL = true, typename T> static KL_FN T dx(T x, T y) {   // log(x/y)
    T d = T(0) - log_ratio<ALL>(x, y).value;
    if constexpr (!ALL) return d;
    d = x == T(0) ? -infinity<T>() : d;
    d = y == T(0) ? infinity<T>() : d;
    return on_probs(x, y, d);
  }
  template <bool ALL = true, typename T> static KL_FN T dy(T x, T y) {   // 1 - x/y
    T d = quotient<ALL>(y - x, y);
    if constexpr (!ALL) return d;
    d = y == T(0) ? -infinity<T>() : d;   // for -0 too
    d = (y == infinity<T>()) & (x < y) ? T(1) : d;
    d = x == T(0) ? T(1) : d;
    return on_probs(x, y, d);
  }
};

template <> struct Term<REL_ENTR, PROBS, PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {
    T v = T(0) - x * log_ratio(x, y).value;
    v = y == T(0) ? infinity<T>() : v;
    v = x == T(0) ? T(0) : v;
    return on_probs(x, y, v);
  }
  template <typename T> static KL_FN T dx(T x, T y) {   // log(x/y) + 1
    T d = T(1) - log_ratio(x, y).value;
    d = x == T(0) ? -infinity<T>() : d;
    d = y == T(0) ? infinity<T>() : d;
    return on_probs(x, y, d);
  }
  template <typename T> static KL_FN T dy(T x, T y) { return on_probs(x, y, zero_over(x, y)); }
};

template <> struct Term<CROSS_ENTROPY, PROBS, PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {
    T v = T(0) - x * log(y);
    v = x == T(0) ? T(0) : v;
    return on_probs(x, y, v);
  }
  template <typename T> static KL_FN T dx(T x, T y) { return on_probs(x, y, T(0) - log(y)); }
  template <typename T> static KL_FN T dy(T x, T y) { return on_probs(x, y, zero_over(x, y)); }
};

template <> struct Term<ENTROPY, PROBS, PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T) {
    T v = T(0) - x * log(x);
    return x == T(0) ? T(0) : v;
  }
  template <typename T> static KL_FN T dx(T x, T) { return T(-1) - log(x); }
  template <typename T> static KL_FN T dy(T, T) { return T(0); }
};

// Two log-probabilities; t = log q - log p. A class that x excludes (-inf) has p = 0 and contributes q. Where t > far, only q
// matters.
template <typename T> KL_FN bool excluded(T l) { return l == -infinity<T>(); }

template <typename T> KL_FN bool ordinary_logs(T x, T y) {
  return (absolute(y - x) < Real<T>::far) & (x > Real<T>::flush) & (x < Real<T>::exp_ordinary);
}

template <> struct Term<KL_DIV, LOG_PROBS, LOG_PROBS> : Plain {
  static constexpr bool has_ordinary = true;
  template <typename T> static KL_FN bool ordinary(T x, T y) { return ordinary_logs(x, y); }
  template <bool ALL = true, typename T> static KL_FN T value(T x, T y) {   // p (e^t - 1 - t)
    T t = y - x;
    if constexpr (!ALL) return exp<false>(x) * expm1_minus<false>(t);
    T g = expm1_minus(t), v = times_exp(t > Real<T>::far ? T(1) : g, t > Real<T>::far ? y : x);
    v = excluded(y) ? infinity<T>() : v;
    v = excluded(x) ? exp(y) : v;
    return unless_nan(x, y, v);
  }
  template <bool ALL = true, typename T> static KL_FN T dx(T x, T y) {      // -p t
    T t = y - x;
    if constexpr (!ALL) return T(0) - exp<false>(x) * t;
    T d = T(0) - times_exp(t, x);
    d = excluded(y) ? infinity<T>() : d;
    d = excluded(x) ? T(0) : d;
    return unless_nan(x, y, d);
  }
  template <bool ALL = true, typename T> static KL_FN T dy(T x, T y) {      // q - p
    T t = y - x;
    if constexpr (!ALL) return exp<false>(x) * expm1_of(t, expm1_minus<false>(t));
    T e = expm1_of(t, expm1_minus(t)), d = times_exp(t > Real<T>::far ? T(1) : e, t > Real<T>::far ? y : x);
    d = excluded(x) ? exp(y) : d;
    return unless_nan(x, y, d);
  }
};

template <> struct Term<REL_ENTR, LOG_PROBS, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) { return Term<KL_DIV, LOG_PROBS, LOG_PROBS>::dx(x, y); }
  template <typename T> static KL_FN T dx(T x, T y) {      // p (1 - t)
    T d = times_exp(T(1) - (y - x), x);
    d = excluded(y) ? infinity<T>() : d;
    d = excluded(x) ? T(0) : d;
    return unless_nan(x, y, d);
  }
  template <typename T> static KL_FN T dy(T x, T y) { return unless_nan(x, y, T(0) - exp(x)); }
};

template <> struct Term<CROSS_ENTROPY, LOG_PROBS, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {   // -p log q
    T v = T(0) - times_exp(y, x);
    v = excluded(y) ? infinity<T>() : v;
    v = excluded(x) ? T(0) : v;
    return unless_nan(x, y, v);
  }
  template <typename T> static KL_FN T dx(T x, T y) { return value(x, y); }
  template <typename T> static KL_FN T dy(T x, T y) { return unless_nan(x, y, T(0) - exp(x)); }
};

template <> struct Term<ENTROPY, LOG_PROBS, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T) {     // -p log p
    T v = T(0) - times_exp(x, x);
    return excluded(x) ? T(0) : v;
  }
  template <typename T> static KL_FN T dx(T x, T) {        // -p (1 + log p)
    T d = T(0) - times_exp(T(1) + x, x);
    return excluded(x) ? T(0) : d;
  }
  template <typename T> static KL_FN T dy(T, T) { return T(0); }
};

// A probability and a log-probability: both a number and its logarithm are needed. The space LOGITS stands for
// log-probabilities computed from float logits and stored as Pair<float>, because the normaliser of a row must be more
// accurate than a float. Log-probabilities computed from double logits use LOG_PROBS.
template <typename T> KL_FN T number_of(T x) { return x; }
template <typename T> KL_FN T number_of(const Pair<T>& x) { return x.value; }
template <int S, typename T> KL_FN T prob(T x) {
  if constexpr (S == PROBS) return x;
  else return exp(x);
}
template <int S, typename T> KL_FN T prob(const Pair<T>& x) { return times_exp(T(1), x); }
template <int S, bool ALL = true, typename T> KL_FN T times_prob(T m, T x) {
  if constexpr (S == PROBS) return m * x;
  else if constexpr (ALL) return times_exp(m, x);
  else return m * exp<false>(x);
}
template <int S, bool ALL = true, typename T> KL_FN T times_prob(T m, const Pair<T>& x) {
  if constexpr (ALL) return times_exp(m, x);
  else return m * exp_of(octave(x));
}
template <int S, typename T> KL_FN T log_prob(T x) {
  if constexpr (S == PROBS) return log(x);
  else return x;
}
template <int S, typename X> KL_FN bool excluded(X x) { return number_of(x) == (S == PROBS ? 0.f : -infinity<float>()); }
template <int S, typename X, typename T> KL_FN T unless_undefined(X x, T v) {
  if constexpr (S == PROBS) return x >= T(0) ? v : nan<T>();
  else return number_of(x) == number_of(x) ? v : number_of(x);
}
template <int SX, int SY, typename X, typename Y, typename T> KL_FN T unless_undefined(X x, Y y, T v) {
  return unless_undefined<SY>(y, unless_undefined<SX>(x, v));
}
// t = log q - log p
template <typename T> KL_FN T minus(T y, const Pair<T>& x) { return (y - x.value) - x.low; }
template <typename T> KL_FN T minus(const Pair<T>& y, T x) { return (y.value - x) + y.low; }
template <int SX, int SY, bool ALL = true, typename X, typename Y> KL_FN auto log_gap(X x, Y y) {
  if constexpr (SX == PROBS) return minus_log<ALL>(y, x);
  else if constexpr (SY == PROBS) return -minus_log<ALL>(x, y);
  else return minus(y, x);
}

// A term F that is computed from t, which is found first, and the arguments
template <class F, int SX, int SY> struct WithGap {
  static constexpr bool has_ordinary = true, takes_parameter = false, has_gap = true;
  static constexpr bool x_is_pair = SX == LOGITS, y_is_pair = SY == LOGITS;
  template <typename T> static KL_FN bool ordinary(T x, T y) {
    if constexpr (SX != PROBS && SY != PROBS) return ordinary_logs(x, y);
    typedef Real<T> R;   // |t| < far: log p to within half an octave is cheap
    T p = SX == PROBS ? x : y, l = SX == PROBS ? y : x, t = fma(ratio<false>(T(1), p).k, -R::ln2, l);
    return (p >= R::tiny) & (p < R::huge) & (absolute(t) < R::far - T(1));
  }
  template <bool ALL, typename X, typename Y> static KL_FN auto gap(X x, Y y) { return log_gap<SX, SY, ALL>(x, y); }
  template <bool ALL = true, typename X, typename Y> static KL_FN auto value(X x, Y y) {
    return F::template value<ALL>(x, y, gap<ALL>(x, y));
  }
  template <bool ALL = true, typename X, typename Y> static KL_FN auto dx(X x, Y y) {
    return F::template dx<ALL>(x, y, gap<ALL>(x, y));
  }
  template <bool ALL = true, typename X, typename Y> static KL_FN auto dy(X x, Y y) {
    return F::template dy<ALL>(x, y, gap<ALL>(x, y));
  }
};

template <int SX, int SY> struct Term<KL_DIV, SX, SY> : WithGap<Term<KL_DIV, SX, SY>, SX, SY> {
  using Base = WithGap<Term, SX, SY>;
  using Base::value, Base::dx, Base::dy;
  // p (e^t - 1 - t)
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T value(X x, Y y, T t) {
    T v = times_prob<SX, ALL>(expm1_minus<ALL>(t), x);
    if constexpr (!ALL) return v;
    T q = prob<SY>(y);
    v = t > Real<T>::far ? q : v;
    v = excluded<SY>(y) ? infinity<T>() : v;
    v = excluded<SX>(x) ? q : v;
    return unless_undefined<SX, SY>(x, y, v);
  }
  // -t, times p where x is a logarithm
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T dx(X x, Y y, T t) {
    T d = T(0) - t;
    if constexpr (SX != PROBS) d = T(0) - times_prob<SX, ALL>(t, x);
    if constexpr (!ALL) return d;
    d = excluded<SY>(y) ? infinity<T>() : d;
    if constexpr (SX != PROBS) d = excluded<SX>(x) ? T(0) : d;
    return unless_undefined<SX, SY>(x, y, d);
  }
  // 1 - p/q, times q where y is a logarithm
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T dy(X x, Y y, T t) {
    T d;
    if constexpr (SY == PROBS) d = T(0) - expm1(-t);
    else d = times_prob<SX, ALL>(expm1_of(t, expm1_minus<ALL>(t)), x);
    if constexpr (!ALL) return d;
    if constexpr (SY == PROBS) {
      d = excluded<SX>(x) ? T(1) : d;
    } else {
      T q = prob<SY>(y);
      d = t > Real<T>::far ? q : d;
      d = excluded<SX>(x) ? q : d;
    }
    return unless_undefined<SX, SY>(x, y, d);
  }
};

// With respect to logits rel_entr has the derivatives of kl_div: they differ by sums of p and of q, which logits do not change.
template <int SX, int SY> struct Term<REL_ENTR, SX, SY> : WithGap<Term<REL_ENTR, SX, SY>, SX, SY> {
  using Base = WithGap<Term, SX, SY>;
  using Base::value, Base::dx, Base::dy;
  typedef Term<KL_DIV, SX, SY> Divergence;
  // -p t
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T value(X x, Y y, T t) {
    T v = T(0) - times_prob<SX, ALL>(t, x);
    if constexpr (!ALL) return v;
    v = excluded<SY>(y) ? infinity<T>() : v;
    v = excluded<SX>(x) ? T(0) : v;
    return unless_undefined<SX, SY>(x, y, v);
  }
  // 1 - t, times p where x is a logarithm
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T dx(X x, Y y, T t) {
    if constexpr (SX == LOGITS) return Divergence::template dx<ALL>(x, y, t);
    T d = T(1) - t;
    if constexpr (SX != PROBS) d = times_prob<SX, ALL>(d, x);
    if constexpr (!ALL) return d;
    d = excluded<SY>(y) ? infinity<T>() : d;
    if constexpr (SX != PROBS) d = excluded<SX>(x) ? T(0) : d;
    return unless_undefined<SX, SY>(x, y, d);
  }
  // -p/q, times q where y is a logarithm
  template <bool ALL, typename X, typename Y, typename T> static KL_FN T dy(X x, Y y, T t) {
    if constexpr (SY == LOGITS) return Divergence::template dy<ALL>(x, y, t);
    T d;
    if constexpr (SY == PROBS) {
      d = T(0) - exp_over(x, y);
      d = excluded<SY>(y) ? -infinity<T>() : d;   // however small p is
      d = excluded<SX>(x) ? T(0) : d;
    } else {
      d = T(0) - prob<SX>(x);
    }
    return unless_undefined<SX, SY>(x, y, d);
  }
};

template <int SX, int SY> struct Term<CROSS_ENTROPY, SX, SY> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {   // -p log q
    T v = T(0) - times_prob<SX>(log_prob<SY>(y), x);
    v = excluded<SY>(y) ? infinity<T>() : v;
    v = excluded<SX>(x) ? T(0) : v;
    return unless_undefined<SX, SY>(x, y, v);
  }
  template <typename T> static KL_FN T dx(T x, T y) {
    if constexpr (SX != PROBS) return value(x, y);
    T d = T(0) - log_prob<SY>(y);
    return x >= T(0) ? d : nan<T>();
  }
  template <typename T> static KL_FN T dy(T x, T y) { return Term<REL_ENTR, SX, SY>::dy(x, y); }
};

// ---- all terms ------------------------------------------------------------------------------------------------------------
// A uniform way to call every term
template <class F, bool ALL, typename X, typename Y> KL_FN auto value_of(X x, Y y, double e) {
  if constexpr (F::takes_parameter) return F::value(x, y, e);
  else if constexpr (F::has_ordinary) return F::template value<ALL>(x, y);
  else return F::value(x, y);
}
template <class F, bool ALL, typename X, typename Y> KL_FN auto dx_of(X x, Y y, double e) {
  if constexpr (F::takes_parameter) return F::dx(x, y, e);
  else if constexpr (F::has_ordinary) return F::template dx<ALL>(x, y);
  else return F::dx(x, y);
}
template <class F, bool ALL, typename X, typename Y> KL_FN auto dy_of(X x, Y y, double e) {
  if constexpr (F::takes_parameter) return F::dy(x, y, e);
  else if constexpr (F::has_ordinary) return F::template dy<ALL>(x, y);
  else return F::dy(x, y);
}

// ---- logits -------------------------------------------------------------------------------------------------------------
// s + low == b - a exactly (Knuth's TwoSum), for finite a, b and s
template <typename T> KL_FN T difference(T b, T a, T& low) {
  T s = b - a, v = s - b;
#if defined(KL_FAST16)   // differences of 16-bit numbers are exact unless one is 2^13 times the other
  if constexpr (sizeof(T) == sizeof(float)) {
    low = T(0);
    return s;
  }
#endif
  low = (b - (s - v)) - (a + v);
  return s;
}

}  // namespace kl
