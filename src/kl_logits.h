// Rows of logits, element by element and state by state: the loop bodies of the CPU (kl_rows.h) and the GPU (kl_cuda.cu).
// A row is read in chunks. Each chunk leaves a state, states are merged into that of the row, and the row's statistics follow:
// its value, and what the writing sweep needs. The derivations are in docs/maths.md. Includes nothing, and contains no sums
// over classes.
#pragma once

namespace kl {

// ---- the divergence of two rows of logits ---------------------------------------------------------------------------------
//
// T is the temperature, a are x's logits, b are y's, c = b - a and z = (c - M)/T. A chunk's anchor M is an unevaluated sum of
// two numbers, as is c: an offset that all logits share, however large, does not make z less accurate. What outlives the chunk
// is measured from the largest a and b, which removes such offsets: a state holds M - (max b - max a).
struct Spread {
  double max_a;       // m = max a
  double s;           // sum e^((a-m)/T): the weights
  double m, m_low;    // M - (max b - max a); M is close to the weighted mean of c or (EXACT is false) to a probable class's c
  double x;           // sum of weights * z; nearly 0 if M is close to the mean
  double g;           // sum of weights * (e^z - 1 - z) >= 0
  double max_b;
  double q;           // of a far state: sum e^((b - max b)/T)
  double kind;        // the sum of FAR and IMPOSSIBLE, where they apply
};
enum { FAR = 1, IMPOSSIBLE = 2 };   // some e^z is out of range; some class is possible under x but not under y
constexpr int LOGITS_STATES = sizeof(Spread) / sizeof(double);
KL_FN bool is_far(double kind) { return kind == FAR || kind == FAR + IMPOSSIBLE; }
KL_FN bool is_impossible(double kind) { return kind >= IMPOSSIBLE; }
KL_FN double kind_of(bool far, bool impossible) { return (far ? FAR : 0) + (impossible ? IMPOSSIBLE : 0); }

// A row's stats: the value, then what the writing sweep needs, in the order of a state for those numbers that are a state's.
// M and shift are stored minus (max b - max a).
enum { VALUE, ROW_MAX_A, ROW_S, ROW_M, ROW_M_LOW, ROW_MEAN_Z, ROW_SHIFT, ROW_MAX_B, ROW_Q, ROW_KIND, ROW_SHIFT_LOW };
constexpr int MAX_STATS = 16;   // for any kind of row; even, so that what follows stays 16-byte aligned

#if defined(KL_FAST16)
template <typename T> constexpr bool EXACT = sizeof(T) == sizeof(double);   // if false, the low parts of pairs are omitted
#else
template <typename T> constexpr bool EXACT = true;
#endif
template <typename T> constexpr bool PAIRED = EXACT<T> && sizeof(T) == sizeof(float);   // u/T is a pair; double has bits to spare
// Between COLDEST and HOTTEST, a temperature and its inverse are finite. Between the NARROW ones, float32 has room for both,
// and for the logarithms of a row.
constexpr double COLDEST = 0x1p-1024 + 0x1p-1074, HOTTEST = 0x1p1023 * (2 - 0x1p-52);
constexpr double COLDEST_NARROW = 0x1p-20, HOTTEST_NARROW = 0x1p100;
template <typename T> struct Inverse { T value, low, of_low; };   // 1/T = value + low; of_low: 0 if 1/T is 1, else value
template <typename T> KL_FN Inverse<T> inverse(double it) { return {(T)it, (T)(it - (double)(T)it), it == 1 ? T(0) : (T)it}; }
// (u + low)/T. TEMPERED = false, here and below: T is 1, and the division is omitted, which changes no bit.
template <bool TEMPERED, typename T> KL_FN Pair<T> cooled(T u, T low, const Inverse<T>& k, T of_low) {
  if constexpr (!TEMPERED) return {u, low};
  T v = u * k.value;
  if constexpr (PAIRED<T>) return {v, fma(u, k.value, -v) + fma(u, k.low, low * of_low)};
  return {v, T(0)};
}
template <bool TEMPERED, typename T> KL_FN Pair<T> cooled(T u, T low, const Inverse<T>& k) {
  return cooled<TEMPERED>(u, low, k, k.value);
}

template <typename T> KL_FN T softmax_weight(T u) { return u == u ? exp_flushed(u) : u; }   // for arguments that may be NaN

// e^((a-m)/T). At T = 1 the rounding error of a - m changes a weight that matters (a - m > -64) by at most 1.9e-6 of itself, and
// is ignored, whether TEMPERED or not.
template <bool TEMPERED, typename T> KL_FN T weight(T a, T m, const Inverse<T>& k) {
  if constexpr (!EXACT<T>) return exp<false>(cooled<TEMPERED>(a - m, T(0), k).value);
  if constexpr (!(TEMPERED && PAIRED<T>)) return exp_flushed(cooled<TEMPERED>(a - m, T(0), k).value);
  T low, u = difference(a, m, low);
  Pair<T> v = cooled<TEMPERED>(u, low, k, k.of_low);
  return exp_flushed(v);
}

// A chunk's M = max b - max a + mean, where mean is the weighted mean of (b - max b) - (a - max a), which no offset makes large.
// The low part of M is a multiple of 2 eps units of m, so that (c - m) - low is exact where z is small compared with the
// rounding error of c. If the parts of M are too far apart for two numbers (max a = 1, max b = 1e5 in float32), the chunk is far.
template <typename T> struct Anchor { T max_a, max_b, m, low, mean; };
template <typename T> KL_FN T below_tops(T a, T b, T max_a, T max_b) { return (b - max_b) - (a - max_a); }
constexpr double VAST = 1e300;   // a larger difference may have overflowed; sums of a few smaller ones have not
KL_FN bool usable(double mean) { return absolute(mean) < VAST; }
template <typename T> KL_FN Anchor<T> anchor(T max_a, T max_b, double mean) {
  if constexpr (!EXACT<T>) return {max_a, max_b, T(0), T(0), (T)mean};
  T low, c = difference(max_b, max_a, low), rest = (T)(mean + (double)low), m_low, m = difference(c, -rest, m_low);
  T step = T(3) * Real<T>::eps * real(bits(m) & Real<T>::octaves);
  m_low = (m_low + step) - step;
  T found = (m - c) + (m_low - low), wanted = (T)mean;
  // 2^-36 is what logits of up to a thousand lose; q - p of a nearly one-hot row has an error of eps times that
  bool held = absolute(found - wanted) <= fma(absolute(wanted), T(4) * Real<T>::eps, T(0x1p-36f));
  return {max_a, max_b, m, m_low, held ? found : infinity<T>()};
}

// z and, in float32 with a temperature, its rounding error
template <bool TEMPERED, typename T> KL_FN Pair<T> centred(T a, T b, const Anchor<T>& at, const Inverse<T>& k) {
  if constexpr (!EXACT<T>) return cooled<TEMPERED>(below_tops(a, b, at.max_a, at.max_b) - at.mean, T(0), k);
  T low, c = difference(b, a, low);
  return cooled<TEMPERED>(((c - at.m) - at.low) + low, T(0), k);
}
// z of a class that has a weight; else 0, because z may have overflowed
template <typename T> KL_FN Pair<T> counted(const Pair<T>& z, T w) {
  return {w > T(0) ? z.value : T(0), w > T(0) ? z.low : T(0)};
}
// (b - top_b) - (a - top_a) without any rounding error that matters; an overflow becomes a very large number
KL_FN double limited(double z) {
  z = z > VAST ? VAST : z;
  return z < -VAST ? -VAST : z;
}
KL_FN Pair<double> from_tops(double a, double b, double top_a, double top_b) {
  double low_a, u = limited(difference(a, top_a, low_a)), low_b, v = limited(difference(b, top_b, low_b));
  double low, c = difference(v, u, low);
  low += low_b - low_a;
  return {limited(c), absolute(low) < infinity<double>() ? low : 0.0};
}
KL_FN double minus(const Pair<double>& c, const Pair<double>& m) { return (c.value - m.value) + (c.low - m.low); }
// A chunk is far if some class's e^z is out of the type's range: z is too large, or overflowed;
template <typename T> KL_FN bool above_range(T z) { return !(z < Real<T>::far); }
// or a class that has a weight has such a small z that the other classes' z, which it makes small, are accurate to only 64 eps.
template <typename T> KL_FN bool below_range(T z) { return z <= T(-64); }

// With a single sweep about an arbitrary M (EXACT is false): whether the sums are too large compared with the divergence that
// follows from them, log1p(y) - x/s with y = (x + g)/s. Beyond a factor of four, M should be closer to the mean.
template <typename T> KL_FN bool cancels(T s, T x, T g) {
  T inverse = T(1) / s, mean = x * inverse, gap = g * inverse, y = gap + mean, log_y = log1p(y);
  T divergence = y < T(1) ? gap - (y - log_y) : log_y - mean;
  return (T(4) * (T(1) + y)) * divergence < gap + absolute(mean * y);
}

// e^z - 1 - z, for z in range
template <bool TEMPERED, typename T> KL_FN T spread_of(const Pair<T>& z) {
  if constexpr (TEMPERED && PAIRED<T>) return expm1_minus(z);
  return expm1_minus<false>(z.value);
}

template <bool TEMPERED, typename T> KL_FN T expm1_of(const Pair<T>& z) {
  if constexpr (!EXACT<T>) return expm1_fast(z.value);
  return spread_of<TEMPERED>(z) + z.value;
}

template <typename T> KL_FN Pair<double> mean_of(const Anchor<T>& at) {   // M - (max b - max a)
  if constexpr (!EXACT<T>) return {(double)at.mean, 0.0};
  double c_low, c = difference((double)at.max_b, (double)at.max_a, c_low), low, mean = difference((double)at.m, c, low);
  double rest, sum = difference(mean, -(low + ((double)at.low - c_low)), rest);
  return {sum, rest};
}
template <typename T> KL_FN Spread near_state(const Anchor<T>& at, double weights, double x, double g) {
  Pair<double> m = mean_of(at);
  return {(double)at.max_a, weights, m.value, m.low, x, g, (double)at.max_b, 0.0, 0.0};
}

// A chunk where e^z leaves the range, or classes are excluded: always in double, with y's mass measured from y's own maximum.
// First the weights, and the contributions to the mean over the classes that x and y both allow;
KL_FN double top_of(double max) { return excluded(max) ? 0.0 : max; }
struct Shared { double e, weight, c; bool impossible; };
KL_FN Shared shared(double a, double b, double top_a, double top_b, double it) {
  double e = softmax_weight((a - top_a) * it), both = excluded(b) ? 0.0 : e;
  double c = both * limited(below_tops(a, b, top_a, top_b));
  return {e, both, both > 0 ? c : 0.0, (!excluded(a)) && excluded(b)};
}
KL_FN Anchor<double> far_anchor(double top_a, double top_b, double weights, double c) {
  double mean = weights > 0 ? c / weights : 0.0;
  return {top_a, top_b, 0.0, 0.0, absolute(mean) < infinity<double>() ? mean : 0.0};
}
// then the series for near classes; for the others y's mass, x's mass, and x's mass times z;
struct Apart { double near, near_x, mass, weight, x; };
KL_FN Apart apart(double a, double b, double e, double q, const Anchor<double>& at, double it) {
  double z = limited(minus(from_tops(a, b, at.max_a, at.max_b), {at.mean, 0.0}) * it);
  bool near = (z < Real<double>::far) & !excluded(b);
  double near_e = near ? e : 0.0, near_z = near & (e > 0) ? z : 0.0, far_e = z < Real<double>::far ? 0.0 : e;
  double mass = z < Real<double>::far ? 0.0 : q;
  return {near_e * expm1_minus(near_z), near_e * near_z, e > 0 ? mass : q, far_e, far_e * (far_e > 0 ? z : 0.0)};
}
// and the state, from the sums of these over the chunk.
KL_FN Spread far_state(double max_a, double max_b, const Anchor<double>& at, double it, double s, double q, double near,
                       double near_x, double mass, double weights, double x, bool impossible) {
  double scale = mass > 0 ? exp(-at.mean * it) : 0.0;
  return {max_a, s, at.mean, 0.0, near_x + x, near + ((mass * scale - weights) - x), max_b, q, kind_of(true, impossible)};
}

// Merges several states into one, by the steps that a chunk takes for its classes. `Tops`, the largest a and b, is what states
// are measured from.
struct Tops { double a, b; };
KL_FN Tops tops(double max_a, double max_b) { return {top_of(max_a), top_of(max_b)}; }
KL_FN Pair<double> tops_of(const Spread& k, const Tops& top) {   // those of the state, measured from `top`
  return from_tops(top_of(k.max_a), top_of(k.max_b), top.a, top.b);
}
KL_FN double shifted(const Pair<double>& tops, const Pair<double>& m, const Pair<double>& to) {   // (tops + m) - to
  double low, by = difference(m.value, to.value, low);
  return (tops.value + by) + (tops.low + (low + (m.low - to.low)));
}
KL_FN double merge_weight(double max, double top, double it) { return exp_flushed((max - top) * it); }
KL_FN double merge_mean(const Spread& k, const Tops& top) { return tops_of(k, top).value + k.m; }
KL_FN double merge_mass(const Spread& k, const Tops& top, double it) {   // y's mass, measured from its top
  if (is_far(k.kind)) return k.q * merge_weight(k.max_b, top.b, it);
  return ((k.s + k.x) + k.g) * exp_flushed(((k.max_b - top.b) + k.m) * it);   // flushed like weights, so that equal rows stay equal
}
KL_FN Pair<double> merge_anchor(double c, double s) { return {s > 0 ? c / s : 0.0, 0.0}; }
struct Moved { double x, g; bool far; };
KL_FN Moved moved(const Spread& k, const Tops& top, const Pair<double>& m, double it) {   // to the common anchor
  double w = merge_weight(k.max_a, top.a, it), d = shifted(tops_of(k, top), {k.m, k.m_low}, m) * it;
  double e = d < Real<double>::far ? d : 0.0, gap = expm1_minus(e), x = w * (k.x + d * k.s);
  double near = w * ((exp(e) * k.g + gap * k.s) + expm1_of(e, gap) * k.x);
  if ((absolute(d) < Real<double>::far) & (k.g < infinity<double>()) & (w > 0)) return {x, near, false};
  double mass = merge_mass(k, top, it);
  mass = mass > 0 ? mass * exp(-(m.value + m.low) * it) : mass;
  return {w > 0 ? x : 0.0, mass - (w > 0 ? w * k.s + x : 0.0), true};
}

KL_FN Spread merged(double max_a, double max_b, double s, const Pair<double>& m, double x, double g,
                    double mass, bool far, bool impossible) {
  return {max_a, s, m.value, m.low, x, g, max_b, far ? mass : 0.0, kind_of(far, impossible)};
}

KL_FN void logits_finish(const Spread& s, double it, double* stats) {
  double mean_z = s.x / s.s, y = (s.g + s.x) / s.s, lse = log1p(y);   // log E_p[e^z]
  bool far = is_far(s.kind), impossible = is_impossible(s.kind);
  double shift_low, shift = difference(s.m, -(s.m_low + lse / it), shift_low);   // log q - log p = (c - shift)/T
  if (far & (impossible | !(y < 1))) {   // not small: from the two masses
    shift = log(s.q / s.s) / it;
    shift_low = 0;
    lse = minus({shift, shift_low}, {s.m, s.m_low}) * it;
  }
  double value = lse - mean_z;
  value = value < 0 ? 0.0 : value;                     // an exact zero, rounded
  value = impossible ? infinity<double>() : value;
  bool defined = s.s > 0 && s.s < infinity<double>() && (!far || (s.q > 0 && s.max_b < infinity<double>()));
  stats[VALUE] = defined ? value : nan<double>();
  stats[ROW_MAX_A] = s.max_a;
  stats[ROW_S] = defined ? s.s : nan<double>();
  stats[ROW_M] = s.m;
  stats[ROW_M_LOW] = s.m_low;
  stats[ROW_MEAN_Z] = impossible ? nan<double>() : mean_z;   // no derivative where the value is infinite
  stats[ROW_SHIFT] = shift;
  stats[ROW_SHIFT_LOW] = shift_low;
  stats[ROW_MAX_B] = s.max_b;
  stats[ROW_Q] = s.q;
  stats[ROW_KIND] = s.kind;
}

// ---- what a row's classes contribute, once its stats are known -----------------------------------------------------------

// For a chunk that is not far, with its weights w, its z and E = e^z - 1: dx = w (z c + d) and dy = w (E a + b). Its
// probabilities are w p, and log q - log p = z + t + t_low.
template <typename T> struct Slopes { T a, b, c, d, p, t, t_low; };
template <typename T>
KL_FN Slopes<T> slopes(double max_a, double max_b, const Pair<double>& m, const double* stats, double it) {   // m: from mean_of
  double away = (max_a - stats[ROW_MAX_A]) * it, p = exp_flushed(away) / stats[ROW_S], share = p * it;
  Pair<double> from = from_tops(max_a, max_b, stats[ROW_MAX_A], stats[ROW_MAX_B]);
  double d = shifted(from, m, {stats[ROW_M], stats[ROW_M_LOW]}) * it;
  double t = shifted(from, m, {stats[ROW_SHIFT], stats[ROW_SHIFT_LOW]}) * it;
  // e^(away + t), without large numbers that cancel
  double of_y = (max_b - stats[ROW_MAX_B]) + minus(m, {stats[ROW_SHIFT], stats[ROW_SHIFT_LOW]});
  double up = exp_flushed(of_y * it) / stats[ROW_S] * it, b = absolute(t) < 1 ? share * expm1(t) : up - share;
  T high = (T)t;
  return {(T)up, (T)b, (T)-share, (T)(-share * (d - stats[ROW_MEAN_Z])), (T)p, high, (T)(t - (double)high)};
}

enum { DEVIANCE, LITERAL };   // the term of kl_div, or of rel_entr

// Terms, from t = log q - log p. far_class computes them where t is out of range, and for all classes of a far chunk.
template <int TERM, bool TEMPERED, typename T>
KL_FN T near_term(T a, T b, T w, const Anchor<T>& at, const Slopes<T>& s, const Inverse<T>& it, bool& good) {
  Pair<T> z = centred<TEMPERED>(a, b, at, it);
  T t = (z.value + s.t) + (z.low + s.t_low), p = w * s.p;
  good = (t < Real<T>::far) & (t > -Real<T>::huge);
  return TERM == LITERAL ? T(0) - p * t : p * expm1_minus(t);
}

struct FarRow { double max_a, inv_s, max_b, inv_q; Pair<double> m, shift; double mean_z, it; };
KL_FN FarRow far_row(const double* stats, double it) {
  double q = is_far(stats[ROW_KIND]) ? stats[ROW_Q] : stats[ROW_S] * exp(stats[ROW_SHIFT] * it);
  return {stats[ROW_MAX_A], 1 / stats[ROW_S], stats[ROW_MAX_B], 1 / q, {stats[ROW_M], stats[ROW_M_LOW]},
          {stats[ROW_SHIFT], stats[ROW_SHIFT_LOW]}, stats[ROW_MEAN_Z], it};
}
struct Outputs { double term, dx, dy; };
template <int TERM> KL_FN Outputs far_class(double a, double b, const FarRow& k) {
  double nothing = 0 * k.inv_s;   // NaN if the row is undefined
  double w = softmax_weight((a - k.max_a) * k.it) * k.inv_s, q = softmax_weight((b - k.max_b) * k.it) * k.inv_q;
  w = excluded(a) ? 0.0 : w;
  q = excluded(b) ? 0.0 : q;
  Pair<double> c = from_tops(a, b, top_of(k.max_a), top_of(k.max_b));
  double t = limited(minus(c, k.shift) * k.it), z = limited(minus(c, k.m) * k.it);
  double wt = w > 0 ? w * t : 0.0, near = t < Real<double>::far ? t : 0.0, g = expm1_minus(near);
  double v = t < Real<double>::far ? w * g : (q - w) - wt, d = t < Real<double>::far ? w * expm1_of(near, g) : q - w;
  v = w > 0 ? v : q + nothing;
  d = w > 0 ? d : q + nothing;
  v = TERM == LITERAL ? (0.0 - wt) + nothing : v;
  v = excluded(b) ? infinity<double>() + nothing : v;
  v = excluded(a) ? (TERM == LITERAL ? nothing : q + nothing) : v;
  double s = 0.0 - (w * (z - k.mean_z)) * k.it;
  return {v, w > 0 ? s : 0 * k.mean_z + nothing, d * k.it};
}

// ---- normalising: logits to log-probabilities ------------------------------------------------------------------------------
//
// log S of a row is kept as (max, how many classes attain it, the rest of the sum), so that log S is accurate near 0.
struct Norm { double max, count, rest; };
constexpr int NORM_STATES = sizeof(Norm) / sizeof(double);
// A row's stats beside another space: [0..2] sums; then, for x and for y, the maximum and log S, or what tally_finish leaves
enum { NORM_X = 3, NORM_Y = 5 };

template <typename T> KL_FN T lowest() { return -real(bits(infinity<T>()) - 1); }
KL_FN double norm_rest(double x, double max, double zero, double it) {   // not for NaN
  double w = exp_flushed((x - zero) * it);
  return x == max ? 0.0 : w;
}
KL_FN double merge_rest(const Norm& k, double top, double zero, double it) {
  double below = exp_flushed((k.max - zero) * it) * (k.count + k.rest);
  return k.max == top ? k.rest : below;
}
KL_FN double log_alone(const Norm& n) { return log1p(n.rest); }          // if one class attains the maximum
KL_FN double log_tied(const Norm& n) { return log(n.count + n.rest); }   // if several do
KL_FN double log_norm(const Norm& n, double alone, double tied) {
  bool defined = n.count > 0 && n.max < infinity<double>();
  return !defined ? nan<double>() : n.count == 1.0 ? alone : tied;
}
KL_FN double log_norm(const Norm& n) { return log_norm(n, log_alone(n), log_tied(n)); }
KL_FN double log_prob_of(double x, double max, double log_s, double it) {
  double l = (x - max) * it - log_s;
  return excluded(l) & !excluded(x) ? lowest<double>() : l;   // an overflow does not exclude the class
}
template <typename T> struct Softmax { T scale, sum, it; };   // scaled if the sum does not fit a float
template <typename T> KL_FN Softmax<T> softmax_of_sum(double sum, double it) {
  double scale = (sizeof(T) == sizeof(float)) & (absolute(sum) > 0x1p100) ? 0x1p-60 : 1.0;
  return {(T)scale, (T)(sum * scale), (T)(it / scale)};
}
KL_FN double softmax_prob(double l) { return exp(l); }
template <typename T> KL_FN T softmax_prob(const Pair<T>& l) { return exp_flushed(l); }
template <typename T, typename L> KL_FN T through_softmax(T d, const L& l, const Softmax<T>& k) {   // l: the log-probability
  return ((d * k.scale - softmax_prob(l) * k.sum) + T(0) * k.sum) * k.it;   // no class has a derivative if the sum is infinite
}

// ---- normalising: counts to probabilities ----------------------------------------------------------------------------------
//
// A row's sum, in double. For float64 also the sums of its numbers times 2^-600 and times 2^600, in case the sum is at an end
// of the range.
struct Tally { double sum, fewer, more; };
static_assert(sizeof(Tally) == sizeof(Norm));
constexpr double FEWER = 0x1p-600, MORE = 0x1p600;

KL_FN double count_of(double c) {   // a number that is not a count makes its row NaN
  double v = c >= 0 ? c : nan<double>();
  return v < infinity<double>() ? v : nan<double>();
}
enum { SCALE, SUM };   // of a row: the factor of its counts, and the sum of the scaled counts
KL_FN void tally_finish(const Tally& t, double* k) {
  bool vast = t.sum > 0x1p500, little = t.sum < 0x1p-500;
  k[SCALE] = vast ? FEWER : little ? MORE : 1.0;
  k[SUM] = vast ? t.fewer : little ? t.more : t.sum;
}
KL_FN double share_of(double c, const double* k) { return c * k[SCALE] / k[SUM]; }   // exactly 1 if c is the whole sum
KL_FN double share_times(double p, double d) {   // the derivative with respect to a probability of 0 may be infinite
  double v = p * d;
  return p == 0 ? 0.0 : v;
}
KL_FN double through_share(double d, double mean, const double* k) {
  return ((d - mean) + 0.0 * mean) / k[SUM] * k[SCALE];   // no derivative if the mean is infinite
}

// float logits beside another space: log-probabilities as pairs. An overflow becomes the lowest number, and excludes no class.
template <typename T> struct LogNorm { T max, log_s, log_s_low; Inverse<T> it; };
template <typename T> KL_FN LogNorm<T> log_norm_of(const double* max_and_log, double it) {
  T log_s = (T)max_and_log[1];
  return {(T)max_and_log[0], log_s, (T)(max_and_log[1] - (double)log_s), inverse<T>(it)};
}
template <typename T> KL_FN Pair<T> log_prob_of(T x, const LogNorm<T>& k) {
  T low, u = difference(x, k.max, low), rest;
  Pair<T> v = cooled<true>(u, low, k.it);
  T l = difference(v.value, k.log_s, rest), all = (v.low + rest) - k.log_s_low;
  return {excluded(l) & !excluded(x) ? lowest<T>() : l, absolute(all) < infinity<T>() ? all : T(0)};
}
template <typename T> KL_FN bool overflows(const Pair<T>& l) { return l.value == lowest<T>(); }
// The true value of such a log q as a multiple of the lowest number, which may be below 1. A term, or dx, that is proportional
// to log q takes this factor.
template <typename T> KL_FN T stretch(T y, const LogNorm<T>& k) {
  T times = ((y * T(0.5) - k.max * T(0.5)) / lowest<T>()) * (k.it.value * T(2));
  return overflows(log_prob_of(y, k)) ? times : T(1);
}

// ---- cross-entropy and entropy with logits -----------------------------------------------------------------------------------
//
// -log q of a class is its cost plus log S. For logits the cost is (max b - b)/T, and S is the sum of e^-cost; for other spaces
// the cost is -log q itself, and log S is 0. Costs of logits are not negative: nothing cancels, and one sweep gives the value.
// The entropy is the cross-entropy of x with itself.
struct Cross {
  double max_a, s;             // for logits the maximum and the sum of weights; else 0 and the sum of probabilities
  double max_b, count, rest;   // of y's logits, as in Norm
  double cost;                 // sum of weights * costs
  double kind;                 // IMPOSSIBLE, or 0
};
constexpr int CROSS_STATES = sizeof(Cross) / sizeof(double);
enum { CROSS_MAX_A = VALUE + 1, CROSS_S, CROSS_MAX_B, CROSS_LOG_S, CROSS_Q, CROSS_MEAN };   // stats

// For one class of x or y, in the space S. `zero`: what its logits are measured from.
KL_FN double in_range(double v) {   // an overflowing cost does not exclude its class, and 0 times an overflowing e^x is not NaN
  return v > -lowest<double>() ? -lowest<double>() : v;
}
template <int S, bool TEMPERED, typename T> KL_FN T cross_weight(T x, T zero, const Inverse<T>& it) {
  if constexpr (S == PROBS) return x >= T(0) ? x : nan<T>();
  if constexpr (S == LOG_PROBS && sizeof(T) == sizeof(double)) return x < infinity<T>() ? in_range(exp(x)) : x;
  else if constexpr (S == LOG_PROBS) return x == x ? exp(x) : x;
  T w = weight<TEMPERED>(x, zero, it);
  return x < infinity<T>() ? w : nan<T>();
}
template <int S, typename T> KL_FN T cost_of(T y, T zero, T it) {
  if constexpr (S != LOGITS) return T(0) - log_prob<S>(y);
  else if constexpr (sizeof(T) == sizeof(float)) return (zero - y) * it;
  else return excluded(y) ? infinity<T>() : in_range((zero - y) * it);
}
// the cost of a class that has a weight, or NaN; else 0, because the cost may be infinite
template <typename T> KL_FN T counted_cost(T w, T cost) { return (w > T(0)) | (cost != cost) ? cost : T(0); }

// In float32 a class with such a large cost, or e^x, needs a closer look: either y excludes it, or its weight, however small,
// times the cost is computed in double. Weights below e^-800 do not matter, in float32 or in double.
template <typename T> KL_FN bool large_cost(T cost) { return cost > Real<float>::up; }
template <int SX, typename T> KL_FN bool wants_look(T x, T cost) {
  return large_cost(cost) | (SX == LOG_PROBS && x > Real<float>::exp_ordinary);
}
// Whether the class must be computed in double. `dx`: with respect to a probability, dx is the cost, whatever the probability.
template <int SX, int SY, typename T> KL_FN bool costs_double(T x, T y, T zero_a, T zero_b, T it, bool dx) {
  if constexpr (sizeof(T) == sizeof(double)) return false;
  bool counts = SX == LOGITS ? (x - zero_a) * it > T(-800) : (SX == PROBS && dx) || !excluded<SX>(x);
  return counts & !excluded<SY>(y) & wants_look<SX>(x, cost_of<SY>(y, zero_b, it));
}
template <int SX, int SY, typename T> KL_FN bool cannot_be(T x, T y) { return excluded<SY>(y) & !excluded<SX>(x); }

KL_FN Cross cross_at(const double* from, long long pitch) {
  return {from[0], from[pitch], from[2 * pitch], from[3 * pitch], from[4 * pitch], from[5 * pitch], from[6 * pitch]};
}

// Merging several states into one
struct Paid { double s, cost, count, rest; };
KL_FN Paid paid(const Cross& k, double max_a, double max_b, double it) {
  double zero_a = top_of(max_a), zero_b = top_of(max_b), u = merge_weight(k.max_a, zero_a, it);
  double shift = excluded(k.max_b) ? 0.0 : in_range((zero_b - k.max_b) * it), s = u * k.s;
  double cost = u * k.cost + (shift > 0 ? shift * s : 0.0);
  cost = u > 0 ? cost : 0.0;
  return {s, k.cost == k.cost ? cost : k.cost, k.max_b == max_b ? k.count : 0.0,
          merge_rest({k.max_b, k.count, k.rest}, max_b, zero_b, it)};
}
template <int SX, int SY> KL_FN void cross_finish(const Cross& k, double log_s, double* stats) {
  constexpr bool of_x = SX == LOGITS, of_y = SY == LOGITS;
  bool impossible = is_impossible(k.kind), x_is_fine = of_x ? k.s > 0 && k.s < infinity<double>() : k.s == k.s;
  bool y_is_fine = !of_y || log_s == log_s, fine = x_is_fine & y_is_fine & (k.cost == k.cost);
  double mean = of_x ? k.cost / k.s : k.cost, value = (of_x ? log_s : of_y ? log_s * k.s : 0.0) + mean;
  value = impossible ? infinity<double>() : value;
  stats[VALUE] = fine ? value : nan<double>();
  stats[CROSS_MAX_A] = k.max_a;
  stats[CROSS_S] = !of_x ? 1.0 : x_is_fine ? k.s : nan<double>();   // NaN makes the whole row NaN
  stats[CROSS_MAX_B] = k.max_b;
  stats[CROSS_LOG_S] = log_s;
  stats[CROSS_Q] = !of_y ? 0.0 : y_is_fine ? (of_x ? 1.0 : k.s) / (k.count + k.rest) : nan<double>();
  stats[CROSS_MEAN] = !fine | impossible ? nan<double>() : mean;   // no derivative where the value is infinite
}

// What a class contributes, once the row's stats are known
template <typename T> struct CrossRow {
  T zero_a, inv_s, zero_b, log_s, q, mean;
  Inverse<T> it;
};
template <typename T> KL_FN CrossRow<T> cross_row(const double* stats, double it) {
  return {(T)top_of(stats[CROSS_MAX_A]), (T)(1 / stats[CROSS_S]), (T)top_of(stats[CROSS_MAX_B]), (T)stats[CROSS_LOG_S],
          (T)stats[CROSS_Q], (T)stats[CROSS_MEAN], inverse<T>(it)};
}
// whether numbers that all classes use do not fit a float32
template <typename T> KL_FN bool costs_double(const CrossRow<T>& k) {
  return sizeof(T) == sizeof(float) && (large_cost(k.mean) | large_cost(k.q));
}
template <typename T> struct CrossOutputs { T term, dx, dy; };
template <int SX, int SY, bool TEMPERED, typename T> KL_FN CrossOutputs<T> cross_class(T x, T y, const CrossRow<T>& k) {
  T w = cross_weight<SX, TEMPERED>(x, k.zero_a, k.it) * k.inv_s, cost = cost_of<SY>(y, k.zero_b, k.it.value);
  T c = counted_cost(w, cost), term = w * (c + k.log_s), dx = term, dy = y == y ? T(0) - w : y;
  term = cannot_be<SX, SY>(x, y) & (w == w) ? infinity<T>() + T(0) * k.log_s : term;
  if constexpr (SX == LOGITS) dx = (w * (c - k.mean)) * k.it.value;
  else dx = SX == LOG_PROBS ? term : x >= T(0) ? cost + k.log_s : nan<T>();
  if constexpr (SY == LOGITS) {
    dy = (cross_weight<SY, TEMPERED>(y, k.zero_b, k.it) * k.q - w) * k.it.value;
  } else if constexpr (SY == PROBS) {
    dy = T(0) - w / y;
    dy = y == T(0) ? (excluded<SX>(x) ? T(0) : -infinity<T>()) + T(0) * w : dy;
    dy = y >= T(0) ? dy : nan<T>();
  }
  return {term, dx, dy};
}

}  // namespace kl
