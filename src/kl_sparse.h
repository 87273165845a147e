// Rows in which x lists only some classes: a teacher's top K, say. All other classes become one, or are left out, which gives a
// divergence of K + 1 classes. These formulas compute the K + 1 numbers, in double, and take the derivatives back to the numbers
// that they were computed from. Shared by the CPU (kl_sparse_rows.h) and the GPU (kl_sparse.cu). Derived in docs/maths.md.
#pragma once

namespace kl {

// All other classes: one class, with the rest of x's mass or a given mass (BUCKET), or with none (ZERO); or no class (RENORM)
enum Tail { BUCKET, ZERO, RENORM };

// ---- which classes are listed ----------------------------------------------------------------------------------------------
//
// A key is a class and its place in the list. Keys are sorted by class and, for a class that is listed several times, by x's
// numbers. Their order then does not depend on that of the list, which therefore changes no bit.
typedef unsigned long long Key;
constexpr unsigned ABSENT = ~0u, OUTSIDE = ABSENT - 1;   // no class: the index is -1, or out of range
KL_FN Key key_of(long long index, long long n, long long place) {
  unsigned c = index >= 0 && index < n ? (unsigned)index : index == -1 ? ABSENT : OUTSIDE;
  return (Key)c << 32 | (Key)place;
}
KL_FN unsigned class_of(Key k) { return (unsigned)(k >> 32); }
constexpr Key PLACE_OF_KEY = 0xffffffffu;
KL_FN long long place_of(Key k) { return (long long)(k & PLACE_OF_KEY); }
KL_FN unsigned long long in_order(double x) {   // an integer in the order of the numbers, NaN included
  unsigned long long b = bits(x);
  return b & Real<double>::sign ? ~b : b | Real<double>::sign;
}
// Of several keys with the same class, the last one stands for all. `leads`: whether the key in slot s of `count` does.
KL_FN bool is_listed(Key k) { return class_of(k) < OUTSIDE; }
KL_FN bool leads(const Key* keys, long long s, long long count) {
  return is_listed(keys[s]) && (s + 1 == count || class_of(keys[s + 1]) != class_of(keys[s]));
}
// The first slot whose class is not below c
KL_FN long long first_slot(const Key* keys, long long count, long long c) {
  long long low = 0, high = count;
  while (low < high) {
    long long middle = (low + high) / 2;
    if ((long long)class_of(keys[middle]) < c) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The order of keys: by class, then by x's number, which is read only if the classes are equal, then by place
template <class Number> KL_FN bool comes_first(Key k, Key other, const Number& number) {
  if (class_of(k) != class_of(other) || !is_listed(k)) return k < other;
  unsigned long long own = in_order(number(place_of(k))), others = in_order(number(place_of(other)));
  return own != others ? own < others : k < other;
}

// Added to all numbers of a row: NaN if an index, the mass or the temperature is invalid, else 0. The CPU refuses such calls.
KL_FN double spoiled(const Key* keys, long long count, double it, double mass) {
  long long s = first_slot(keys, count, OUTSIDE);
  bool outside = s < count && class_of(keys[s]) == OUTSIDE;
  return outside | (it != it) | !((mass >= 0) & (mass <= 1)) ? nan<double>() : 0.0;
}

// ---- what is known of a row ------------------------------------------------------------------------------------------------
//
// About y: the other classes, as Norm or Tally; then all classes, as norm_finish or tally_finish leave them, if the row has to be
// normalised.
enum { OTHERS = 0, ALL = NORM_STATES, ROW_NUMBERS = ALL + 2 };

KL_FN constexpr bool is_log(int space) { return space == LOG_PROBS || space == LOGITS; }
KL_FN double no_mass(int space) { return is_log(space) ? -infinity<double>() : 0.0; }
KL_FN double prob_in(int space, double v) { return is_log(space) ? exp(v) : v; }
KL_FN double temper(int space, double it) { return space == LOGITS ? it : 1.0; }

KL_FN Norm norm_at(const double* k) { return {k[0], k[1], k[2]}; }
KL_FN Tally tally_at(const double* k) { return {k[0], k[1], k[2]}; }
KL_FN double log_mass(const Norm& n) {   // minus max
  return excluded(n.max) & (n.rest == n.rest) ? n.max : log_norm(n);
}
KL_FN double rest_of_listed(double y, double top, double zero, double it) { return y == y ? norm_rest(y, top, zero, it) : y; }
KL_FN void finish_all(int space, const Norm& listed, const Tally& tally, double it, double* known) {
  if (space == COUNTS) {
    Tally others = tally_at(known + OTHERS);
    tally_finish({others.sum + tally.sum, others.fewer + tally.fewer, others.more + tally.more}, known + ALL);
  } else if (space == LOGITS) {
    Norm others = norm_at(known + OTHERS);
    double top = others.max > listed.max ? others.max : listed.max, zero = top_of(top);
    double ties = (others.max == top ? others.count : 0.0) + (listed.max == top ? listed.count : 0.0);
    Norm all = {top, ties, merge_rest(others, top, zero, it) + merge_rest(listed, top, zero, it)};
    known[ALL] = top;
    known[ALL + 1] = log_norm(all);
  }
}

// y's number for a listed class, among the K + 1 classes: a log-probability for logits, a probability for counts;
KL_FN double of_listed(int space, double y, const double* known, double it) {
  if (space == LOGITS) return log_prob_of(y, known[ALL], known[ALL + 1], it);
  return space == COUNTS ? share_of(y, known + ALL) : y;
}
// and for all other classes.
KL_FN double of_others(int space, const double* known, double it) {
  const double* others = known + OTHERS;
  if (is_log(space)) {
    double l = log_mass(norm_at(others)), from = space == LOGITS ? log_prob_of(others[0], known[ALL], known[ALL + 1], it) : others[0];
    return excluded(l) ? from : from + l;
  }
  double own[2];
  tally_finish(tally_at(others), own);
  if (space == PROBS) return own[SUM] / own[SCALE];
  double scaled = known[ALL + SCALE] == FEWER ? others[1] : known[ALL + SCALE] == MORE ? others[2] : others[0];
  return scaled / known[ALL + SUM];
}
// x's mass of all other classes: `mass`, if it is given; else what the listed classes leave
KL_FN double mass_of_others(int tail, bool given, double mass, double listed) {
  double rest = 1.0 - listed;
  rest = rest <= 0 ? 0.0 : rest;
  return tail == ZERO ? 0.0 : given ? mass : rest;
}

// ---- derivatives -----------------------------------------------------------------------------------------------------------
//
// With respect to y: from the K + 1 classes to those of y. A listed class keeps its derivative. Any other class gets `slope`
// times its part of their mass; or just `slope`, if y holds probabilities or counts.
//
// Through a softmax the derivative of class i is d_i - q_i sum(d). If one class has nearly all of q, this cancels. So
// d_i - q_i c is computed first, with c = d/q of the likeliest class, for which nothing remains.
KL_FN double centre_of(double d, double q) { return q > 0 ? d / q : 0.0; }
KL_FN double less_centre(double d, double q, double centre, bool likeliest) { return likeliest ? 0.0 : d - share_times(q, centre); }

// For logarithms: the factor of a class's weight, and that weight
KL_FN double slope_of(double slope, const Norm& others) {
  double mass = others.count + others.rest;
  return mass > 0 ? slope / mass : 0 * slope;
}
template <typename T> KL_FN T part_of_others(T y, T max, const Inverse<T>& it) { return weight<true>(y, max, it); }

// Whether x's mass of all other classes follows from the listed ones. `rest` is that mass, in x's space.
KL_FN bool has_rest(int tail, bool given, int space, double rest) { return tail == BUCKET && !given && rest > no_mass(space); }
// The derivative with respect to x's number that stands for its class: d, minus the part due to the other classes' mass, d_rest
KL_FN double less_rest(int space, double d, double x, double d_rest, double rest) {
  return is_log(space) ? d - share_times(exp(x - rest), d_rest) : d - d_rest;
}

// If several numbers are one class, logarithms share its derivative as they share its mass: by e^x, measured from the last number
KL_FN double share_in(double x, double last, double it) { return exp(log_prob_of(x, top_of(last), 0.0, it)); }
KL_FN double share_of_derivative(double own, double all, long long count, double d) {   // equal shares if there is no mass
  return all == 0 ? d / (double)count : share_times(own / all, d);
}

}  // namespace kl
