// Rows of logits, element by element and state by state: what the CPU (kl_rows.h) and the GPU (kl_cuda.cu) loop over.
// A row is read in chunks; each leaves a state, states merge into the row's, and the row's statistics give its value
// and what the writing sweep needs. The derivations are in docs/maths.md. Includes nothing, adds nothing up itself.
#pragma once

namespace kl {

// ---- the divergence of two rows of logits ---------------------------------------------------------------------------------
//
// With T the temperature, a = x's logits, b = y's, c = b - a and z = (c - M)/T:
struct Spread {
  double max_a;       // m = max a
  double s;           // sum e^((a-m)/T): the weights
  double m;           // M, the weighted mean of c, rounded to the type of the input: the anchor
  double x;           // sum of weights * z, nearly 0
  double g;           // sum of weights * (e^z - 1 - z) >= 0
  double max_b;       // where y's mass is measured from:
  double q;           // sum e^((b - max_b)/T)
  double far;         // some class has e^z beyond what the weights can carry
  double impossible;  // some class is possible for x and impossible for y
};
constexpr int LOGITS_STATES = sizeof(Spread) / sizeof(double);

// A row's stats: the value, then what the writing sweep needs
enum { VALUE, ROW_MAX_A, ROW_INV_S, ROW_SHIFT, ROW_SHIFT_LOW, ROW_MAX_B, ROW_INV_Q, ROW_FAR, ROW_MEAN, ROW_MEAN_LOW };
constexpr int MAX_STATS = 12;

template <typename T> KL_FN T softmax_weight(T u) { return u == u ? exp_flushed(u) : u; }   // where NaN may come

template <typename T> KL_FN T weight(T a, T m, T it) { return exp_flushed((a - m) * it); }   // times b - a for the mean
KL_FN bool usable(double mean) { return absolute(mean) < 1e300; }
template <typename T> KL_FN T centred(T a, T b, T mean, T it) {   // z
  T low, c = difference(b, a, low);
  return ((c - mean) + low) * it;
}
template <typename T> KL_FN bool in_range(T z) { return z < Real<T>::far; }   // all of a chunk's, or it is a far one

template <typename T> KL_FN Spread near_state(T m, T mean, double weights, double x, double g) {
  return {(double)m, weights, (double)mean, x, g, (double)m + (double)mean, (weights + x) + g, 0.0, 0.0};
}

// A chunk where e^z leaves the range, or classes are excluded: y's mass is measured from its own maximum.
// First the weights, and what the mean of c over classes that both allow is made of;
template <typename T> struct Shared { T e, weight, c; bool impossible; };
template <typename T> KL_FN Shared<T> shared(T a, T b, T zero, T it) {
  T e = softmax_weight((a - zero) * it), both = b > -infinity<T>() ? e : T(0), c = e * (b - a);
  T alone = a > -infinity<T>() ? T(1) : T(0);
  alone = excluded(b) ? alone : T(0);
  return {e, both, both > T(0) ? c : T(0), alone != T(0)};
}
template <typename T> KL_FN T far_mean(double weights, double c) {
  T mean = (T)(weights > 0 ? c / weights : 0.0);
  return absolute(mean) < infinity<T>() ? mean : T(0);
}
// then near classes by the series; of the others y's mass, x's, and x's times z.
template <typename T> struct Apart { T near, near_x, mass, weight, x; };
template <typename T> KL_FN Apart<T> apart(T a, T b, T e, T q, T mean, T it) {
  T low, c = difference(b, a, low);
  low = absolute(c) < infinity<T>() ? low : T(0);
  T z = ((c - mean) + low) * it;
  T near_e = z < Real<T>::far ? e : T(0), near_z = z < Real<T>::far ? z : T(0);
  T far_e = z < Real<T>::far ? T(0) : e, mass = z < Real<T>::far ? T(0) : q;
  near_e = excluded(b) ? T(0) : near_e;
  near_z = excluded(b) ? T(0) : near_z;
  return {near_e * expm1_minus(near_z), near_e * near_z, e > T(0) ? mass : q, far_e, far_e * (far_e > T(0) ? z : T(0))};
}
// of the sums of all these over the chunk
template <typename T>
KL_FN Spread far_state(T m, T max_b, T mean, double it, double s, double q, double near, double near_x, double mass,
                       double weights, double x, bool impossible) {
  double zero = excluded(m) ? 0.0 : (double)m, from = excluded(max_b) ? 0.0 : (double)max_b;
  double scale = mass > 0 ? exp((from - (zero + (double)mean)) * it) : 0.0;
  return {(double)m, s, (double)mean, near_x + x, near + ((mass * scale - weights) - x), (double)max_b, q, 1.0,
          impossible ? 1.0 : 0.0};
}

// Several states into one, by the same steps as for the classes of a chunk, between chunks.
KL_FN double zero_for(double top) { return excluded(top) ? 0.0 : top; }
KL_FN double merge_weight(double m, double zero, double it) { return exp_flushed((m - zero) * it); }
template <typename T> KL_FN double merge_anchor(double c, double s) { return s > 0 ? (double)(T)(c / s) : 0.0; }
struct Moved { double x, g; bool far; };
KL_FN Moved moved(const Spread& k, double zero, double anchor, double it) {   // to the common anchor
  double w = merge_weight(k.max_a, zero, it), d = (k.m - anchor) * it, shifted = k.x + d * k.s;
  double e = d < Real<double>::far ? d : 0.0, gap = expm1_minus(e);
  double near = w * ((exp(e) * k.g + gap * k.s) + expm1_of(e, gap) * k.x), x = w * shifted;
  if ((absolute(d) < Real<double>::far) & (k.g < infinity<double>()) & (w > 0)) return {x, near, false};
  double mass = k.q > 0 ? k.q * exp((k.max_b - (zero + anchor)) * it) : k.q;
  return {x, mass - (w * k.s + x), true};
}

template <typename T> KL_FN void logits_finish(const Spread& s, double it, double* stats) {
  double mean_z = s.x / s.s, y = (s.g + s.x) / s.s;
  bool close = y < 1 && s.impossible == 0;
  double lse, shift, shift_low;   // log E_p[e^z]; log q - log p = (c - shift - shift_low)/T
  if (close) {
    lse = log1p(y);
    shift = s.m;
    shift_low = lse / it;
  } else {                        // not small: from the two masses
    double apart = (s.max_b - s.max_a) + log(s.q / s.s) / it;
    lse = (apart - s.m) * it;
    shift = (T)apart;
    shift_low = apart - shift;
  }
  double value = lse - mean_z;
  value = value < 0 ? 0.0 : value;                     // rounding of an exact zero
  value = s.impossible != 0 ? infinity<double>() : value;
  bool defined = s.s > 0 && s.s < infinity<double>() && s.q > 0 && s.max_b < infinity<double>();
  stats[VALUE] = defined ? value : nan<double>();
  stats[ROW_MAX_A] = s.max_a;
  stats[ROW_INV_S] = defined ? 1.0 / s.s : nan<double>();
  stats[ROW_SHIFT] = shift;
  stats[ROW_SHIFT_LOW] = shift_low;
  stats[ROW_MAX_B] = s.max_b;
  stats[ROW_INV_Q] = 1.0 / s.q;
  stats[ROW_FAR] = s.far;
  stats[ROW_MEAN] = s.m;
  stats[ROW_MEAN_LOW] = s.impossible != 0 ? nan<double>() : mean_z / it;   // no derivative where the value is infinite
}

// what a row's classes contribute, once its stats are known
template <typename T> struct Known {
  // t = (c - shift - shift_low)/T; t + KL = (c - mean - mean_low)/T, which has nothing to cancel
  T m, it, inv_s, shift, shift_low, mean, mean_low, max_b, inv_q;
  KL_FN Known(double inverse_temperature, const double* stats)
      : m((T)stats[ROW_MAX_A]), it((T)inverse_temperature), inv_s((T)stats[ROW_INV_S]),
        shift((T)stats[ROW_SHIFT]), shift_low((T)stats[ROW_SHIFT_LOW]), mean((T)stats[ROW_MEAN]),
        mean_low((T)stats[ROW_MEAN_LOW]), max_b((T)stats[ROW_MAX_B]), inv_q((T)stats[ROW_INV_Q]) {}
};

enum { NO_TERM, DEVIANCE, LITERAL };   // the term wanted: that of kl_div, or of rel_entr

template <typename T> struct Outputs { T term, dx, dy; };   // those not asked for are of no meaning
template <typename T> KL_FN Outputs<T> near_outputs(T a, T b, const Known<T>& k, int term, bool dx, bool dy) {
  T w = exp_flushed((a - k.m) * k.it) * k.inv_s;
  T low, c = difference(b, a, low), t = ((c - k.shift) + (low - k.shift_low)) * k.it;
  Outputs<T> r = {};
  if (term) r.term = term == LITERAL ? T(0) - w * t : w * expm1_minus(t);
  if (dx) r.dx = T(0) - (w * (((c - k.mean) + (low - k.mean_low)) * k.it)) * k.it;
  if (dy) r.dy = (w * expm1_of(t, expm1_minus(t))) * k.it;
  return r;
}

// the same where classes are excluded, or weights cannot carry e^t
template <typename T> KL_FN Outputs<T> far_outputs(T a, T b, const Known<T>& k, int term) {
  T nothing = T(0) * k.inv_s;   // NaN where the row is undefined
  T w = softmax_weight((a - k.m) * k.it) * k.inv_s, q = softmax_weight((b - k.max_b) * k.it) * k.inv_q;
  w = excluded(a) ? T(0) : w;
  q = excluded(b) ? T(0) : q;
  T low, c = difference(b, a, low);
  low = absolute(c) < infinity<T>() ? low : T(0);
  T t = ((c - k.shift) + (low - k.shift_low)) * k.it, wt = w * t;
  wt = w > T(0) ? wt : T(0);
  T near = t < Real<T>::far ? t : T(0), g = expm1_minus(near);
  T v = t < Real<T>::far ? w * g : (q - w) - wt, d = t < Real<T>::far ? w * expm1_of(near, g) : q - w;
  v = w > T(0) ? v : q + nothing;
  d = w > T(0) ? d : q + nothing;
  v = term == LITERAL ? T(0) - wt : v;
  v = excluded(b) ? infinity<T>() : v;
  v = excluded(a) ? (term == LITERAL ? nothing : q + nothing) : v;
  T s = T(0) - (w * (((c - k.mean) + (low - k.mean_low)) * k.it)) * k.it;
  return {v, w > T(0) ? s : T(0) * k.mean_low + nothing, d * k.it};
}

// ---- normalising: logits to log-probabilities ------------------------------------------------------------------------------
//
// log S of a row is kept as (max, how many classes attain it, the rest of the sum), so that log S is precise near 0.
struct Norm { double max, count, rest; };
constexpr int NORM_STATES = sizeof(Norm) / sizeof(double);

KL_FN double norm_rest(double x, double max, double zero, double it) {
  return x == max ? 0.0 : softmax_weight((x - zero) * it);
}
KL_FN double merge_rest(const Norm& k, double top, double zero, double it) {
  double below = exp_flushed((k.max - zero) * it) * (k.count + k.rest);
  return k.max == top ? k.rest : below;
}
KL_FN double log_norm(const Norm& n) {
  bool defined = n.count > 0 && n.max < infinity<double>();
  return !defined ? nan<double>() : n.count == 1.0 ? log1p(n.rest) : log(n.count + n.rest);
}
KL_FN double log_prob_of(double x, double max, double log_s, double it) { return (x - max) * it - log_s; }
KL_FN double through_softmax(double d, double log_p, double sum, double it) { return (d - exp(log_p) * sum) * it; }

}  // namespace kl
