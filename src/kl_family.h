// The relatives of the Kullback-Leibler divergence (Jensen-Shannon, total variation and others), as terms and for rows of
// logits. Shared by the CPU and the GPU, like kl_math.h and kl_logits.h, whose functions it uses. Each divergence is a sum over
// classes of a function of p and q that is homogeneous of degree one: a term does not depend on the row's other classes, and
// its derivatives depend on q/p alone. No term is the difference of nearly equal numbers. Derived in docs/maths.md.
#pragma once

#include "kl_logits.h"

namespace kl {

// ---- one class ---------------------------------------------------------------------------------------------------------
// d = q - p and t = log q - log p are more accurate than what p and q would give. If exactly one of p and q is zero, t is
// infinite; if both are, t is 0 and the class contributes nothing.
template <typename T> struct Class {
  static constexpr bool ordinary = false;
  T p, q, d, t;
};
// A class with p = 1 and |t| < far, for which members have shorter forms: none of its numbers is out of range.
template <typename T> struct Ordinary : Class<T> { static constexpr bool ordinary = true; };

// log_ratio of kl_math.h for y = x + d, zeros included: log(y/x), and x log(x/y) - x + y
template <bool ALL = true, typename T> KL_FN LogRatio<T> log_ratio(T x, T y, T d) {
  typedef Real<T> R;
  Ratio<T> q = ratio<ALL>(x, y);
  T same = ALL & (x < R::tiny) ? d * R::up : d;   // scaled like `from` and `to`
  same = ALL & (x >= R::huge) ? d * R::down : same;
  bool near = absolute(same) <= T(0.33) * q.from;   // the range of the series; outside it the rounding error of y does not matter
  T to = near ? q.from + same : q.to, k = near ? T(0) : q.k;
  T e = k == T(0) ? same : to - q.from, s = e / (to + q.from), t = atanh_tail(s * s);
  T value = fma(k, R::ln2, fma(s, t, s + s)), at_hand = s * fma(-q.from, t, e);
  at_hand = ALL & (x < R::tiny) ? at_hand * R::down : at_hand;
  at_hand = ALL & (x >= R::huge) ? at_hand * R::up : at_hand;
  T deviance = k == T(0) ? at_hand : fma(-x, value, d);
  if constexpr (!ALL) return {value, deviance};
  deviance = deviance < T(0) ? T(0) : deviance;   // of subnormal numbers, whose rounding errors are as large as their difference
  value = y == T(0) ? -infinity<T>() : value;
  deviance = y == T(0) ? infinity<T>() : deviance;
  value = x == T(0) ? infinity<T>() : value;
  deviance = x == T(0) ? y : deviance;
  value = x + y == T(0) ? T(0) : value;
  return {d == d ? value : d, d == d ? deviance : d};
}

// m (e^z - 1) and m (e^z - 1 - z), wherever they are in range; 0 for m = 0
template <typename T> KL_FN T times_expm1(T m, T z) {
  T far = times_exp(m, z) - m, near = m * expm1(z);
  return m == T(0) ? T(0) : z > Real<T>::far ? far : near;
}
template <typename T> KL_FN T times_growth(T m, T z) {
  T in_range = z > Real<T>::far ? T(0) : z, far = (times_exp(m, z) - m) - m * z, near = m * expm1_minus(in_range);
  return m == T(0) ? T(0) : z > Real<T>::far ? far : near;
}
// p (e^t - 1 - t): the term of kl_div
template <typename T> KL_FN T deviance_of(T p, T q, T t) {
  T far = (q - p) - p * t, near = p * expm1_minus(t > Real<T>::far ? T(0) : t), v = t > Real<T>::far ? far : near;
  v = t < -Real<T>::huge ? infinity<T>() : v;   // q excludes the class,
  return t > Real<T>::huge ? q : v;             // or p does
}

// ---- the members ---------------------------------------------------------------------------------------------------------
// `value`, and its derivatives: dp and dq with respect to the probabilities, da and db with respect to their logarithms. `k` is
// the member's parameter. `takes_gap`: the member uses t. `saturates`: dq tends to q_limit where p is negligible compared with
// q, and dp to p_limit where q is negligible compared with p; dq_far and dp_far are dq and dp minus these limits.
template <int OP> struct Member;

// k p + (1 - k) q, which for 0 < k < 1 is 0 only if both p and q are
template <typename T, template <typename> class C> KL_FN T middle(const C<T>& c, double k) {
  T m = fma((T)k, c.p, (T)(1 - k) * c.q);
  if constexpr (C<T>::ordinary) return m;
  T least = k > 0 ? real((typename Real<T>::Bits)1) : T(0);
  least = c.p + c.q > T(0) ? least : T(0);
  return m < least ? least : m;
}
template <typename T> KL_FN T unless_zero(T p, T d) { return p == T(0) ? T(0) : d; }   // d = p times a number that may be infinite

// b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q
template <> struct Member<JS_DIV> {
  static constexpr bool takes_gap = false, saturates = true;
  template <typename T, template <typename> class C> static KL_FN LogRatio<T> of_p(const C<T>& c, double k) {
    return log_ratio<!C<T>::ordinary>(c.p, middle(c, k), (T)(1 - k) * c.d);
  }
  template <typename T, template <typename> class C> static KL_FN LogRatio<T> of_q(const C<T>& c, double k) {
    return log_ratio<!C<T>::ordinary>(c.q, middle(c, k), -(T)k * c.d);
  }
  template <typename T, template <typename> class C> static KL_FN T value(const C<T>& c, double k) {
    return fma((T)k, of_p(c, k).deviance, (T)(1 - k) * of_q(c, k).deviance);
  }
  template <typename T, template <typename> class C> static KL_FN T dp(const C<T>& c, double k) {
    return T(0) - (T)k * of_p(c, k).value;
  }
  template <typename T, template <typename> class C> static KL_FN T dq(const C<T>& c, double k) {
    return T(0) - (T)(1 - k) * of_q(c, k).value;
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double k) { return unless_zero(c.p, c.p * dp(c, k)); }
  template <typename T> static KL_FN T db(const Class<T>& c, double k) { return unless_zero(c.q, c.q * dq(c, k)); }
  template <typename T> static KL_FN T dp_far(const Class<T>& c, double k) {
    T b = (T)k, rest = (T)(1 - k);
    return -b * log_ratio(b * c.p, middle(c, k), rest * c.q).value;
  }
  template <typename T> static KL_FN T dq_far(const Class<T>& c, double k) {
    T b = (T)k, rest = (T)(1 - k);
    return -rest * log_ratio(rest * c.q, middle(c, k), b * c.p).value;
  }
  static KL_FN double p_limit(double k) { return -k * log(k); }
  static KL_FN double q_limit(double k) { return (k - 1) * log1p(-k); }
};

// KL(p || m), m = a p + (1 - a) q, for a > 0
template <> struct Member<SKEW_KL_DIV> {
  static constexpr bool takes_gap = false, saturates = true;
  template <typename T> static KL_FN T apart(const Class<T>& c, double k) { return (T)(1 - k) * c.d; }   // m - p
  template <typename T, template <typename> class C> static KL_FN T over_middle(T d, const C<T>& c, double k) {
    T s = d / middle(c, k);
    return d == T(0) ? T(0) : s;
  }
  template <typename T, template <typename> class C> static KL_FN T value(const C<T>& c, double k) {
    return log_ratio<!C<T>::ordinary>(c.p, middle(c, k), apart(c, k)).deviance;
  }
  // a (m - p)/m - log(m/p). Where m is close to p, or a to 1, these cancel: `near` starts from log(m/p) minus (m - p)/m. Where p
  // is far above m, and a close to 0, the terms of that form cancel: `far` is the formula as it stands.
  template <typename T, template <typename> class C> static KL_FN T dp(const C<T>& c, double k) {
    LogRatio<T> up = log_ratio<!C<T>::ordinary>(middle(c, k), c.p, -apart(c, k));
    T s = over_middle(apart(c, k), c, k), near = T(0) - fma((T)(1 - k), s, over_middle(up.deviance, c, k));
    T far = fma((T)k, s, up.value);
    return s < T(-0.5) ? far : near;
  }
  template <typename T, template <typename> class C> static KL_FN T dq(const C<T>& c, double k) {
    return (T)(1 - k) * over_middle(apart(c, k), c, k);
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double k) { return unless_zero(c.p, c.p * dp(c, k)); }
  template <typename T> static KL_FN T db(const Class<T>& c, double k) { return c.q * dq(c, k); }
  template <typename T> static KL_FN T dp_far(const Class<T>& c, double k) {
    return T(0) - over_middle(log_ratio(middle(c, k), (T)k * c.p, (T)(k - 1) * c.q).deviance, c, k);
  }
  template <typename T> static KL_FN T dq_far(const Class<T>& c, double k) { return (T)(k - 1) * over_middle(c.p, c, k); }
  static KL_FN double p_limit(double k) { return log_ratio(1.0, k, k - 1).deviance; }   // k - 1 - log k
  static KL_FN double q_limit(double k) { return 1 - k; }
};

// w KL(p || q) + (1 - w) KL(q || p)
template <> struct Member<MIXED_KL_DIV> {
  static constexpr bool takes_gap = true, saturates = false;
  template <typename T> static KL_FN T mix(double k, T forward, T backward) {   // 0 times infinity counts as 0 here
    T v = fma((T)k, forward, (T)(1 - k) * backward);
    v = k == 0 ? backward : v;
    return k == 1 ? forward : v;
  }
  template <typename T, template <typename> class C> static KL_FN T value(const C<T>& c, double k) {
    if constexpr (!C<T>::ordinary) return mix(k, deviance_of(c.p, c.q, c.t), deviance_of(c.q, c.p, -c.t));
    T g = expm1_minus<false>(c.t), near = fma(c.t, c.d, -g), far = fma(c.t, c.q, -c.d);
    return mix(k, g, absolute(c.t) < T(1) ? near : far);
  }
  template <typename T, template <typename> class C> static KL_FN T dp(const C<T>& c, double k) {
    if constexpr (C<T>::ordinary) return mix(k, -c.t, -c.d);
    return mix(k, -c.t, T(0) - expm1(c.t));
  }
  template <typename T, template <typename> class C> static KL_FN T dq(const C<T>& c, double k) {
    if constexpr (C<T>::ordinary) return mix(k, c.d / c.q, c.t);
    return mix(k, T(0) - expm1(-c.t), c.t);
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double k) { return mix(k, unless_zero(c.p, -c.p * c.t), -c.d); }
  template <typename T> static KL_FN T db(const Class<T>& c, double k) { return mix(k, c.d, unless_zero(c.q, c.q * c.t)); }
};

// |p - q|/2
template <> struct Member<TV_DIST> {
  static constexpr bool takes_gap = false, saturates = false;
  template <typename T> static KL_FN T value(const Class<T>& c, double) { return T(0.5) * absolute(c.d); }
  template <typename T> static KL_FN T dp(const Class<T>& c, double k) { return T(0) - dq(c, k); }
  template <typename T> static KL_FN T dq(const Class<T>& c, double) {
    T s = c.d > T(0) ? T(0.5) : T(0);
    s = c.d < T(0) ? T(-0.5) : s;
    return c.d == c.d ? s : c.d;
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double k) { return c.p * dp(c, k); }
  template <typename T> static KL_FN T db(const Class<T>& c, double k) { return c.q * dq(c, k); }
};

// (sqrt p - sqrt q)^2/2
template <> struct Member<SQ_HELLINGER> {
  static constexpr bool takes_gap = false, saturates = true;
  template <typename T> static KL_FN T apart(const Class<T>& c) {   // sqrt q - sqrt p
    T s = c.d / (sqrt(c.p) + sqrt(c.q));
    return c.d == T(0) ? T(0) : s;
  }
  template <typename T> static KL_FN T half(T d, T root) {
    T s = T(0.5) * (d / root);
    return d == T(0) ? T(0) : s;
  }
  template <typename T> static KL_FN T value(const Class<T>& c, double) {
    T d = apart(c);
    return (T(0.5) * d) * d;
  }
  template <typename T> static KL_FN T dp(const Class<T>& c, double) { return half(-apart(c), sqrt(c.p)); }
  template <typename T> static KL_FN T dq(const Class<T>& c, double) { return half(apart(c), sqrt(c.q)); }
  template <typename T> static KL_FN T da(const Class<T>& c, double) { return (T(-0.5) * apart(c)) * sqrt(c.p); }
  template <typename T> static KL_FN T db(const Class<T>& c, double) { return (T(0.5) * apart(c)) * sqrt(c.q); }
  template <typename T> static KL_FN T rest(T p, T q) {
    T s = T(-0.5) * (sqrt(p) / sqrt(q));
    return p == T(0) ? T(0) : s;
  }
  template <typename T> static KL_FN T dp_far(const Class<T>& c, double) { return rest(c.q, c.p); }
  template <typename T> static KL_FN T dq_far(const Class<T>& c, double) { return rest(c.p, c.q); }
  static KL_FN double p_limit(double) { return 0.5; }
  static KL_FN double q_limit(double) { return 0.5; }
};

// (p - q)^2/q
template <> struct Member<CHI2_DIV> {
  static constexpr bool takes_gap = false, saturates = false;
  // (q - p)/q; from t where q may be out of range
  template <typename T, template <typename> class C> static KL_FN T share(const C<T>& c) {
    if constexpr (C<T>::ordinary) return c.d / c.q;
    T by_t = T(0) - expm1(-c.t), s = c.t == T(0) ? c.d / c.q : by_t;
    return c.d == T(0) ? T(0) : s;
  }
  template <typename T, template <typename> class C> static KL_FN T value(const C<T>& c, double) {
    if constexpr (C<T>::ordinary) return c.d * share(c);
    T e = expm1(c.t), far = times_exp(c.p, -c.t) * (e * e), near = c.d * share(c);
    near = c.t < T(-1) ? far : near;
    return c.t < -Real<T>::huge ? infinity<T>() : near;
  }
  template <typename T, template <typename> class C> static KL_FN T dp(const C<T>& c, double) { return T(-2) * share(c); }
  template <typename T, template <typename> class C> static KL_FN T dq(const C<T>& c, double) {
    T s = share(c);
    return s * (T(2) - s);
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double) { return T(2) * times_expm1(c.p, -c.t); }
  template <typename T> static KL_FN T db(const Class<T>& c, double) { return c.d - times_expm1(c.p, -c.t); }
};

// (p^a q^(1-a) - a p - (1 - a) q)/(a (a - 1)), and its limits, KL(p || q) at a = 1 and KL(q || p) at a = 0. Computed for
// l = 1 - a <= 1/2; for larger l, p and q are exchanged.
template <> struct Member<ALPHA_DIV> {
  static constexpr bool takes_gap = true, saturates = true;
  template <typename T, template <typename> class C> static KL_FN T above(const C<T>& c, T t, T l) {   // for l > 0, times 1 - l
    if constexpr (C<T>::ordinary) {
      T over = T(1) / l, z = l * t, g = expm1_minus<false>(z);
      T near = c.p * (expm1_minus<false>(t) - g * over), far = c.d - c.p * ((g + z) * over);
      return absolute(t) <= T(1) ? near : far;
    }
    T small = absolute(t) <= T(1) ? t : T(0), near = c.p * (expm1_minus(small) - expm1_minus(l * small) / l);
    T far = c.d - times_expm1(c.p, l * t) / l, v = absolute(t) <= T(1) ? near : far;
    return c.t < -Real<T>::huge ? c.p / l * (T(1) - l) : v;
  }
  template <typename T, template <typename> class C> static KL_FN T below(const C<T>& c, T t, T l) {   // for l <= 0
    T over = l < T(0) ? T(-1) / l : T(0);
    if constexpr (C<T>::ordinary) return c.p * fma(over, expm1_minus<false>(l * t), expm1_minus<false>(t));
    T v = times_growth(c.p * over, l * t) + deviance_of(c.p, c.q, t);
    return c.t < -Real<T>::huge ? infinity<T>() : v;
  }
  template <bool TURNED, bool ABOVE, typename T, template <typename> class C> static KL_FN T value_in(const C<T>& c, double k) {
    C<T> of = c;
    if constexpr (TURNED) of.p = c.q, of.q = c.p, of.d = -c.d, of.t = -c.t;
    T l = (T)(TURNED ? k : 1 - k), rest = (T)(TURNED ? 1 - k : k), t = absolute(of.t) < Real<T>::huge ? of.t : T(0), v;
    if constexpr (ABOVE) v = above(of, t, l);
    else v = below(of, t, l);
    if constexpr (C<T>::ordinary) return v * (T(1) / rest);
    v = of.t > Real<T>::huge ? of.q : v;
    return v / rest;
  }
  // kl_rows.h hoists these branches out of its loop
  template <typename T, template <typename> class C> static KL_FN T value(const C<T>& c, double k) {
    if (k < 0.5) return k > 0 ? value_in<true, true>(c, k) : value_in<true, false>(c, k);
    return k < 1 ? value_in<false, true>(c, k) : value_in<false, false>(c, k);
  }
  template <bool ALL, typename T> static KL_FN T slope(T t, T l) {   // -(e^(l t) - 1)/l
    T z = l * t, s;
    if constexpr (ALL) s = expm1(z) / -l;
    else s = (expm1_minus<false>(z) + z) * (T(-1) / l);
    return l == T(0) ? -t : s;
  }
  // the slope times p: (p - p e^(l t))/l, where p e^(l t) = q e^(-(1 - l) t) may be in range where p is not; rest = 1 - l
  template <typename T> static KL_FN T log_slope(T p, T q, T d, T t, T l, T rest) {
    bool by_q = l > T(0.5);
    T z = l * t, w = times_exp(by_q ? q : p, by_q ? -(rest * t) : z), near = unless_zero(p, p * expm1(z));
    T s = ((by_q ? t : z) > Real<T>::far ? w - p : near) / -l, at_0 = unless_zero(p, -p * t);
    s = l == T(0) ? at_0 : s;
    return rest == T(0) ? -d : s;
  }
  template <typename T, template <typename> class C> static KL_FN T dp(const C<T>& c, double k) {
    return slope<!C<T>::ordinary>(c.t, (T)(1 - k));
  }
  template <typename T, template <typename> class C> static KL_FN T dq(const C<T>& c, double k) {
    return slope<!C<T>::ordinary>(-c.t, (T)k);
  }
  template <typename T> static KL_FN T da(const Class<T>& c, double k) { return log_slope(c.p, c.q, c.d, c.t, (T)(1 - k), (T)k); }
  template <typename T> static KL_FN T db(const Class<T>& c, double k) { return log_slope(c.q, c.p, -c.d, -c.t, (T)k, (T)(1 - k)); }
  template <typename T> static KL_FN T rest(T t, T l) {   // for l > 0
    T s = exp(l * t) / -l;
    return l > T(0) ? s : infinity<T>();
  }
  template <typename T> static KL_FN T dp_far(const Class<T>& c, double k) { return rest(c.t, (T)(1 - k)); }
  template <typename T> static KL_FN T dq_far(const Class<T>& c, double k) { return rest(-c.t, (T)k); }
  static KL_FN double p_limit(double k) { return 1 / (1 - k); }
  static KL_FN double q_limit(double k) { return 1 / k; }
};

// ---- as terms ------------------------------------------------------------------------------------------------------------

template <int SX, int SY, bool GAP, typename T> KL_FN Class<T> class_in(T x, T y) {
  T p = prob<SX>(x) + T(0), q = prob<SY>(y) + T(0);   // -0 becomes 0, so that a quotient by it is +inf
  if constexpr (SX == PROBS && SY == PROBS) return {p, q, q - p, GAP ? log_ratio(p, q, q - p).value : T(0)};
  else {
    bool no_p = excluded<SX>(x), no_q = excluded<SY>(y);
    T t;
    if constexpr (SX != PROBS && SY != PROBS) t = y - x;
    else t = log_gap<SX, SY>(x, y);
    t = no_q ? -infinity<T>() : t;
    t = no_p ? infinity<T>() : t;
    t = no_p & no_q ? T(0) : t;
    T near = p * expm1(t > Real<T>::far ? T(0) : t);
    return {p, q, t > Real<T>::far ? q - p : near, t};
  }
}

template <int OP, int SX, int SY> struct MemberTerm : Plain {
  static constexpr bool takes_parameter = true;
  typedef Member<OP> M;
  template <typename T> static KL_FN T value(T x, T y, double k) {
    return unless_undefined<SX, SY>(x, y, M::value(class_in<SX, SY, M::takes_gap>(x, y), k));
  }
  template <typename T> static KL_FN T dx(T x, T y, double k) {
    Class<T> c = class_in<SX, SY, M::takes_gap>(x, y);
    return unless_undefined<SX, SY>(x, y, SX == PROBS ? M::dp(c, k) : M::da(c, k));
  }
  template <typename T> static KL_FN T dy(T x, T y, double k) {
    Class<T> c = class_in<SX, SY, M::takes_gap>(x, y);
    return unless_undefined<SX, SY>(x, y, SY == PROBS ? M::dq(c, k) : M::db(c, k));
  }
};
#define KL_CASE(name, form, arguments) \
  template <int SX, int SY> struct Term<name, SX, SY> : MemberTerm<summed(name), SX, SY> {};
KL_FAMILY(KL_CASE)
#undef KL_CASE

// ---- as rows of logits -----------------------------------------------------------------------------------------------------
//
// The first sweep is that of kl_div (Spread), and finds the t of every class. The second sweep sums the terms and, if a
// gradient is wanted, the scores. A score s is the derivative with respect to a probability; the derivative with respect to
// the logit is p (s - E s). Where p is nearly one, this difference cancels. So scores are measured from a centre, the score of
// the likeliest class: that of the chunk, until all chunks are known. If that score is closer to the scores' limit than to 0,
// scores are measured from the limit first. All of this is in double, except for the near classes of the next section.
struct Side { double far, centre, sum, mass; };   // far: 1 if measured from the limit, else 0; sums of p (s - centre), and of p
struct Members { double value; Side x, y; };      // of a chunk
constexpr int MEMBER_STATES = sizeof(Members) / sizeof(double), SIDE_STATES = sizeof(Side) / sizeof(double);
// A row's stats: Members, with means in place of sums, then what the first sweep found; log q - log p = (c - shift)/T
enum { MEMBER_MAX_A = MEMBER_STATES, MEMBER_INV_S, MEMBER_MAX_B, MEMBER_INV_Q, MEMBER_SHIFT, MEMBER_SHIFT_LOW };
static_assert(MEMBER_SHIFT_LOW < MAX_STATS);

KL_FN void members_begin(const Spread& s, double it, double* stats) {   // calls logits_finish
  double found[MAX_STATS];
  logits_finish(s, it, found);
  FarRow row = far_row(found, it);
  bool defined = 0 * row.inv_s + 0 * row.inv_q == 0;   // else a row excludes every class; NaN in both, so that sums are NaN
  for (int k = 0; k < MAX_STATS; k++) stats[k] = 0;
  stats[MEMBER_MAX_A] = row.max_a;
  stats[MEMBER_INV_S] = defined ? row.inv_s : nan<double>();
  stats[MEMBER_MAX_B] = row.max_b;
  stats[MEMBER_INV_Q] = defined ? row.inv_q : nan<double>();
  stats[MEMBER_SHIFT] = row.shift.value;
  stats[MEMBER_SHIFT_LOW] = row.shift.low;
}

struct MemberRow { double max_a, inv_s, max_b, inv_q; Pair<double> shift; double it; Side x, y; };
KL_FN MemberRow member_row(const double* stats, double it) {
  return {stats[MEMBER_MAX_A], stats[MEMBER_INV_S], stats[MEMBER_MAX_B], stats[MEMBER_INV_Q],
          {stats[MEMBER_SHIFT], stats[MEMBER_SHIFT_LOW]}, it, *(const Side*)(stats + VALUE + 1),
          *(const Side*)(stats + VALUE + 1 + SIDE_STATES)};
}
KL_FN Class<double> class_of(double a, double b, const MemberRow& k) {   // by the steps of far_class
  double p = softmax_weight((a - k.max_a) * k.it) * k.inv_s, q = softmax_weight((b - k.max_b) * k.it) * k.inv_q;
  p = excluded(a) ? 0 * k.inv_s : p;
  q = excluded(b) ? 0 * k.inv_s : q;
  double t = limited(minus(from_tops(a, b, top_of(k.max_a), top_of(k.max_b)), k.shift) * k.it);
  t = excluded(b) ? -infinity<double>() : t;
  t = excluded(a) ? infinity<double>() : t;
  t = excluded(a) & excluded(b) ? 0.0 : t;
  t = q == q ? t : q;
  double near = p * expm1(t > Real<double>::far ? 0.0 : t);
  return {p, q, t > Real<double>::far ? q - p : near, t};
}
// p (s - centre); where the score is too large for that, its product with p is used
KL_FN bool is_vast(double s) { return !(absolute(s) < VAST); }
KL_FN double centred_score(double p, double s, double ps, double centre) {
  double vast = ps - p * centre, v = p * (s - centre);
  return is_vast(s) ? vast : v;
}
// what a chunk's scores are measured from, given the score of its likeliest class, and that score minus the limit (`far`)
KL_FN Side side_from(double s, double far) {
  bool is_far = absolute(far) < absolute(s);
  double centre = is_far ? far : s;
  return {is_far ? 1.0 : 0.0, absolute(centre) < VAST ? centre : 0.0, 0.0, 0.0};
}
// a chunk's sum, measured from the centre of `to` instead of its own
KL_FN double moved_score(const Side& k, const Side& to, double limit) {
  double limits = k.far == to.far ? 0.0 : (k.far - to.far) * limit;
  return k.sum + k.mass * ((k.centre - to.centre) + limits);
}
KL_FN Side with_mean(const Side& k) { return {k.far, k.centre, k.sum / k.mass, k.mass}; }   // the mean of the scores as its sum
KL_FN void members_finish(const Members& m, double* stats) { *(Members*)stats = {m.value, with_mean(m.x), with_mean(m.y)}; }
// v: p (s - centre)
KL_FN double member_derivative(double v, double p, double mean, double it) { return (v - p * mean) * it; }

// ---- near classes, in float ------------------------------------------------------------------------------------------------
//
// A chunk of float32 logits whose classes are all near, |t| < 16, is computed in float. Terms are of degree one: each is the
// class's weight w times the term of a class with p = 1 and q = e^t, which is never out of range. t is b - a minus an anchor at
// the row's shift, minus the remainder of that anchor, so its relative error is as small as float allows. The weights are those
// of the first sweep, measured from the chunk's own maximum; the factor that makes them probabilities is applied to totals.
template <typename T> struct NearRow { Anchor<T> at; T rest, bound; Inverse<T> it; };
template <typename T> KL_FN NearRow<T> near_row(const MemberRow& k, double parameter) {
  Anchor<T> at = anchor((T)k.max_a, (T)k.max_b, k.shift.value);
  double rest = minus(k.shift, mean_of(at)), most = absolute(parameter);   // e^(alpha t) must be in range too
  most = absolute(1 - parameter) > most ? absolute(1 - parameter) : most;
  return {at, (T)(usable((double)at.mean) ? rest : infinity<double>()), (T)(16 / (most > 1 ? most : 1.0)), inverse<T>(k.it)};
}
KL_FN float near_term_of(float w, float v, double part) { return (w * v) * (float)part; }
KL_FN double near_part(const MemberRow& k, double max_a) { return exp_flushed((max_a - k.max_a) * k.it) * k.inv_s; }
template <bool TEMPERED, typename T> KL_FN T near_gap(T a, T b, const NearRow<T>& k) {   // t
  T low, c = difference(b, a, low);
  Pair<T> t = cooled<TEMPERED>(((c - k.at.m) - k.at.low) + low, -k.rest, k.it);   // exact up to here where t is small
  return t.value + t.low;
}
template <typename T> KL_FN bool is_near(T t, const NearRow<T>& k) { return absolute(t) < k.bound; }   // false for NaN
template <typename T> KL_FN Ordinary<T> near_class(T t) {
  Octave<T> o = octave(t);
  T s = power_of_two(o.k), y = fma(o.r * o.r, exp_tail(o.r), o.r);
  return {{T(1), fma(s, y, s), fma(s, y, s - T(1)), t}};
}

// A float score s has an error of a few eps of itself. The error of the gradient p (s - mean) is not much larger, unless nearly
// all scores are equal. So unbalanced scores are measured again from the mean of their chunk: if they then differ by less than
// a sixteenth of their size, the chunk's gradient is computed in double. The scores of tv_dist are exact.
template <int OP> constexpr double APART = OP == TV_DIST ? 0.0 : 0.0625;
struct Scores { double mass, sum, size; };   // sums of w, w s and w |s|
KL_FN bool are_balanced(const Scores& k) { return absolute(k.sum) <= 0.5 * k.size; }   // they differ by at least half their size
KL_FN float centre_of(const Scores& k) { return k.mass > 0 ? (float)(k.sum / k.mass) : 0.f; }
KL_FN bool are_apart(double size, const Scores& k, double apart) { return size >= apart * k.size; }   // size: sum of w |s - centre|
KL_FN Side near_side(const Scores& k, double centre, double sum, double part) { return {0.0, centre, sum * part, k.mass * part}; }
// for p (s - mean)/T, with the mean of the row
template <typename T> struct Slope { T mean, low, scale; };
template <typename T> KL_FN Slope<T> near_slope(const MemberRow& k, const Side& side, double limit, double part) {
  double centre = side.centre + (side.far != 0 ? limit : 0.0);
  T high = (T)(centre + side.sum);
  return {high, (T)((centre - (double)high) + side.sum), (T)(part * k.it)};   // the sum may be far below the centre
}
template <typename T> KL_FN T near_derivative(T w, T s, const Slope<T>& k) { return (w * ((s - k.mean) - k.low)) * k.scale; }

}  // namespace kl
