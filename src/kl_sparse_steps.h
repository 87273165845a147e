// The steps of one row in which x lists some classes (kl_sparse.h): the K + 1 classes, and their derivatives. Written once for
// the CPU (once for each instruction set: kl_isa.h) and the GPU (nvrtc.py). Both provide a `Team`, which does the work:
//   team.each(n, f)      calls f(i) for all i < n, in any order, and returns after all of them
//   team.sum(n, f)       the sum of all f(i), in the order of kl_tree.h
//   team.largest(n, f)   the largest f(i), or -infinity; NaN is ignored
//   team.count(n, f)     how many f(i) are true
#if defined(KL_DEVICE)   // the GPU, where there is no namespace around this file
namespace kl {
#endif

struct Listed {               // a row
  int tail, space_x, space_y;
  i64 n, count;               // classes of y, and in the list
  double it;                  // its inverse temperature
  const Key* keys;
  double *known, *xs, *ys;    // ROW_NUMBERS; count + 1 per side: all other classes as one, then those listed, in order
  bool given;                 // whether x's mass of all other classes is given; if not, it is 0:
  double mass;
};

// Calls f(i, slot) for the listed classes of a chunk, starting at its first slot, for every `step`-th slot.
template <class F>
inline void each_listed(const Key* keys, i64 count, i64 slot, i64 start, int n, const F& f, int step = 1) {
  for (i64 k = slot; k < count && (i64)class_of(keys[k]) < start + n; k += step)
    if (leads(keys, k, count)) f((int)((i64)class_of(keys[k]) - start), k);
}

inline i64 first_of_class(const Key* keys, i64 slot) {
  while (slot > 0 && class_of(keys[slot - 1]) == class_of(keys[slot])) slot--;
  return slot;
}

// x's number for the class of a slot, which combines all of that class's numbers; `top`: what logits are measured from
template <class X> inline double together(const Listed& r, i64 slot, const X& x, double top, double it) {
  bool logs = is_log(r.space_x);
  auto number = [&](i64 k) {
    double v = x(place_of(r.keys[k]));
    return r.space_x == LOGITS ? log_prob_of(v, top, 0.0, it) : v;
  };
  i64 first = first_of_class(r.keys, slot);
  if (first == slot) return number(slot);
  double most = -infinity<double>(), sum = 0;
  for (i64 k = first; k <= slot; k++) {
    double v = number(k);
    most = v > most ? v : most;
    sum = (logs ? v == v : v >= 0) ? sum : nan<double>();   // a number that is not a probability makes the sum NaN
  }
  bool beyond = excluded(most) | (most == infinity<double>());   // no number can be measured from an infinite one
  for (i64 k = first; k <= slot && !beyond; k++) sum += logs ? exp(number(k) - most) : number(k);
  return beyond ? most + sum : logs ? most + log(sum) : sum;
}

// x(place), y(class): the numbers of x and y
template <class Team, class X, class Y> inline void make_classes(const Team& team, const Listed& r, const X& x, const Y& y) {
  const i64 count = r.count;
  const Key* keys = r.keys;
  double *xs = r.xs + 1, *ys = r.ys + 1;
  double of_x = temper(r.space_x, r.it), of_y = temper(r.space_y, r.it), nothing = spoiled(keys, count, r.it, r.mass);
  bool renorm = r.tail == RENORM, of_logits = r.space_y == LOGITS;
  auto leading = [&](i64 k) { return leads(keys, k, count); };
  i64 distinct = team.count(count, leading);
  double top_x = r.space_x != LOGITS ? -infinity<double>() : team.largest(count, [&](i64 k) {
    return leading(k) ? x(place_of(keys[k])) : -infinity<double>();
  });
  team.each(count, [&](i64 k) {
    xs[k] = (leading(k) ? together(r, k, x, top_of(top_x), of_x) : no_mass(r.space_x)) + nothing;
    ys[k] = leading(k) ? y(class_of(keys[k])) : no_mass(r.space_y);
  });
  // x's mass of all other classes
  double listed = r.tail != BUCKET || r.given ? 0.0 : team.sum(count, [&](i64 k) { return prob_in(r.space_x, xs[k]); });
  double rest = mass_of_others(r.tail, r.given, r.mass, listed);
  bool empty = renorm || distinct == r.n;
  double others = empty ? no_mass(r.space_x) : is_log(r.space_x) ? log(rest) : rest;
  team.each(1, [&](i64) { r.xs[0] = others + nothing; });
  // y
  double top_y = team.largest(count, [&](i64 k) { return ys[k]; });
  if (renorm) {
    if (of_logits) team.each(count, [&](i64 k) { ys[k] = log_prob_of(ys[k], top_of(top_y), 0.0, of_y); });
    team.each(1, [&](i64) { r.ys[0] = no_mass(r.space_y); });
    return;
  }
  Norm norm = {top_y, 0.0, 0.0};
  Tally tally = {0.0, 0.0, 0.0};
  if (of_logits) {
    double zero = top_of(top_y);
    norm.rest = team.sum(count, [&](i64 k) { return rest_of_listed(ys[k], top_y, zero, of_y); });
    norm.count = (double)team.count(count, [&](i64 k) { return (ys[k] == top_y) & !excluded(top_y); });
  } else if (r.space_y == COUNTS) {
    auto all = [&](double by) { return team.sum(count, [&, by](i64 k) { return count_of(ys[k]) * by; }); };
    tally = {all(1.0), all(FEWER), all(MORE)};
  }
  double known[ROW_NUMBERS];
  for (int k = 0; k < ROW_NUMBERS; k++) known[k] = r.known[k];
  finish_all(r.space_y, norm, tally, of_y, known);
  team.each(count, [&](i64 k) { ys[k] = of_listed(r.space_y, ys[k], known, of_y); });
  team.each(1, [&](i64) {
    for (int k = ALL; k < ROW_NUMBERS; k++) r.known[k] = known[k];
    r.ys[0] = empty ? no_mass(r.space_y) : of_others(r.space_y, known, of_y);
  });
}

// ---- their derivatives ---------------------------------------------------------------------------------------------------------

// d: on entry, the derivatives with respect to ys; on return, those with respect to y's numbers, and the one of all other classes
template <class Team> inline void slopes_of_y(const Team& team, const Listed& r, double* d) {
  const i64 count = r.count + 1;
  const double* ys = r.ys;
  if (r.tail == RENORM) {   // d has gone through the normalisation already
    double it = temper(r.space_y, r.it);
    team.each(count, [&](i64 k) { d[k] *= it; });
  } else if (r.space_y == LOGITS) {
    double most = team.largest(count, [&](i64 k) { return ys[k]; });
    i64 top = (i64)-team.largest(count, [&](i64 k) { return -(double)(ys[k] == most ? k : count - 1); });   // the first of them
    double centre = centre_of(d[top], exp(ys[top]));
    team.each(count, [&](i64 k) { d[k] = less_centre(d[k], exp(ys[k]), centre, k == top); });
    double sum = team.sum(count, [&](i64 k) { return d[k]; });
    team.each(count, [&](i64 k) { d[k] = (d[k] - share_times(exp(ys[k]), sum)) * r.it; });
  } else if (r.space_y == COUNTS) {
    double mean = team.sum(count, [&](i64 k) { return share_times(ys[k], d[k]); });
    team.each(count, [&](i64 k) { d[k] = through_share(d[k], mean, r.known + ALL); });
  }
}

// d: the derivatives with respect to xs; dx: those with respect to x's numbers, in the caller's order
template <class Team, class X> inline void slopes_of_x(const Team& team, const Listed& r, const X& x, const double* d, double* dx) {
  const i64 count = r.count;
  const Key* keys = r.keys;
  double it = temper(r.space_x, r.it), nothing = spoiled(keys, count, r.it, r.mass), rest = r.xs[0];
  bool follows = has_rest(r.tail, r.given, r.space_x, rest);
  auto number = [&](i64 k) { return x(place_of(keys[k])); };
  team.each(count, [&](i64 last) {
    if (!is_listed(keys[last])) dx[place_of(keys[last])] = nothing;
    if (!leads(keys, last, count)) return;
    i64 first = first_of_class(keys, last);
    double by_class = (follows ? less_rest(r.space_x, d[last + 1], r.xs[last + 1], d[0], rest) : d[last + 1]) * it, all = 0;
    bool shared = is_log(r.space_x) && first < last;
    for (i64 k = first; shared && k <= last; k++) all += share_in(number(k), number(last), it);
    for (i64 k = first; k <= last; k++) {
      double own = shared ? share_in(number(k), number(last), it) : 1.0;
      dx[place_of(keys[k])] = shared ? share_of_derivative(own, all, last - first + 1, by_class) : by_class;
    }
  });
}

#if defined(KL_DEVICE)
}  // namespace kl
#endif
