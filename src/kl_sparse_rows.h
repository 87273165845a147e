// One row of which x lists some classes (kl_sparse.h), on the CPU: what y has of all other classes, the K + 1 classes that are
// made of it, and their derivatives as those of all classes. kl_isa.h includes this file behind kl_rows.h, whose sweeps over
// chunks it uses; klcore.backends.sparse calls the steps in their order, and computes the divergence between them.

// The sum of f's numbers 0 to n - 1 in the order of kl_tree.h; f(at, m, to) puts m of them, from `at` on, where it is told.
template <class F> double tree_sum(i64 at, i64 n, const F& f) {
  alignas(64) double t[CHUNK];
  if (n <= CHUNK) {
    if (n > 0) f(at, (int)n, t);
    return n > 0 ? sum(t, (int)n) : 0.0;
  }
  i64 part = CHUNK;
  while (part * CHUNK < n) part *= CHUNK;
  int count = 0;
  for (i64 start = 0; start < n; start += part) t[count++] = tree_sum(at + start, n - start < part ? n - start : part, f);
  return sum(t, count);
}

inline i64 number_of(const Sparse& s, const Row& row) { return (row.known - s.known) / ROW_NUMBERS; }

// f(i, slot) for the classes of a chunk that are listed
template <class F> void each_listed(const Sparse& s, i64 r, i64 start, int n, const F& f) {
  const Key* keys = s.keys + r * s.count;
  for (i64 k = first_slot(keys, s.count, start); k < s.count && (i64)class_of(keys[k]) < start + n; k++)
    if (leads(keys, k, s.count)) f((int)((i64)class_of(keys[k]) - start), k);
}

template <typename T>
void others_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double* state, i64 pitch, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const Sparse& of = *p.sparse;
  const T* y = load(p.x, row.x, start, n, s.x);
  bool any = false;
  each_listed(of, number_of(of, row), start, n, [&](int i, i64) {
    if (y != s.x) y = (const T*)std::memcpy(s.x, y, sizeof(T) * (size_t)n);
    s.x[i] = (T)no_mass(of.space_y);
    any = true;
  });
  for (int i = n; any && i % 16; i++) s.x[i] = s.x[0];
  if (is_log(of.space_y)) return norm_of(y, n, row.inverse_temperature, state, pitch);
  if constexpr (sizeof(T) == sizeof(double)) tally_of(y, n, p.x.dtype == FLOAT64, state, pitch);
}
inline void others_fold(const Plan& p, const Row& row, int, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  side_fold(is_log(p.sparse->space_y) ? LOGITS : COUNTS, row.inverse_temperature, from, count, pitch, to, to_pitch);
}
inline void others_finish(const Plan& p, const Row& row, int, const double* state, double* stats) {
  stats[0] = 0;
  for (int k = 0; k < NORM_STATES; k++)
    row.known[OTHERS + k] = state ? state[k] : k == 0 ? no_mass(p.sparse->space_y) : 0.0;
}

// The derivative by y, of which those of the classes listed and the others' are known (kl_sparse.h)
template <typename T>
void spread_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double*, i64, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const Sparse& of = *p.sparse;
  i64 r = number_of(of, row);
  const double *by_class = of.dys + r * (of.count + 1), slope = by_class[of.count];
  const Scale<T> scale(is_log(of.space_y) ? slope_of(slope, norm_at(row.known + OTHERS)) : slope);
  if (of.tail == RENORM || !is_log(of.space_y)) {
    T same = of.tail == RENORM ? T(0) : T(1) * scale;
    for (int i = 0; i < n; i++) s.dy[i] = same;
  } else {
    const T* y = load(p.x, row.x, start, n, s.x);
    const Inverse<T> it = inverse<T>(row.inverse_temperature);
    T max = (T)top_of(row.known[OTHERS]);
    for (int i = 0; i < ((n + 15) & ~15); i++) s.dy[i] = part_of_others(y[i], max, it);
    if (scale.far)
      for (int i = 0; i < n; i++) s.dy[i] = s.dy[i] * scale;
    else
      for (int i = 0; i < n; i++) s.dy[i] = s.dy[i] * scale.near;
  }
  each_listed(of, r, start, n, [&](int i, i64 k) { s.dy[i] = (T)by_class[k]; });
  store(p.dy, row.dy, start, n, s.dy, 1.0, p.stream);
}

// Doubles into a gradient's dtype, or summed over rows
inline void copy_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double*, i64, void* scratch) {
  Buffers<double>& s = *(Buffers<double>*)scratch;
  store(p.dx, row.dx, start, n, load(p.x, row.x, start, n, s.x), 1.0, p.stream);
}
inline void nothing_fold(const Plan&, const Row&, int, const double*, int, i64, double*, i64) {}
inline void nothing_finish(const Plan&, const Row&, int, const double*, double* stats) { stats[0] = 0; }

inline Kernel sparse_kernel(const Plan& p) {
  if (p.step == COPY) return {1, {0, 0, 0}, copy_chunk, nothing_fold, nothing_finish, 0};
  if (p.step == SPREAD) return {1, {0, 0, 0}, p.wide ? spread_chunk<double> : spread_chunk<float>, nothing_fold, nothing_finish, 0};
  bool wide = p.wide || !is_log(p.sparse->space_y);
  return {1, {NORM_STATES, 0, 0}, wide ? others_chunk<double> : others_chunk<float>, others_fold, others_finish, 0};
}

// ---- the K + 1 classes of a row ----------------------------------------------------------------------------------------------

inline double number_at(const Array& a, const char* at, i64 k) {
  double v = 0;
  read_numbers(a.dtype, at + k * a.stride, 0, 1, &v);
  return v;
}

// What x has of the class of slot s, those of the same class taken together; `top`: where logits are measured from.
inline double together(const Sparse& s, const Key* keys, i64 slot, const char* x, double top, double it) {
  bool logs = is_log(s.space_x);
  auto number = [&](i64 k) {
    double v = number_at(s.x, x, place_of(keys[k]));
    return s.space_x == LOGITS ? log_prob_of(v, top, 0.0, it) : v;
  };
  i64 first = slot;
  while (first > 0 && class_of(keys[first - 1]) == class_of(keys[slot])) first--;
  double most = number(slot);   // the largest of them
  if (first == slot || (logs && excluded(most))) return most;
  double sum = 0;
  for (i64 k = first; k <= slot; k++) sum += logs ? exp(number(k) - most) : number(k);
  return logs ? most + log(sum) : sum;
}

KL_APART inline void classes(const Plan& p, i64 r) {
  const Sparse& s = *p.sparse;
  Row row = locate(p, r);
  i64 count = s.count;
  const Key* keys = s.keys + r * count;
  double *xs = s.xs + r * (count + 1), *ys = s.ys + r * (count + 1), *known = row.known;
  double it = row.inverse_temperature, of_x = temper(s.space_x, it), of_y = temper(s.space_y, it);
  const char *x = at_row(p, s.x, r), *y = row.x;
  bool renorm = s.tail == RENORM;
  double top_x = -infinity<double>(), top_y = top_x, distinct = 0;
  for (i64 k = 0; k < count; k++) {
    xs[k] = no_mass(s.space_x);
    ys[k] = no_mass(s.space_y);
    if (!leads(keys, k, count)) continue;
    distinct++;
    ys[k] = number_at(p.x, y, class_of(keys[k]));
    top_y = ys[k] > top_y ? ys[k] : top_y;
    if (s.space_x == LOGITS) top_x = std::max(top_x, number_at(s.x, x, place_of(keys[k])));
  }
  double nothing = has_outside(keys, count) ? nan<double>() : 0.0;
  for (i64 k = 0; k < count; k++)
    if (leads(keys, k, count)) xs[k] = together(s, keys, k, x, top_of(top_x), of_x) + nothing;
  // x's others
  bool given = s.tail_mass.data;
  double mass = given ? number_at(s.tail_mass, at_row(p, s.tail_mass, r), 0) : 0.0, listed = 0.0;
  if (s.tail == BUCKET && !given)
    listed = tree_sum(0, count, [&](i64 at, int m, double* t) {
      for (int i = 0; i < m; i++) t[i] = is_log(s.space_x) ? exp(xs[at + i]) : xs[at + i];
    });
  double rest = mass_of_others(s.tail, given, mass, listed);
  bool empty = renorm || distinct == (double)p.n;
  xs[count] = (empty ? no_mass(s.space_x) : is_log(s.space_x) ? log(rest) : rest) + nothing;
  // y
  if (renorm) {
    for (i64 k = 0; k < count; k++)
      if (s.space_y == LOGITS) ys[k] = log_prob_of(ys[k], top_of(top_y), 0.0, of_y);
    ys[count] = no_mass(s.space_y);
    return;
  }
  Norm norm = {top_y, 0.0, 0.0};
  Tally tally = {0.0, 0.0, 0.0};
  if (s.space_y == LOGITS) {
    double zero = top_of(top_y);
    norm.rest = tree_sum(0, count, [&](i64 at, int m, double* t) {
      for (int i = 0; i < m; i++) t[i] = rest_of_listed(ys[at + i], top_y, zero, of_y);
    });
    for (i64 k = 0; k < count; k++) norm.count += (ys[k] == top_y) & !excluded(top_y) ? 1 : 0;
  } else if (s.space_y == COUNTS) {
    auto all = [&](double by) {
      return tree_sum(0, count, [&, by](i64 at, int m, double* t) {
        for (int i = 0; i < m; i++) t[i] = count_of(ys[at + i]) * by;
      });
    };
    tally = {all(1.0), all(FEWER), all(MORE)};
  }
  finish_all(s.space_y, norm, tally, of_y, known);
  for (i64 k = 0; k < count; k++) ys[k] = of_listed(s.space_y, ys[k], known, of_y);
  ys[count] = empty ? no_mass(s.space_y) : of_others(s.space_y, known, of_y);
}

// ---- their derivatives ---------------------------------------------------------------------------------------------------------

inline double prob_in(int space, double v) { return is_log(space) ? exp(v) : v; }

KL_APART inline void slopes_of_y(const Plan& p, i64 r) {
  const Sparse& s = *p.sparse;
  Row row = locate(p, r);
  i64 count = s.count + 1;
  double *d = s.dys + r * count, it = row.inverse_temperature;
  const double *ys = s.ys + r * count, *known = row.known;
  if (s.tail == RENORM) {   // through the normalisation already
    for (i64 k = 0; k < count; k++) d[k] *= temper(s.space_y, it);
    return;
  }
  if (s.space_y == LOGITS) {
    i64 top = 0;
    for (i64 k = 1; k < count; k++) top = ys[k] > ys[top] ? k : top;
    double centre = centre_of(d[top], exp(ys[top]));
    for (i64 k = 0; k < count; k++) d[k] = less_centre(d[k], exp(ys[k]), centre, k == top);
    double sum = tree_sum(0, count, [&](i64 at, int m, double* t) { std::copy(d + at, d + at + m, t); });
    for (i64 k = 0; k < count; k++) d[k] = (d[k] - exp(ys[k]) * sum) * it;
  } else if (s.space_y == COUNTS) {
    double mean = tree_sum(0, count, [&](i64 at, int m, double* t) {
      for (int i = 0; i < m; i++) t[i] = share_times(ys[at + i], d[at + i]);
    });
    for (i64 k = 0; k < count; k++) d[k] = through_share(d[k], mean, known + ALL);
  }
}

KL_APART inline void slopes_of_x(const Plan& p, i64 r) {
  const Sparse& s = *p.sparse;
  Row row = locate(p, r);
  i64 count = s.count;
  const Key* keys = s.keys + r * count;
  const double *d = s.dxs + r * (count + 1), *xs = s.xs + r * (count + 1), rest = xs[count];
  double *dx = s.dx + r * count, it = temper(s.space_x, row.inverse_temperature);
  const char* x = at_row(p, s.x, r);
  bool follows = has_rest(s.tail, s.tail_mass.data, s.space_x, rest);
  auto number = [&](i64 k) { return number_at(s.x, x, place_of(keys[k])); };
  double nothing = has_outside(keys, count) ? nan<double>() : 0.0;
  for (i64 last = count - 1, first; last >= 0; last = first - 1) {
    first = last;
    if (!is_listed(keys[last])) {
      dx[place_of(keys[last])] = nothing;
      continue;
    }
    while (first > 0 && class_of(keys[first - 1]) == class_of(keys[last])) first--;
    double by_class = (follows ? less_rest(s.space_x, d[last], xs[last], d[count], rest) : d[last]) * it, all = 0;
    bool shared = is_log(s.space_x) && first < last;
    for (i64 k = first; shared && k <= last; k++) all += share_in(number(k), number(last), it);
    for (i64 k = first; k <= last; k++)
      dx[place_of(keys[k])] = shared ? share_of_derivative(share_in(number(k), number(last), it), all, by_class) : by_class;
  }
}
