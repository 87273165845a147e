// The sampling estimators of KL(x || y), for klcore.kl_estimate. The arguments are the log-probabilities under x and y of a
// token drawn from x; r = y - x, clipped to [-limit, limit]. Shared by the CPU and the GPU, like kl_math.h, which holds the
// functions used here and the list of names (KL_ESTIMATORS).
#pragma once

#include "kl_math.h"

namespace kl {

// F as a function of r. The derivative is 0 beyond the limit, but not at the limit itself. NaN propagates.
template <class F> struct OfLogRatio : Plain {
  static constexpr bool takes_parameter = true;
  template <typename T> static KL_FN T value(T x, T y, Given<T> limit) {
    T r = y - x;
    r = r > limit ? limit : r;
    r = r < -limit ? -limit : r;
    return F::of(r);
  }
  template <typename T> static KL_FN T dy(T x, T y, Given<T> limit) {
    T r = y - x, d = F::slope(r);
    d = absolute(r) > limit ? T(0) : d;
    return r == r ? d : r;
  }
  template <typename T> static KL_FN T dx(T x, T y, Given<T> limit) { return T(0) - dy(x, y, limit); }
};

template <> struct Term<K1, LOG_PROBS, LOG_PROBS> : OfLogRatio<Term<K1, LOG_PROBS, LOG_PROBS>> {
  template <typename T> static KL_FN T of(T r) { return T(0) - r; }
  template <typename T> static KL_FN T slope(T) { return T(-1); }
};

template <> struct Term<K2, LOG_PROBS, LOG_PROBS> : OfLogRatio<Term<K2, LOG_PROBS, LOG_PROBS>> {
  template <typename T> static KL_FN T of(T r) { return (T(0.5) * r) * r; }
  template <typename T> static KL_FN T slope(T r) { return r; }
};

template <> struct Term<K3, LOG_PROBS, LOG_PROBS> : OfLogRatio<Term<K3, LOG_PROBS, LOG_PROBS>> {
  template <typename T> static KL_FN T of(T r) {   // e^r - 1 - r; error 4 eps where the difference is taken, else 2 eps
    T near = expm1_minus<false>(r), apart = expm1(r) - r;
    T v = absolute(r) < T(0.34) ? near : apart;
    return r == infinity<T>() ? r : v;
  }
  template <typename T> static KL_FN T slope(T r) { return expm1(r); }
};

}  // namespace kl
