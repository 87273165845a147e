// Rényi divergence, log(sum p^a q^(1-a))/(a - 1): not a sum over classes, but a function of the sum of alpha_div. Shared by the
// CPU and the GPU. The sweeps are those of alpha_div, with one more before the last; the derivatives are those of alpha_div
// times one number per row. Derived in docs/maths.md.
#pragma once

#include "kl_family.h"

namespace kl {

// With A the sum of alpha_div and x = a (a - 1) A, the value is log1p(x)/(a - 1), and alpha_div's gradient is multiplied by
// a/(1 + x). Where 1 + x is a small difference, or out of range, A does not determine the value: such a row is called tilted.
// The extra sweep, which other rows do not need, normalises u = log p^a q^(1-a) as if these were logits, so that
// r = p^a q^(1-a)/sum is another distribution.
//
// A row's stats: those of alpha_div, and RENYI_SLOPE, the factor of its gradient, which is 0 for a tilted row. The stats of a
// tilted row then become TILT_LEVEL, the logarithm of the sum, and the maximum and log S of x, y (if they are logits) and u.
enum { TILT_LEVEL = VALUE + 1, NORM_U = NORM_Y + 2, RENYI_SLOPE = MAX_STATS - 1 };
static_assert((int)MEMBER_SHIFT_LOW < (int)RENYI_SLOPE);
KL_FN bool is_tilted(const double* stats) { return stats[RENYI_SLOPE] == 0; }

KL_FN double renyi_excess(double alpha, double a) { return alpha * (alpha - 1) * a; }
KL_FN void renyi_begin(double alpha, double* stats) {   // once A is known
  double x = renyi_excess(alpha, stats[VALUE]);
  bool tilted = (x < -0.5) | (x > 0x1p100);
  stats[RENYI_SLOPE] = tilted ? 0.0 : alpha / (1 + x);
}
KL_FN void renyi_finish(double alpha, double* stats) {
  double v = log1p(renyi_excess(alpha, stats[VALUE])) / (alpha - 1);
  stats[VALUE] = alpha == 1 ? stats[VALUE] : v;
}

// ---- tilted rows -----------------------------------------------------------------------------------------------------------

// log p and log q, for logits up to a constant of the row, and t = log q - log p. `norm`: for logits, norm[0] is the maximum;
// for counts, it is what tally_finish leaves. For two rows of logits t follows from the first sweep, without such a constant:
// a large alpha would multiply its error.
struct Rough { double log_p, log_q, t; };
KL_FN double share_or_prob(int space, double v, const double* norm) { return space == COUNTS ? share_of(v, norm) : v; }
KL_FN double rough_log(int space, double v, const double* norm, double it) {
  if (space == LOG_PROBS) return v;
  if (space != LOGITS) return log(share_or_prob(space, v, norm));
  double u = limited((v - top_of(norm[0])) * it);
  return excluded(v) ? v : u;
}
KL_FN bool of_two_logits(int space_x, int space_y) { return space_x == LOGITS && space_y == LOGITS; }
KL_FN bool has_ratio(int space) { return space == PROBS || space == COUNTS; }
KL_FN Rough rough(int space_x, int space_y, double x, double y, const double* norm_x, const double* norm_y,
                  const double* stats, double it) {
  Rough k = {rough_log(space_x, x, norm_x, it), rough_log(space_y, y, norm_y, it), 0.0};
  k.t = k.log_q - k.log_p;
  if (has_ratio(space_x) & has_ratio(space_y)) {
    double p = share_or_prob(space_x, x, norm_x), q = share_or_prob(space_y, y, norm_y);
    k.t = log_ratio(p, q, q - p).value;
  }
  if (of_two_logits(space_x, space_y)) {
    Pair<double> c = from_tops(x, y, top_of(norm_x[0]), top_of(norm_y[0]));
    double t = limited(minus(c, {stats[MEMBER_SHIFT], stats[MEMBER_SHIFT_LOW]}) * it);
    k.t = excluded(y) ? -infinity<double>() : t;
  }
  return k;
}
KL_FN double tilt_of(const Rough& k, double alpha) {   // a log p + (1 - a) log q
  double u = fma(1 - alpha, k.t, k.log_p);
  return excluded(k.log_p) ? k.log_p : u;
}

// What the extra sweep leaves of a chunk: the norm of u and, for two rows of logits, those of x and y, which no other sweep finds
KL_FN constexpr int tilt_states(bool two_logits) { return two_logits ? 3 * NORM_STATES : NORM_STATES; }
struct TiltRow { double alpha, rest, log_s_x, log_s_y, max_u, log_s_u, level; };
KL_FN TiltRow tilt_row(int space_x, int space_y, double alpha, const double* stats) {
  return {alpha, 1 - alpha, space_x == LOGITS ? stats[NORM_X + 1] : 0.0, space_y == LOGITS ? stats[NORM_Y + 1] : 0.0,
          stats[NORM_U], stats[NORM_U + 1], stats[TILT_LEVEL]};
}
KL_FN void tilt_finish(int space_x, int space_y, double alpha, const Norm& u, double* stats) {   // NORM_X and NORM_Y are known
  stats[NORM_U] = u.max;
  stats[NORM_U + 1] = log_norm(u);
  TiltRow k = tilt_row(space_x, space_y, alpha, stats);
  double of_norms = of_two_logits(space_x, space_y) ? k.log_s_x : fma(alpha, k.log_s_x, k.rest * k.log_s_y);
  double level = (u.max + k.log_s_u) - of_norms;
  stats[TILT_LEVEL] = level;                             // NaN where the value is infinite, which makes the gradient NaN
  double v = level / (alpha - 1);
  v = is_unnormalised(space_x) & is_unnormalised(space_y) & (v < 0) ? 0.0 : v;   // two distributions: an exact zero, rounded
  stats[VALUE] = level == level ? v : infinity<double>();
}

KL_FN double gap(double a, double b) {   // e^a - e^b
  double near = expm1(a) - expm1(b), apart = exp(a) - exp(b);
  return (a > -0.7) & (b > -0.7) & (a < 0.7) & (b < 0.7) ? near : apart;
}
// The derivative of -log(sum) with respect to one side's number in `space`; to_r = log r - log q. By log q it is -r, and q - r
// if klcore normalised that side.
KL_FN double tilt_slope(int space, double log_q, double to_r, double log_r, const double* norm, double it) {
  if (space == LOGITS) return gap(log_q, log_r) * it;
  if (space == COUNTS) return gap(0.0, to_r) / norm[SUM] * norm[SCALE];
  return 0.0 - exp(space == PROBS ? to_r : log_r);
}
struct TiltSlopes { double dx, dy; };
KL_FN TiltSlopes tilt_slopes(int space_x, int space_y, double x, double y, const TiltRow& k, const double* stats, double it) {
  Rough of = rough(space_x, space_y, x, y, stats + NORM_X, stats + NORM_Y, stats, it);
  double log_p = of.log_p - k.log_s_x, log_q = of.log_q - k.log_s_y, log_r = (tilt_of(of, k.alpha) - k.max_u) - k.log_s_u;
  double to_x = excluded(log_p) ? k.rest * of.t - k.level : log_r - log_p;
  double to_y = excluded(log_q) ? -(k.alpha * of.t) - k.level : log_r - log_q;
  double dx = tilt_slope(space_x, log_p, to_x, log_r, stats + NORM_X, it) * (k.alpha / k.rest);
  double dy = tilt_slope(space_y, log_q, to_y, log_r, stats + NORM_Y, it);
  bool nothing = excluded(of.log_p) & excluded(of.log_q);
  return {nothing ? 0 * k.level : dx, nothing ? 0 * k.level : dy};
}

}  // namespace kl
