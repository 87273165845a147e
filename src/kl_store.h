// How numbers are stored: the four dtypes, widened on load and narrowed on store. Shared by the CPU and the GPU.
#pragma once

namespace kl {

enum Dtype { FLOAT64 = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3 };
enum Output { PER_ROW = 0, TERMS = 1, TOTAL = 2 };   // one value per row; one per class; one in all

// On the way to 16 bits: a double as the float that rounds to the same 16 bits (round to odd: the last bit marks an inexact float).
KL_FN float on_the_way(float v) { return v; }
KL_FN float on_the_way(double v) {
  float f = (float)v;
  unsigned b = bits(f);
  b = absolute((double)f) > absolute(v) ? b - 1 : b;
  return real((double)f == v ? b : b | 1);
}

template <int D> struct Stored;   // T is float or double
template <> struct Stored<FLOAT64> {
  typedef double Type;
  template <typename T> static KL_FN T widen(double v) { return (T)v; }
  template <typename T> static KL_FN double narrow(T v) { return (double)v; }
};
template <> struct Stored<FLOAT32> {
  typedef float Type;
  template <typename T> static KL_FN T widen(float v) { return (T)v; }
  template <typename T> static KL_FN float narrow(T v) { return (float)v; }
};
template <> struct Stored<BFLOAT16> {
  typedef unsigned short Type;
  template <typename T> static KL_FN T widen(unsigned short v) { return (T)real((unsigned)v << 16); }
  template <typename T> static KL_FN unsigned short narrow(T v) {   // to nearest, ties to even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900   // the same in one instruction
    unsigned short h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(on_the_way(v)));
    return h;
#else
    unsigned b = bits(on_the_way(v));
    unsigned r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (unsigned short)((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
#endif
  }
};
template <> struct Stored<FLOAT16> {
  typedef unsigned short Type;
#if defined(__CUDA_ARCH__)   // the same values in one instruction
  template <typename T> static KL_FN T widen(unsigned short v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return (T)f;
  }
  template <typename T> static KL_FN unsigned short narrow(T v) {
    unsigned short r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(on_the_way(v)));
    return r;
  }
#else
  template <typename T> static KL_FN T widen(unsigned short v) {
    unsigned m = v & 0x7fffu, sign = (unsigned)(v & 0x8000u) << 16;
    // exact, and never through a subnormal float, which costs a hundred cycles: probabilities of a large vocabulary are
    // subnormal halves
    unsigned normal = (m << 13) + (112u << 23), subnormal = bits(real((m << 13) + (113u << 23)) - 0x1p-14f);
    unsigned finite = m < 0x400u ? subnormal : normal;
    return (T)real((m >= 0x7c00u ? 0x7f800000u | (m << 13) : finite) | sign);
  }
  template <typename T> static KL_FN unsigned short narrow(T v) {   // to nearest, ties to even
    unsigned b = bits(on_the_way(v)), m = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    unsigned normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    unsigned subnormal = bits(real(m) + 0.5f) - 0x3f000000u;       // adding 1/2 leaves multiples of 2^-24
    unsigned r = m < 0x38800000u ? subnormal : normal;
    r = m >= 0x477ff000u ? 0x7c00u : r;                            // would round to more than 65504
    r = m > 0x7f800000u ? 0x7e00u : r;
    return (unsigned short)(r | sign);
  }
#endif
};

// The factor of results when they are stored. Far from 1, a float factor may be infinite, subnormal or 0 where the product is
// not; such a product is computed in double and rounded once.
template <typename T> struct Scale {
  T near;
  double exact;
  bool far;
  KL_FN Scale(double s = 1)
      : near((T)s), exact(s), far((sizeof(T) < sizeof(double)) & ((absolute(s) > 0x1p100) | (absolute(s) < 0x1p-100))) {}
};
template <typename T> KL_FN T operator*(T v, const Scale<T>& s) { return s.far ? (T)((double)v * s.exact) : v * s.near; }

constexpr int size_of(int dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }
template <typename T> constexpr int code_of() { return sizeof(T) == 8 ? FLOAT64 : FLOAT32; }

}  // namespace kl
