// Rényi's divergence, log(sum p^a q^(1-a))/(a - 1): no sum over classes, but a function of one, that of alpha_div. Shared by the
// CPU and the GPU. Its sweeps are those of alpha_div, whose derivatives are multiplied by one number of the row, with one more
// before the last. Derived in docs/maths.md.
#pragma once

#include "kl_family.h"

namespace kl {

// With A the sum of alpha_div and x = a (a - 1) A, the value is log1p(x)/(a - 1), and alpha_div's gradient is multiplied by
// a/(1 + x). Where 1 + x is a small difference, or out of range, A does not tell the value: such a row is tilted. The extra
// sweep, which other rows do not need, finds the norm of u = log p^a q^(1-a) as that of logits is found, so that
// r = p^a q^(1-a)/sum is one more distribution.
//
// A row's stats: alpha_div's, and `RENYI_SLOPE`: what multiplies its gradient, 0 for a tilted row. The stats of a tilted row
// are then TILT_LEVEL, the logarithm of the sum, and of x, y (where these are logits) and u the largest and log S.
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

// log p but for a constant of the row: that of logits, whose largest is at norm[0]. `norm`, of counts: what tally_finish leaves.
KL_FN double rough_log(int space, double v, const double* norm, double it) {
  if (space == LOG_PROBS) return v;
  if (space != LOGITS) return log(space == COUNTS ? share_of(v, norm) : v);
  double u = limited((v - top_of(norm[0])) * it);
  return excluded(v) ? v : u;
}
KL_FN double tilt_of(double log_p, double log_q, double alpha) {   // a log p + (1 - a) log q
  double u = fma(1 - alpha, log_q - log_p, log_p);
  return excluded(log_p) ? log_p : u;
}

struct TiltRow { double alpha, rest, log_s_x, log_s_y, max_u, log_s_u, level; };
KL_FN TiltRow tilt_row(int space_x, int space_y, double alpha, const double* stats) {
  return {alpha, 1 - alpha, space_x == LOGITS ? stats[NORM_X + 1] : 0.0, space_y == LOGITS ? stats[NORM_Y + 1] : 0.0,
          stats[NORM_U], stats[NORM_U + 1], stats[TILT_LEVEL]};
}
KL_FN void tilt_finish(int space_x, int space_y, double alpha, const Norm& u, double* stats) {   // NORM_X and NORM_Y are known
  stats[NORM_U] = u.max;
  stats[NORM_U + 1] = log_norm(u);
  TiltRow k = tilt_row(space_x, space_y, alpha, stats);
  double level = (u.max + k.log_s_u) - fma(alpha, k.log_s_x, k.rest * k.log_s_y);
  stats[TILT_LEVEL] = level;                             // NaN, and with it the gradient, where the value is infinite
  stats[VALUE] = level == level ? level / (alpha - 1) : infinity<double>();
}

KL_FN double gap(double a, double b) {   // e^a - e^b
  double near = expm1(a) - expm1(b), apart = exp(a) - exp(b);
  return (a > -0.7) & (b > -0.7) & (a < 0.7) & (b < 0.7) ? near : apart;
}
// The derivative by log q in `space`, where `to_r` is log r - log q: that of -log(sum), q - r where q is what was normalised
KL_FN double tilt_slope(int space, double log_q, double to_r, double log_r, const double* norm, double it) {
  if (space == LOGITS) return gap(log_q, log_r) * it;
  if (space == COUNTS) return gap(0.0, to_r) / norm[SUM] * norm[SCALE];
  return 0.0 - exp(space == PROBS ? to_r : log_r);
}
struct TiltSlopes { double dx, dy; };
KL_FN TiltSlopes tilt_slopes(int space_x, int space_y, double x, double y, const TiltRow& k, const double* stats, double it) {
  double of_x = rough_log(space_x, x, stats + NORM_X, it), of_y = rough_log(space_y, y, stats + NORM_Y, it);
  double log_p = of_x - k.log_s_x, log_q = of_y - k.log_s_y, log_r = (tilt_of(of_x, of_y, k.alpha) - k.max_u) - k.log_s_u;
  double t = log_q - log_p;
  double dx = tilt_slope(space_x, log_p, k.rest * t - k.level, log_r, stats + NORM_X, it) * (k.alpha / k.rest);
  double dy = tilt_slope(space_y, log_q, -(k.alpha * t) - k.level, log_r, stats + NORM_Y, it);
  bool nothing = excluded(of_x) & excluded(of_y);
  return {nothing ? 0 * k.level : dx, nothing ? 0 * k.level : dy};
}

}  // namespace kl
