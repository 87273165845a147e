// One row in which x lists some classes (kl_sparse.h), on the CPU: y's numbers of all other classes, the K + 1 classes made from
// these (kl_sparse_steps.h), and their derivatives, taken back to all classes. Included after kl_rows.h (kl_isa.h), whose
// sweeps over chunks it uses. klcore.backends.sparse calls the steps in order, and computes the divergence in between.

// The sum of n numbers, from number `at` on, in the order of kl_tree.h; f(at, m, to) writes m of them, from `at` on, to `to`.
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

template <class F> void each_listed(const Sparse& s, i64 r, i64 start, int n, const F& f) {
  const Key* keys = s.keys + r * s.count;
  each_listed(keys, s.count, first_slot(keys, s.count, start), start, n, f);
}

template <typename T>
void others_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double* state, i64 pitch, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const Sparse& of = *p.sparse;
  const T *y = load(p.x, row.x, start, n, s.x), *ahead = y + CHUNK;
  bool any = false;
  each_listed(of, number_of(of, row), start, n, [&](int i, i64) {
    if (y != s.x) y = (const T*)std::memcpy(s.x, y, sizeof(T) * (size_t)n);
    s.x[i] = (T)no_mass(of.space_y);
    any = true;
  });
  for (int i = n; any && i % 16; i++) s.x[i] = s.x[0];
  if (is_log(of.space_y)) return norm_of(y, n, row.inverse_temperature, state, pitch, ahead);
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

// The derivative with respect to y, from that of each listed class and that of all others (kl_sparse.h)
template <typename T>
void spread_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double*, i64, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const Sparse& of = *p.sparse;
  i64 r = number_of(of, row);
  const double *by_class = of.slopes + r * (of.count + 1), slope = by_class[0];
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
  each_listed(of, r, start, n, [&](int i, i64 k) { s.dy[i] = (T)by_class[k + 1]; });
  store(p.dy, row.dy, start, n, s.dy, 1.0, p.stream);
}

// Copies doubles into a gradient of any dtype, or sums them over rows.
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

struct Serial {               // a team of one
  template <class F> void each(i64 n, const F& f) const {
    for (i64 i = 0; i < n; i++) f(i);
  }
  template <class F> double sum(i64 n, const F& f) const {
    return tree_sum(0, n, [&](i64 at, int m, double* t) {
      for (int i = 0; i < m; i++) t[i] = f(at + i);
    });
  }
  template <class F> double largest(i64 n, const F& f) const {
    double most = -infinity<double>();
    for (i64 i = 0; i < n; i++) {
      double v = f(i);
      most = v > most ? v : most;
    }
    return most;
  }
  template <class F> i64 count(i64 n, const F& f) const {
    i64 found = 0;
    for (i64 i = 0; i < n; i++) found += f(i) ? 1 : 0;
    return found;
  }
};

// Calls f(the row, a function that reads x's numbers).
template <class F> void with_listed(const Plan& p, i64 r, const Row& row, const F& f) {
  const Sparse& s = *p.sparse;
  const char *x = at_row(p, s.x, r), *mass = s.tail_mass.data ? at_row(p, s.tail_mass, r) : nullptr;
  f(Listed{s.tail, s.space_x, s.space_y, p.n, s.count, row.inverse_temperature, s.keys + r * s.count, row.known,
           s.xs + r * (s.count + 1), s.ys + r * (s.count + 1), mass != nullptr, mass ? number_at(s.tail_mass, mass, 0) : 0.0},
    [&](i64 place) { return number_at(s.x, x, place); });
}

KL_APART inline void classes(const Plan& p, i64 r) {
  Row row = locate(p, r);
  with_listed(p, r, row, [&](const Listed& listed, auto x) {
    for (i64 k = 0; k < listed.count; k++)   // they are far apart in memory: fetch them at the same time
      if (is_listed(listed.keys[k])) prefetch(row.x + class_of(listed.keys[k]) * p.x.stride);
    make_classes(Serial(), listed, x, [&](i64 c) { return number_at(p.x, row.x, c); });
  });
}
KL_APART inline void slopes_of_y(const Plan& p, i64 r) {
  with_listed(p, r, locate(p, r), [&](const Listed& listed, auto) {
    slopes_of_y(Serial(), listed, p.sparse->slopes + r * (listed.count + 1));
  });
}
KL_APART inline void slopes_of_x(const Plan& p, i64 r) {
  with_listed(p, r, locate(p, r), [&](const Listed& listed, auto x) {
    slopes_of_x(Serial(), listed, x, p.sparse->slopes + r * (listed.count + 1), p.sparse->dx + r * listed.count);
  });
}
