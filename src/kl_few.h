// Rows of at most COLUMNS classes on the CPU: a block of rows at a time, one row per lane, class by class in loops over the
// lanes. Included after kl_rows.h, once for every instruction set (kl_isa.h); kl_batch.h calls what `few` returns.
// There are no formulas here, and the bits are those of kl_rows.h: only the order of the loops differs. Rows that the short
// forms cannot handle are marked, and kl_batch.h has them computed one by one. Indices have 64 bits: CPython's -fwrapv makes
// sums of 32-bit indices opaque to gcc's vectoriser.

// Lanes of a block: a multiple of the vector length, and few enough for the block's arrays to fit in the first-level cache
template <typename T> constexpr int LEAST_LANES = 64 / sizeof(T);
constexpr int MOST_LANES = 16 * LEAST_LANES<float>;
inline int lanes(i64 n, bool wide) {
  i64 least = wide ? LEAST_LANES<double> : LEAST_LANES<float>, some = 64 * least / n / least * least;
  return (int)(some < least ? least : some > 16 * least ? 16 * least : some);
}

// A block's numbers: class i of lane r is at i * pitch + r. The arrays have different offsets within a page, as in Buffers.
template <typename T> struct Block {
  static constexpr int SIZE = (COLUMNS * 64 + 576) / (int)sizeof(T);
  T x[SIZE], y[SIZE], a[SIZE], dx[SIZE], dy[SIZE];
  double room[COLUMNS / 2 * LEAST_LANES<float>];
};
static_assert(sizeof(Block<float>) <= SCRATCH && sizeof(Block<double>) <= SCRATCH);
template <typename T> using Lane = T[MOST_LANES];   // one number per row

// ---- from rows to lanes and back --------------------------------------------------------------------------------------------

// Calls f(first row, lane, count) for runs of the rows [r, r + count) over which every array has a constant step.
template <class F> void runs(const Plan& p, i64 r, int count, F f) {
  i64 last = p.ndim ? p.shape[p.ndim - 1] : 1;
  for (int k = 0, m; k < count; k += m) {
    i64 left = last - (r + k) % last;
    m = left < count - k ? (int)left : count - k;
    f(locate(p, r + k), k, m);
  }
}
inline const char* at_row(const Plan& p, const Array& a, i64 r) {
  const char* at = a.data;
  for (i64 d = p.ndim - 1; d >= 0; d--) {
    at += (d > 0 ? r % p.shape[d] : r) * a.batch[d];
    r /= p.shape[d];
  }
  return at;
}
inline i64 step_of(const Plan& p, const Array& a) { return p.ndim ? a.batch[p.ndim - 1] : 0; }

template <typename T> void turn_rows(const T* rows, i64 step, i64 n, i64 m, T* lanes, i64 pitch) {
  constexpr i64 SIZE = sizeof(T);
  auto to = [=](i64 apart, i64 classes) KL_LAMBDA { turn<SIZE>((const char*)rows, apart * SIZE, m, classes, (char*)lanes, pitch * SIZE); };
  if (n == 2 && step == 2) to(2, 2);   // constants, with which the compiler vectorises: no blocks
  else if (n == 3 && step == 3) to(3, 3);
  else to(step, n);
}
template <typename T> void turn_lanes(const T* lanes, i64 pitch, i64 n, i64 m, T* rows) {
  constexpr i64 SIZE = sizeof(T);
  auto back = [=](i64 classes) KL_LAMBDA { turn<SIZE>((const char*)lanes, pitch * SIZE, classes, m, (char*)rows, classes * SIZE); };
  if (n == 2) back(2);
  else if (n == 3) back(3);
  else back(n);
}

// Copies the rows from `at` on, `step` bytes apart, to lanes. `room` holds as many numbers.
template <typename T>
void take(const Array& a, const char* at, i64 step, i64 n, i64 m, T* lanes, i64 pitch, T* room) {
  i64 size = size_of(a.dtype);
  if (a.stride != size || step == size) {
    for (i64 i = 0; i < n; i++) {
      const char* from = at + i * a.stride;
      if (step == size)   // the hardware prefetcher cannot predict where the next block is
        for (i64 k = 0; k < m * size; k += 64) prefetch(from + m * size + k);
      widen(a.dtype, from, step, (int)m, lanes + i * pitch);
    }
    return;
  }
  const T* rows = room;
  i64 apart = n;
  if (a.dtype == code_of<T>() && (std::uintptr_t)at % sizeof(T) == 0 && step % (i64)sizeof(T) == 0) {
    rows = (const T*)at;
    apart = step / (i64)sizeof(T);
  } else if (step == n * size) {
    widen(a.dtype, at, size, (int)(n * m), room);
  } else {
    for (i64 r = 0; r < m; r++) widen(a.dtype, at + r * step, size, (int)n, room + r * n);
  }
  turn_rows(rows, apart, n, m, lanes, pitch);
}

template <typename T>
void give(const Array& a, char* at, i64 step, i64 n, i64 m, const T* lanes, i64 pitch, double scale, bool stream, T* room) {
  i64 size = size_of(a.dtype);
  if (a.stride != size || step == size) {
    for (i64 i = 0; i < n; i++) store_to(a.dtype, at + i * a.stride, step, (int)m, lanes + i * pitch, scale, stream);
    return;
  }
  turn_lanes(lanes, pitch, n, m, room);
  if (step == n * size) return store_to(a.dtype, at, size, (int)(n * m), room, scale, stream);
  for (i64 r = 0; r < m; r++) store_to(a.dtype, at + r * step, size, (int)n, room + r * n, scale, stream);
}

inline void widen_numbers(int dtype, const char* at, i64 step, i64 n, double* to) { widen(dtype, at, step, (int)n, to); }

// Several rows of a plan, with their weights and inverse temperatures
template <typename T> struct Rows {
  const Plan& p;
  i64 first;
  i64 n, count, pitch;
  alignas(64) Lane<double> weight, inverse_temperature;
  alignas(64) Lane<T> inverse_high, inverse_low, inverse_of_low;

  Rows(const Plan& plan, i64 r, int rows) : p(plan), first(r), n(plan.n), count(rows) {
    pitch = (rows + LEAST_LANES<T> - 1) / LEAST_LANES<T> * LEAST_LANES<T>;
    if (!weighs()) return;
    read_each(p.weights, weight);
    for (i64 k = 0; k < pitch; k++) weight[k] *= p.factor;
  }
  // for kinds of rows that take a temperature
  void cool() {
    if (p.temperatures.data) {
      read_each(p.temperatures, inverse_temperature);
      for (i64 k = 0; k < pitch; k++) inverse_temperature[k] = 1 / inverse_temperature[k];
    } else {
      for (i64 k = 0; k < pitch; k++) inverse_temperature[k] = p.inverse_temperature;
    }
    for (i64 k = 0; k < pitch; k++) {
      Inverse<T> it = inverse<T>(inverse_temperature[k]);
      inverse_high[k] = it.value;
      inverse_low[k] = it.low;
      inverse_of_low[k] = it.of_low;
    }
  }
  Inverse<T> it(i64 r) const { return {inverse_high[r], inverse_low[r], inverse_of_low[r]}; }
  // One number per row; 1 if there are none, and in lanes beyond the last row
  void read_each(const Array& a, double* numbers) const {
    for (i64 k = 0; k < pitch; k++) numbers[k] = 1;
    if (a.data)
      runs(p, first, (int)count, [&](const Row&, int k, int m) {
        auto read = a.dtype <= BFLOAT16 ? widen_numbers : read_numbers;   // floats are read in vectors
        read(a.dtype, at_row(p, a, first + k), step_of(p, a), m, numbers + k);
      });
  }
  bool weighs() const { return p.weights.data || p.factor != 1; }
  int size() const { return (int)(n * pitch); }

  // Lanes beyond the last row repeat the first one.
  KL_APART void read(const Array& a, const char* Row::*at, T* lanes, T* room) const {
    runs(p, first, (int)count, [&](const Row& row, int k, int m) { take(a, row.*at, step_of(p, a), n, m, lanes + k, pitch, room); });
    for (i64 i = 0; i < n; i++)
      for (i64 k = count; k < pitch; k++) lanes[i * pitch + k] = lanes[i * pitch];
  }
  // Writes lanes times the rows' weights; overwrites lanes and room
  KL_APART void write(const Array& a, char* Row::*at, T* lanes, double scale, T* room) const {
    if (weighs()) {
      alignas(64) Lane<T> by;
      bool far = false;
      for (i64 r = 0; r < pitch; r++) {
        const Scale<T> s(weight[r] * scale);
        by[r] = s.near;
        far |= s.far;
      }
      for (i64 i = 0; i < n; i++)
        for (i64 r = 0; r < pitch; r++) {
          T v = far ? lanes[i * pitch + r] * Scale<T>(weight[r] * scale) : lanes[i * pitch + r] * by[r];
          lanes[i * pitch + r] = weight[r] == 0 ? T(0) : v;
        }
      scale = 1;
    }
    runs(p, first, (int)count, [&](const Row& row, int k, int m) {
      give(a, row.*at, step_of(p, a), n, m, lanes + k, pitch, scale, p.stream, room);
    });
  }
  KL_APART void write_values(double* values) const {
    for (i64 r = 0; r < count && weighs(); r++) values[r] = weight[r] == 0 ? 0.0 : weight[r] == 1 ? values[r] : values[r] * weight[r];
    if (p.output == PER_ROW)
      runs(p, first, (int)count, [&](const Row& row, int k, int m) {
        narrow_to(p.value.dtype, values + k, 1.0, m, row.value, step_of(p, p.value));
      });
  }
};

// ---- sums and maxima --------------------------------------------------------------------------------------------------------

// The sum of f(j) over each lane's classes: column i takes i + 64, + 32, ... , + 1 (kl_tree.h)
template <class F> void add_lanes(i64 n, i64 pitch, double* __restrict room, double* __restrict sums, F f) {
  i64 half = 1;
  while (2 * half < n) half *= 2;
  i64 both = (n - half) * pitch, all = half * pitch;
  if (n == 1) both = 0;
  for (i64 j = 0; j < both; j++) room[j] = (double)f(j) + (double)f(j + all);
  for (i64 j = both; j < all; j++) room[j] = (double)f(j);
  for (i64 h = all / 2; h >= pitch; h /= 2)
    for (i64 j = 0; j < h; j++) room[j] += room[j + h];
  for (i64 r = 0; r < pitch; r++) sums[r] = room[r] + 0.0;
}

// Each lane's maximum. Among equal zeros it is the one that `maximum` finds: classes are visited in its order of preference.
template <typename T> KL_APART void maxima(const T* __restrict t, i64 n, i64 pitch, T* __restrict m) {
  i64 n16 = (n + 15) & ~(i64)15, slots = n16 < 64 ? 16 : 64;
  for (i64 r = 0; r < pitch; r++) m[r] = -infinity<T>();
  for (i64 k = 0; k < slots; k++) {
    i64 slot = 0;
    for (i64 bit = 1; bit < slots; bit *= 2) slot = 2 * slot + (k & bit ? 1 : 0);
    for (i64 i = slot; i < n; i += n16 < 64 ? 16 : n16 == 128 || i >= 64 ? (n16 == 128 ? 64 : 16) : slot < 16 ? 64 : n)
      for (i64 r = 0; r < pitch; r++) {
        T a = t[i * pitch + r], b = m[r];
        m[r] = a > b ? a : b;
      }
  }
}

// ---- the kinds of rows ------------------------------------------------------------------------------------------------------

template <typename T> void few_terms(const Plan& p, i64 r, int count, double* values, char*, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  rows.read(p.x, &Row::x, s.x, s.a);
  T* y = has_y(p.operation) ? s.y : s.x;
  if (has_y(p.operation)) rows.read(p.y, &Row::y, s.y, s.a);
  terms_of<T>(p)(s.x, y, nullptr, p.parameter, rows.size(), s.a, s.dx, s.dy);
  if (p.dx.data) rows.write(p.dx, &Row::dx, s.dx, p.gradient_scale, s.x);
  if (p.dy.data) rows.write(p.dy, &Row::dy, s.dy, p.gradient_scale, s.x);
  if (p.output == TERMS) return rows.write(p.value, &Row::value, s.a, 1, s.x);
  const T* a = s.a;
  add_lanes(rows.n, rows.pitch, s.room, values, [=](i64 j) KL_LAMBDA { return a[j]; });
  rows.write_values(values);
}

// The divergence of two rows of logits, by the steps of logits_chunk and logits_finish
template <typename T> struct LogitsLanes {
  typedef typename Real<T>::Bits Bits;
  alignas(64) Lane<T> max_a, max_b, m, low, mean;
  alignas(64) Lane<T> a, b, c, d, p, t, t_low;   // Slopes
  alignas(64) Lane<double> weights, x, g;
  alignas(64) Lane<Bits> odd;
};

template <typename T, bool TEMPERED>
KL_APART void few_weights(const T* __restrict a, const T* __restrict b, i64 n, i64 pitch, const T* __restrict max_a,
                 const T* __restrict max_b, const Rows<T>& rows, T* __restrict w, T* __restrict c) {
  for (i64 i = 0; i < n * pitch; i += pitch) {
    for (i64 r = 0; r < pitch; r++) w[i + r] = weight<TEMPERED>(a[i + r], max_a[r], rows.it(r));
    for (i64 r = 0; r < pitch; r++) c[i + r] = fma(w[i + r], below_tops(a[i + r], b[i + r], max_a[r], max_b[r]), T(0));
  }
}

// The anchors, from c, the sums of weights times below_tops
template <typename T> KL_APART void few_anchors(const double* __restrict c, i64 pitch, LogitsLanes<T>& k) {
  for (i64 r = 0; r < pitch; r++) {
    double mean = c[r] / k.weights[r];
    Anchor<T> at = anchor(k.max_a[r], k.max_b[r], mean);
    k.m[r] = at.m;
    k.low[r] = at.low;
    k.mean[r] = at.mean;
    k.odd[r] = usable((double)at.mean) ? 0 : 1;
  }
}

template <typename T, bool TEMPERED>
KL_APART void few_spread(const T* __restrict a, const T* __restrict b, const T* __restrict w, i64 n, i64 pitch, LogitsLanes<T>& k,
                const Rows<T>& rows, T* __restrict z, T* __restrict low, T* __restrict e) {
  typename Real<T>::Bits* __restrict odd = k.odd;
  for (i64 i = 0; i < n * pitch; i += pitch) {
    for (i64 r = 0; r < pitch; r++) {
      Anchor<T> at = {k.max_a[r], k.max_b[r], k.m[r], k.low[r], k.mean[r]};
      Pair<T> any = centred<TEMPERED>(a[i + r], b[i + r], at, rows.it(r)), mine = counted(any, w[i + r]);
      z[i + r] = mine.value;
      if constexpr (TEMPERED) low[i + r] = mine.low;
      odd[r] |= above_range(any.value) ? 1 : 0;
    }
    for (i64 r = 0; r < pitch; r++) odd[r] |= below_range(z[i + r]) ? 1 : 0;
  }
  for (i64 j = 0; j < n * pitch; j++) e[j] = spread_of<TEMPERED>(Pair<T>{z[j], TEMPERED ? low[j] : T(0)});
}

template <typename T, bool SLOPES> KL_APART void few_finish(const Rows<T>& rows, LogitsLanes<T>& k, double* __restrict values) {
  for (i64 r = 0; r < rows.pitch; r++) {
    Anchor<T> at = {k.max_a[r], k.max_b[r], k.m[r], k.low[r], k.mean[r]};
    double stats[MAX_STATS], it = rows.inverse_temperature[r];
    logits_finish(near_state(at, k.weights[r], k.x[r], k.g[r]), it, stats);
    values[r] = stats[VALUE];
    if constexpr (SLOPES) {
      Slopes<T> s = slopes<T>((double)at.max_a, (double)at.max_b, mean_of(at), stats, it);
      k.a[r] = s.a;
      k.b[r] = s.b;
      k.c[r] = s.c;
      k.d[r] = s.d;
      k.p[r] = s.p;
      k.t[r] = s.t;
      k.t_low[r] = s.t_low;
    }
  }
}

template <typename T, int TERM, bool TEMPERED>
KL_APART void few_logits_terms(const T* __restrict a, const T* __restrict b, const T* __restrict w, i64 n, i64 pitch,
                      LogitsLanes<T>& k, const Rows<T>& rows, T* __restrict term) {
  typename Real<T>::Bits* __restrict odd = k.odd;
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      Anchor<T> at = {k.max_a[r], k.max_b[r], k.m[r], k.low[r], k.mean[r]};
      Slopes<T> s = {k.a[r], k.b[r], k.c[r], k.d[r], k.p[r], k.t[r], k.t_low[r]};
      bool good;
      term[i + r] = near_term<TERM, TEMPERED>(a[i + r], b[i + r], w[i + r], at, s, rows.it(r), good);
      odd[r] |= good ? 0 : 1;
    }
}

template <typename T>
KL_APART void few_slopes(const T* __restrict w, const T* __restrict z, i64 n, i64 pitch, const LogitsLanes<T>& k, T* __restrict e_dx,
                T* __restrict dy) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      T growth = e_dx[i + r] + z[i + r];
      dy[i + r] = w[i + r] * fma(growth, k.a[r], k.b[r]);
      e_dx[i + r] = w[i + r] * fma(z[i + r], k.c[r], k.d[r]);
    }
}

template <typename T, bool TEMPERED>
void few_logits(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  LogitsLanes<T> k;
  i64 n = rows.n, pitch = rows.pitch;
  rows.cool();
  rows.read(p.x, &Row::x, s.x, s.a);
  rows.read(p.y, &Row::y, s.y, s.a);
  T *w = s.a, *e = s.dx, *z = s.dy, *room = (T*)s.room;
  maxima(s.x, n, pitch, k.max_a);
  maxima(s.y, n, pitch, k.max_b);
  few_weights<T, TEMPERED>(s.x, s.y, n, pitch, k.max_a, k.max_b, rows, w, e);
  add_lanes(n, pitch, s.room, k.weights, [=](i64 j) KL_LAMBDA { return w[j]; });
  add_lanes(n, pitch, s.room, k.x, [=](i64 j) KL_LAMBDA { return e[j]; });
  few_anchors(k.x, pitch, k);
  few_spread<T, TEMPERED>(s.x, s.y, w, n, pitch, k, rows, z, room, e);
  add_lanes(n, pitch, s.room, k.x, [=](i64 j) KL_LAMBDA { return fma(w[j], z[j], T(0)); });
  add_lanes(n, pitch, s.room, k.g, [=](i64 j) KL_LAMBDA { return fma(w[j], e[j], T(0)); });
  bool gradient = p.dx.data || p.dy.data;
  (gradient || p.output == TERMS ? few_finish<T, true> : few_finish<T, false>)(rows, k, values);
  if (p.output == TERMS)
    (p.operation == REL_ENTR ? few_logits_terms<T, LITERAL, TEMPERED> : few_logits_terms<T, DEVIANCE, TEMPERED>)(
        s.x, s.y, w, n, pitch, k, rows, room);
  if (gradient) {
    few_slopes(w, z, n, pitch, k, e, s.y);
    if (p.dx.data) rows.write(p.dx, &Row::dx, e, p.gradient_scale, s.x);
    if (p.dy.data) rows.write(p.dy, &Row::dy, s.y, p.gradient_scale, s.x);
  }
  for (i64 i = 0; i < count; i++) alone[i] = k.odd[i] != 0;
  if (p.output == TERMS) return rows.write(p.value, &Row::value, room, 1, s.x);
  rows.write_values(values);
}

// The two values that log_norm chooses from, per lane; only the first if no lane has ties. In one loop gcc would use branches.
KL_APART inline void both_logs(const double* __restrict count, const double* __restrict rest, i64 pitch, double* __restrict alone,
                               double* __restrict tied) {
  i64 ties = 0;
  for (i64 r = 0; r < pitch; r++) ties |= count[r] == 1.0 ? 0 : 1;
  for (i64 r = 0; r < pitch; r++) alone[r] = log_alone({0.0, count[r], rest[r]});
  for (i64 r = 0; r < pitch; r++) tied[r] = 0.0;
  for (i64 r = 0; ties && r < pitch; r++) tied[r] = log_tied({0.0, count[r], rest[r]});
}

// cross-entropy and entropy with logits, by the steps of cross_chunk and cross_finish
template <typename T> struct CrossLanes {
  alignas(64) Lane<T> max_a, max_b, zero_a, zero_b, inv_s, log_s, q, mean;
  alignas(64) Lane<double> s, cost, count, rest, alone, tied;
  alignas(64) Lane<typename Real<T>::Bits> odd;
};

template <typename T, int SX, int SY, bool ALONE, bool TEMPERED>
KL_APART bool few_pay(const T* __restrict x, const T* __restrict y, i64 n, i64 pitch, const CrossLanes<T>& k,
                      const Rows<T>& rows, T* __restrict w, T* __restrict c, T* __restrict e) {
  typename Real<T>::Bits large = 0;
  for (i64 i = 0; i < n * pitch; i += pitch) {
    for (i64 r = 0; r < pitch; r++) w[i + r] = cross_weight<SX, TEMPERED>(x[i + r], k.zero_a[r], rows.it(r));
    for (i64 r = 0; r < pitch; r++) {
      T any = cost_of<SY>(y[i + r], k.zero_b[r], rows.inverse_high[r]);
      large |= wants_look<SX>(x[i + r], any) ? 1 : 0;
      c[i + r] = counted_cost(w[i + r], any);
    }
    if constexpr (SY == LOGITS)
      for (i64 r = 0; r < pitch; r++) {
        T v = ALONE ? w[i + r] : cross_weight<SY, TEMPERED>(y[i + r], k.zero_b[r], rows.it(r));
        e[i + r] = y[i + r] == k.max_b[r] ? T(0) : v;
      }
  }
  return large;
}

// OUT says which output is wanted: SUM_VALUE, SUM_DX or SUM_DY.
template <typename T, int SX, int SY, bool TEMPERED, int OUT>
KL_APART void few_cross_output(const T* __restrict x, const T* __restrict y, i64 n, i64 pitch, const CrossLanes<T>& k,
                               const Rows<T>& rows, T* __restrict out) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      CrossRow<T> row = {k.zero_a[r], k.inv_s[r], k.zero_b[r], k.log_s[r], k.q[r], k.mean[r], rows.it(r)};
      CrossOutputs<T> o = cross_class<SX, SY, TEMPERED>(x[i + r], y[i + r], row);
      out[i + r] = OUT == SUM_VALUE ? o.term : OUT == SUM_DX ? o.dx : o.dy;
    }
}

template <typename T, int SX, int SY, bool ALONE, bool TEMPERED>
void few_cross(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  CrossLanes<T> k;
  i64 n = rows.n, pitch = rows.pitch;
  rows.cool();
  rows.read(p.x, &Row::x, s.x, s.a);
  if (!ALONE) rows.read(p.y, &Row::y, s.y, s.a);
  const T *x = s.x, *y = ALONE ? s.x : s.y;
  std::fill(k.max_a, k.max_a + pitch, T(0));
  std::fill(k.max_b, k.max_b + pitch, T(0));
  if (SX == LOGITS) maxima(x, n, pitch, k.max_a);
  if (SY == LOGITS) maxima(y, n, pitch, k.max_b);
  for (i64 i = 0; i < pitch; i++) {
    k.zero_a[i] = excluded(k.max_a[i]) ? T(0) : k.max_a[i];
    k.zero_b[i] = excluded(k.max_b[i]) ? T(0) : k.max_b[i];
    k.odd[i] = 0;
  }
  T *w = s.a, *c = s.dx, *e = s.dy;
  bool large = few_pay<T, SX, SY, ALONE, TEMPERED>(x, y, n, pitch, k, rows, w, c, e);
  for (i64 i = 0; large && i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      bool odd = cannot_be<SX, SY>(x[i + r], y[i + r]) |
                 costs_double<SX, SY>(x[i + r], y[i + r], k.zero_a[r], k.zero_b[r], rows.inverse_high[r], p.dx.data);
      k.odd[r] |= odd ? 1 : 0;
    }
  add_lanes(n, pitch, s.room, k.s, [=](i64 j) KL_LAMBDA { return w[j]; });
  add_lanes(n, pitch, s.room, k.cost, [=](i64 j) KL_LAMBDA { return fma(w[j], c[j], T(0)); });
  if constexpr (SY == LOGITS) {
    add_lanes(n, pitch, s.room, k.rest, [=](i64 j) KL_LAMBDA { return e[j]; });
    for (i64 i = 0; i < n * pitch; i += pitch)
      for (i64 r = 0; r < pitch; r++) c[i + r] = y[i + r] == k.max_b[r] ? T(1) : T(0);
    add_lanes(n, pitch, s.room, k.count, [=](i64 j) KL_LAMBDA { return c[j]; });
    for (i64 i = 0; i < pitch; i++) k.count[i] = excluded(k.max_b[i]) ? 0.0 : k.count[i];
    both_logs(k.count, k.rest, pitch, k.alone, k.tied);
  }
  for (i64 i = 0; i < pitch; i++) {
    double log_s = SY == LOGITS ? log_norm({k.max_b[i], k.count[i], k.rest[i]}, k.alone[i], k.tied[i]) : 0.0;
    double stats[MAX_STATS];
    cross_finish<SX, SY>({k.max_a[i], k.s[i], k.max_b[i], k.count[i], k.rest[i], k.cost[i], 0.0}, log_s, stats);
    CrossRow<T> row = cross_row<T>(stats, rows.inverse_temperature[i]);
    values[i] = stats[VALUE];
    k.inv_s[i] = row.inv_s;
    k.log_s[i] = row.log_s;
    k.q[i] = row.q;
    k.mean[i] = row.mean;
    k.odd[i] |= costs_double(row) ? 1 : 0;
  }
  for (i64 i = 0; i < count; i++) alone[i] = k.odd[i] != 0;
  if (p.dx.data) {
    few_cross_output<T, SX, SY, TEMPERED, SUM_DX>(x, y, n, pitch, k, rows, s.dx);
    rows.write(p.dx, &Row::dx, s.dx, p.gradient_scale, s.a);
  }
  if (p.dy.data) {
    few_cross_output<T, SX, SY, TEMPERED, SUM_DY>(x, y, n, pitch, k, rows, s.dy);
    rows.write(p.dy, &Row::dy, s.dy, p.gradient_scale, s.a);
  }
  if (p.output != TERMS) return rows.write_values(values);
  few_cross_output<T, SX, SY, TEMPERED, SUM_VALUE>(x, y, n, pitch, k, rows, s.dx);
  rows.write(p.value, &Row::value, s.dx, 1, s.a);
}
template <typename T, int SX, int SY, bool ALONE> Few few_cross_for(const Plan& p) {
  constexpr bool ALWAYS = sizeof(T) == sizeof(double);
  return is_tempered(p) ? few_cross<T, SX, SY, ALONE, true> : few_cross<T, SX, SY, ALONE, ALWAYS>;
}
template <typename T> Few few_cross_of(const Plan& p) {
  return cross_pair(p, [&](auto s) { return few_cross_for<T, decltype(s)::x, decltype(s)::y, decltype(s)::alone>(p); });
}

// the divergence of logits from another space, by the steps of mixed_chunk
template <typename T> struct NormLanes {
  alignas(64) Lane<double> max, zero, ties, rest, alone, tied, log;
  alignas(64) Lane<T> top, count, undefined, log_s, log_s_low;
  alignas(64) Lane<typename Real<T>::Bits> odd;
};
// Logits to log-probabilities, in place, their low parts in `low`; `e` holds one double per number.
template <typename T>
KL_APART void few_log_probs(T* __restrict x, const Rows<T>& rows, double* __restrict e, T* __restrict low, double* room,
                            NormLanes<T>& k) {
  i64 n = rows.n, pitch = rows.pitch;
  const double* __restrict it = rows.inverse_temperature;
  maxima(x, n, pitch, k.top);
  for (i64 r = 0; r < pitch; r++) {
    k.max[r] = (double)k.top[r];
    k.zero[r] = top_of(k.max[r]);
    k.odd[r] = 0;
    k.count[r] = k.undefined[r] = T(0);
  }
  T* __restrict count = k.count;
  T* __restrict undefined = k.undefined;   // 0, or NaN
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      count[r] += x[i + r] == k.top[r] ? T(1) : T(0);
      undefined[r] = x[i + r] == x[i + r] ? undefined[r] : x[i + r];
    }
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) e[i + r] = norm_rest((double)x[i + r], k.max[r], k.zero[r], it[r]);
  add_lanes(n, pitch, room, k.rest, [=](i64 j) KL_LAMBDA { return e[j]; });
  for (i64 r = 0; r < pitch; r++) {
    k.ties[r] = excluded(k.max[r]) ? 0.0 : (double)count[r];
    k.rest[r] = undefined[r] == T(0) ? k.rest[r] : nan<double>();
  }
  both_logs(k.ties, k.rest, pitch, k.alone, k.tied);
  for (i64 r = 0; r < pitch; r++) k.log[r] = log_norm({k.max[r], k.ties[r], k.rest[r]}, k.alone[r], k.tied[r]);
  if constexpr (sizeof(T) == sizeof(double)) {
    for (i64 i = 0; i < n * pitch; i += pitch)
      for (i64 r = 0; r < pitch; r++) x[i + r] = log_prob_of(x[i + r], k.max[r], k.log[r], it[r]);
  } else {
    for (i64 r = 0; r < pitch; r++) {
      double known[] = {k.max[r], k.log[r]};
      LogNorm<T> norm = log_norm_of<T>(known, it[r]);
      k.log_s[r] = norm.log_s;
      k.log_s_low[r] = norm.log_s_low;
    }
    for (i64 i = 0; i < n * pitch; i += pitch)
      for (i64 r = 0; r < pitch; r++) {
        Pair<T> l = log_prob_of(x[i + r], LogNorm<T>{k.top[r], k.log_s[r], k.log_s_low[r], rows.it(r)});
        k.odd[r] |= overflows(l) ? 1 : 0;
        x[i + r] = l.value;
        low[i + r] = l.low;
      }
  }
}
template <typename T>
KL_APART void few_through_softmax(T* __restrict d, const T* __restrict l, const T* __restrict low, const Rows<T>& rows, double* room) {
  i64 n = rows.n, pitch = rows.pitch;
  alignas(64) Lane<double> sums;
  alignas(64) Lane<T> scale, sum, over;
  add_lanes(n, pitch, room, sums, [=](i64 j) KL_LAMBDA { return d[j]; });
  for (i64 r = 0; r < pitch; r++) {
    Softmax<T> k = softmax_of_sum<T>(sums[r], rows.inverse_temperature[r]);
    scale[r] = k.scale;
    sum[r] = k.sum;
    over[r] = k.it;
  }
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      Softmax<T> k = {scale[r], sum[r], over[r]};
      d[i + r] = through_softmax(d[i + r], number<PAIRED<T>>(l, low, i + r), k);
    }
}
template <typename T> void few_mixed(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  NormLanes<T> k;
  i64 n = rows.n, pitch = rows.pitch;
  double* doubles = (double*)s.a;   // of floats, over dx too
  static_assert(offsetof(Block<T>, dx) - offsetof(Block<T>, a) == sizeof s.a);
  alignas(64) T low[sizeof(T) == sizeof(float) ? Block<T>::SIZE : 1];
  rows.cool();
  rows.read(p.x, &Row::x, s.x, s.a);
  if (p.space_x == LOGITS) few_log_probs(s.x, rows, doubles, low, s.room, k);
  rows.read(p.y, &Row::y, s.y, s.a);
  if (p.space_y == LOGITS) few_log_probs(s.y, rows, doubles, low, s.room, k);
  const T *x = s.x, *y = s.y, *a = s.a;
  terms_of<T>(p)(x, y, low, p.parameter, rows.size(), s.a, s.dx, s.dy);
  if (sizeof(T) == sizeof(float) && p.space_y == LOGITS)
    for (i64 i = 0; i < count; i++) alone[i] = k.odd[i] != 0;
  if (p.dx.data && p.space_x == LOGITS) few_through_softmax(s.dx, x, low, rows, s.room);
  if (p.dy.data && p.space_y == LOGITS && !is_final(p.operation)) few_through_softmax(s.dy, y, low, rows, s.room);
  if (p.dx.data) rows.write(p.dx, &Row::dx, s.dx, p.gradient_scale, s.x);
  if (p.dy.data) rows.write(p.dy, &Row::dy, s.dy, p.gradient_scale, s.x);
  if (p.output == TERMS) return rows.write(p.value, &Row::value, s.a, 1, s.x);
  add_lanes(n, pitch, s.room, values, [=](i64 j) KL_LAMBDA { return a[j]; });
  rows.write_values(values);
}

inline Few few(const Plan& p) {
  bool tempered = is_tempered(p);
  if (p.sparse || p.factors.data || of_members(p) || p.operation == RENYI_DIV) return nullptr;
  if (p.dy.data && p.dy.data == p.y.data) return nullptr;   // rows marked odd are read again, after all rows are written
  if (of_logits(p))
    return p.wide ? (tempered ? few_logits<double, true> : few_logits<double, false>)
                  : (tempered ? few_logits<float, true> : few_logits<float, false>);
  if (of_cross(p)) return p.wide ? few_cross_of<double>(p) : few_cross_of<float>(p);
  if (p.space_x == COUNTS || p.space_y == COUNTS) return nullptr;   // counts have no form for few classes
  if (p.space_x == LOGITS || p.space_y == LOGITS) return p.wide ? few_mixed<double> : few_mixed<float>;
  return p.wide ? few_terms<double> : few_terms<float>;
}
