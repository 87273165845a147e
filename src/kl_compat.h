// The losses of other systems, for klcore.compat. Each term computes what the original computes, including for zeros,
// negative numbers and NaN (docs/compat.md). x is the target, y the prediction. Shared by the CPU and the GPU, like kl_math.h,
// which holds the functions used here and the list of names (KL_LOSSES).
#pragma once

#include "kl_math.h"

namespace kl {

// PyTorch and R torch: xlogy(x, x) - x y
template <> struct Term<PYTORCH, PROBS, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {
    T v = x * log(x);
    v = x == T(0) ? x : v;
    return v - x * y;
  }
  template <typename T> static KL_FN T dx(T x, T y) {      // log x + 1 - y, where the 1 is x/x: NaN at 0 and at infinity
    T d = (log(x) + T(1)) - y;
    d = x < infinity<T>() ? d : nan<T>();
    return x > T(0) ? d : nan<T>();
  }
  template <typename T> static KL_FN T dy(T x, T) { return -x; }
};
// with log_target: e^x (x - y)
template <> struct Term<PYTORCH, LOG_PROBS, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) { return exp(x) * (x - y); }
  template <typename T> static KL_FN T dx(T x, T y) { return exp(x) * ((x - y) + T(1)); }
  template <typename T> static KL_FN T dy(T x, T) { return -exp(x); }
};

// Keras: x log(x/y), both clipped to [e, 1]; the gradient passes at the bounds themselves
template <typename T> KL_FN T clipped(T x, T e) {
  x = x < e ? e : x;
  return x > T(1) ? T(1) : x;
}
template <typename T> KL_FN T within(T x, T e, T d) {
  d = x >= e ? d : T(0);
  return x <= T(1) ? d : T(0);
}
template <> struct Term<KERAS, PROBS, PROBS> : Plain {
  static constexpr bool takes_parameter = true;
  template <typename T> static KL_FN T value(T x, T y, Given<T> e) {
    T c = clipped(x, e);
    return c * log(c / clipped(y, e));
  }
  template <typename T> static KL_FN T dx(T x, T y, Given<T> e) {
    return within(x, e, log(clipped(x, e) / clipped(y, e)) + T(1));
  }
  template <typename T> static KL_FN T dy(T x, T y, Given<T> e) { return within(y, e, -(clipped(x, e) / clipped(y, e))); }
};

// MXNet: x (log(x + e) - y)
template <> struct Term<MXNET, PROBS, LOG_PROBS> : Plain {
  static constexpr bool takes_parameter = true;
  template <typename T> static KL_FN T value(T x, T y, Given<T> e) { return x * (log(x + e) - y); }
  template <typename T> static KL_FN T dx(T x, T y, Given<T> e) { return (log(x + e) - y) + x / (x + e); }
  template <typename T> static KL_FN T dy(T x, T, Given<T>) { return -x; }
};

// PuzzleLib: x (log x - y) where x > 0; its "gradient" is x - e^y, the descent direction for normalised targets
template <int SX> struct Term<PUZZLELIB, SX, LOG_PROBS> : Plain {
  template <typename T> static KL_FN T value(T x, T y) {
    T p = prob<SX>(x), v = p * (log_prob<SX>(x) - y);
    return p > T(0) ? v : T(0);
  }
  template <typename T> static KL_FN T dx(T x, T y) {      // never requested
    T d = (log_prob<SX>(x) + T(1)) - y;
    return prob<SX>(x) > T(0) ? d : T(0);
  }
  template <typename T> static KL_FN T dy(T x, T y) { return prob<SX>(x) - exp(y); }
};

}  // namespace kl
