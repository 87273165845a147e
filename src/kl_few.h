// Rows of at most COLUMNS classes on the CPU: a block of rows at a time, one row per lane, class by class in loops over the
// lanes. Included after kl_rows.h, once for every instruction set (kl_isa.h); kl_batch.h calls what `few` returns.
// There are no formulas here, and the bits are those of kl_rows.h: only the order of the loops differs. Rows that the short
// forms cannot handle are marked, and kl_batch.h has them computed one by one. Indices have 64 bits: CPython's -fwrapv makes
// sums of 32-bit indices opaque to gcc's vectoriser.

// Lanes of a block: a multiple of the vector length, and few enough for the block's arrays to fit in the first-level cache
template <typename T> constexpr int LEAST_LANES = 64 / sizeof(T);
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
template <typename T, typename V = T> using Lane = V[16 * LEAST_LANES<T>];   // one V per row of a block of Ts

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
  alignas(64) Lane<T, double> weight, sloped_weight, inverse_temperature;
  alignas(64) Lane<T> inverse_high, inverse_low, inverse_of_low;
  bool sloped = false;

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
  void slope_by(const double* slopes) {   // multiplies what is written from now on
    for (i64 k = 0; k < pitch; k++) {
      weight[k] = weighs() ? weight[k] : 1.0;
      sloped_weight[k] = weight[k] * slopes[k];
    }
    sloped = true;
  }
  int size() const { return (int)(n * pitch); }

  // Lanes beyond the last row repeat the first one.
  KL_APART void read(const Array& a, const char* Row::*at, T* lanes, T* room) const {
    runs(p, first, (int)count, [&](const Row& row, int k, int m) { take(a, row.*at, step_of(p, a), n, m, lanes + k, pitch, room); });
    for (i64 i = 0; i < n; i++)
      for (i64 k = count; k < pitch; k++) lanes[i * pitch + k] = lanes[i * pitch];
  }
  // Writes lanes times the rows' weights; overwrites lanes and room
  KL_APART void write(const Array& a, char* Row::*at, T* lanes, double scale, T* room) const {
    if (weighs() || sloped) {
      const double* each = sloped ? sloped_weight : weight;
      alignas(64) Lane<T> by;
      bool far = false;
      for (i64 r = 0; r < pitch; r++) {
        const Scale<T> s(each[r] * scale);
        by[r] = s.near;
        far |= s.far;
      }
      for (i64 i = 0; i < n; i++)
        for (i64 r = 0; r < pitch; r++) {
          T v = far ? lanes[i * pitch + r] * Scale<T>(each[r] * scale) : lanes[i * pitch + r] * by[r];
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

// Writes the values, before the gradients. Those of renyi_div are made from the sums of alpha_div (kl_renyi.h), whose gradients
// are multiplied by a slope. Tilted rows are marked.
template <typename T> KL_APART void few_values(const Plan& p, Rows<T>& rows, double* values, char* alone) {
  if (p.operation != RENYI_DIV) return rows.write_values(values);
  alignas(64) Lane<T, double> slopes;
  for (i64 r = 0; r < rows.pitch; r++) {
    double stats[MAX_STATS];
    stats[VALUE] = values[r];
    renyi_begin(p.parameter, stats);
    slopes[r] = stats[RENYI_SLOPE];
    renyi_finish(p.parameter, stats);
    values[r] = stats[VALUE];
  }
  for (i64 r = 0; r < rows.count; r++) alone[r] |= slopes[r] == 0;   // is_tilted
  rows.write_values(values);
  rows.slope_by(slopes);
}

// The values or terms, from the terms in s.a, and the gradients in s.dx and s.dy
template <typename T> void few_outputs(const Plan& p, Rows<T>& rows, Block<T>& s, double* values, char* alone) {
  const T* a = s.a;
  if (p.output != TERMS) {
    add_lanes(rows.n, rows.pitch, s.room, values, [=](i64 j) KL_LAMBDA { return a[j]; });
    few_values(p, rows, values, alone);
  }
  if (p.dx.data) rows.write(p.dx, &Row::dx, s.dx, p.gradient_scale, s.x);
  if (p.dy.data) rows.write(p.dy, &Row::dy, s.dy, p.gradient_scale, s.x);
  if (p.output == TERMS) rows.write(p.value, &Row::value, s.a, 1, s.x);
}

template <typename T> void few_terms(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  rows.read(p.x, &Row::x, s.x, s.a);
  T* y = has_y(p.operation) ? s.y : s.x;
  if (has_y(p.operation)) rows.read(p.y, &Row::y, s.y, s.a);
  terms_of<T>(p)(s.x, y, nullptr, p.parameter, rows.size(), s.a, s.dx, s.dy);
  few_outputs(p, rows, s, values, alone);
}

// The divergence of two rows of logits, by the steps of logits_chunk and logits_finish
template <typename T> struct LogitsLanes {
  typedef typename Real<T>::Bits Bits;
  alignas(64) Lane<T> max_a, max_b, m, low, mean;
  alignas(64) Lane<T, double> weights, x, g;
  alignas(64) Lane<T, Bits> odd;
};
template <typename T> struct SlopedLanes : LogitsLanes<T> {
  alignas(64) Lane<T> a, b, c, d, p, t, t_low;   // Slopes
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

template <typename T, bool SLOPES> KL_APART void few_finish(const Rows<T>& rows, SlopedLanes<T>& k, double* __restrict values) {
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
                      SlopedLanes<T>& k, const Rows<T>& rows, T* __restrict term) {
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
KL_APART void few_slopes(const T* __restrict w, const T* __restrict z, i64 n, i64 pitch, const SlopedLanes<T>& k, T* __restrict e_dx,
                T* __restrict dy) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      T growth = e_dx[i + r] + z[i + r];
      dy[i + r] = w[i + r] * fma(growth, k.a[r], k.b[r]);
      e_dx[i + r] = w[i + r] * fma(z[i + r], k.c[r], k.d[r]);
    }
}

// The first sweep; leaves the weights in s.a, e^z - 1 - z in s.dx, and z in s.dy.
template <typename T, bool TEMPERED> void few_first(const Plan& p, Rows<T>& rows, Block<T>& s, LogitsLanes<T>& k) {
  i64 n = rows.n, pitch = rows.pitch;
  rows.cool();
  rows.read(p.x, &Row::x, s.x, s.a);
  rows.read(p.y, &Row::y, s.y, s.a);
  T *w = s.a, *e = s.dx, *z = s.dy;
  maxima(s.x, n, pitch, k.max_a);
  maxima(s.y, n, pitch, k.max_b);
  few_weights<T, TEMPERED>(s.x, s.y, n, pitch, k.max_a, k.max_b, rows, w, e);
  add_lanes(n, pitch, s.room, k.weights, [=](i64 j) KL_LAMBDA { return w[j]; });
  add_lanes(n, pitch, s.room, k.x, [=](i64 j) KL_LAMBDA { return e[j]; });
  few_anchors(k.x, pitch, k);
  few_spread<T, TEMPERED>(s.x, s.y, w, n, pitch, k, rows, z, (T*)s.room, e);
  add_lanes(n, pitch, s.room, k.x, [=](i64 j) KL_LAMBDA { return fma(w[j], z[j], T(0)); });
  add_lanes(n, pitch, s.room, k.g, [=](i64 j) KL_LAMBDA { return fma(w[j], e[j], T(0)); });
}

template <typename T, bool TEMPERED>
void few_logits(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  SlopedLanes<T> k;
  i64 n = rows.n, pitch = rows.pitch;
  T *w = s.a, *e = s.dx, *z = s.dy, *room = (T*)s.room;
  few_first<T, TEMPERED>(p, rows, s, k);
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

// The family, for two rows of logits, by the steps of members_chunk. Marked are: rows that are far in the first sweep; of float,
// rows that are not near, or whose scores are too close to each other; of double, rows with vast scores.
template <typename T> struct MemberLanes;
template <> struct MemberLanes<float> {
  alignas(64) Lane<float> m, low, rest, bound;                 // NearRow
  alignas(64) Lane<float, double> part, centre, mass, sum;     // near_part; of a side
};
template <> struct MemberLanes<double> {
  alignas(64) Lane<double> max_a, inv_s, max_b, inv_q, shift, shift_low;   // MemberRow
  alignas(64) Lane<double> mass, sum;                                      // of a side
};
template <typename T>
KL_APART void few_begin(const LogitsLanes<T>& k, const Rows<T>& rows, double parameter, MemberLanes<T>& of) {
  for (i64 r = 0; r < rows.pitch; r++) {
    Anchor<T> at = {k.max_a[r], k.max_b[r], k.m[r], k.low[r], k.mean[r]};
    double stats[MAX_STATS], it = rows.inverse_temperature[r];
    members_begin(near_state(at, k.weights[r], k.x[r], k.g[r]), it, stats);
    MemberRow row = member_row(stats, it);
    if constexpr (sizeof(T) == sizeof(float)) {
      NearRow<T> by = near_row<T>(row, parameter);
      of.m[r] = by.at.m;
      of.low[r] = by.at.low;
      of.rest[r] = by.rest;
      of.bound[r] = by.bound;
      of.part[r] = near_part(row, (double)k.max_a[r]);
    } else {
      of.max_a[r] = row.max_a;
      of.inv_s[r] = row.inv_s;
      of.max_b[r] = row.max_b;
      of.inv_q[r] = row.inv_q;
      of.shift[r] = row.shift.value;
      of.shift_low[r] = row.shift.low;
    }
  }
}

template <bool TEMPERED>
KL_APART void few_gaps(const float* __restrict a, const float* __restrict b, const MemberLanes<float>& of, const Rows<float>& rows,
                       Real<float>::Bits* __restrict odd, float* __restrict t) {
  for (i64 i = 0; i < rows.n * rows.pitch; i += rows.pitch)
    for (i64 r = 0; r < rows.pitch; r++) {
      NearRow<float> by = {{0, 0, of.m[r], of.low[r], 0}, of.rest[r], of.bound[r], rows.it(r)};
      float any = near_gap<TEMPERED>(a[i + r], b[i + r], by);
      bool near = is_near(any, by);
      odd[r] |= near ? 0 : 1;
      t[i + r] = near ? any : 0.f;
    }
}
KL_APART inline void few_differences(const float* __restrict v, const double* __restrict from, i64 n, i64 pitch, float* __restrict d) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) d[i + r] = v[i + r] - (float)from[r];
}
// One side's gradient, from its weights and scores; overwrites `d`
KL_APART inline void few_near_side(const Rows<float>& rows, const float* __restrict w, const float* __restrict v, double limit,
                                   double apart, double* room, MemberLanes<float>& of, Real<float>::Bits* __restrict odd,
                                   float* __restrict d) {
  i64 n = rows.n, pitch = rows.pitch;
  alignas(64) Lane<float, double> size, centred, distance;
  add_lanes(n, pitch, room, of.mass, [=](i64 j) KL_LAMBDA { return w[j]; });
  add_lanes(n, pitch, room, of.sum, [=](i64 j) KL_LAMBDA { return fma(w[j], v[j], 0.f); });
  add_lanes(n, pitch, room, size, [=](i64 j) KL_LAMBDA { return fma(w[j], absolute(v[j]), 0.f); });
  for (i64 r = 0; r < pitch; r++) {
    Scores all = {of.mass[r], of.sum[r], size[r]};
    of.centre[r] = are_balanced(all) ? 0.0 : (double)centre_of(all);
  }
  few_differences(v, of.centre, n, pitch, d);
  add_lanes(n, pitch, room, centred, [=](i64 j) KL_LAMBDA { return fma(w[j], d[j], 0.f); });
  add_lanes(n, pitch, room, distance, [=](i64 j) KL_LAMBDA { return fma(w[j], absolute(d[j]), 0.f); });
  alignas(64) Lane<float> mean, low, scale;
  for (i64 r = 0; r < pitch; r++) {
    Scores all = {of.mass[r], of.sum[r], size[r]};
    bool balanced = are_balanced(all);
    odd[r] |= balanced | are_apart(distance[r], all, apart) ? 0 : 1;
    Side side = with_mean(near_side(all, of.centre[r], balanced ? of.sum[r] : centred[r], of.part[r]));
    MemberRow row = {0, 0, 0, 0, {0, 0}, rows.inverse_temperature[r], {}, {}};
    Slope<float> by = near_slope<float>(row, side, limit, of.part[r]);
    mean[r] = by.mean;
    low[r] = by.low;
    scale[r] = by.scale;
  }
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++)
      d[i + r] = near_derivative(w[i + r], v[i + r], Slope<float>{mean[r], low[r], scale[r]});
}

template <bool TEMPERED>
void few_members(const Plan& p, Rows<float>& rows, Block<float>& s, LogitsLanes<float>& k, MemberLanes<float>& of, double* values,
                 char* alone) {
  i64 n = rows.n, pitch = rows.pitch;
  MemberLoops loops = member_loops(p);
  float *w = s.a, *terms = s.x, *of_x = s.y, *of_y = s.dy, *q = s.dx;
  few_gaps<TEMPERED>(s.x, s.y, of, rows, k.odd, q);
  for (i64 i = 0; i < n * pitch; i += PIECE) {
    int m = (int)std::min<i64>(PIECE, n * pitch - i);
    Near seen;
    for (int j = 0; j < m; j++) {
      seen.t[j] = q[i + j];
      Ordinary<float> c = near_class(seen.t[j]);
      q[i + j] = seen.q[j] = c.q;
      seen.d[j] = c.d;
    }
    loops.near[p.dx.data != nullptr][p.dy.data != nullptr](seen, m, p.parameter, terms + i, of_x + i, of_y + i);
  }
  add_lanes(n, pitch, s.room, values, [=](i64 j) KL_LAMBDA { return fma(w[j], terms[j], 0.f); });
  for (i64 r = 0; r < pitch; r++) values[r] *= of.part[r];
  if (p.output == TERMS) {
    for (i64 i = 0; i < n * pitch; i += pitch)
      for (i64 r = 0; r < pitch; r++) terms[i + r] = near_term_of(w[i + r], terms[i + r], of.part[r]);
    rows.write(p.value, &Row::value, terms, 1, (float*)s.room);
  } else {
    few_values(p, rows, values, alone);
  }
  auto side = [&](const SideLoops& loops_of, const float* weight, const float* score, const Array& a, char* Row::*at) {
    few_near_side(rows, weight, score, loops_of.limit, loops.apart, s.room, of, k.odd, terms);
    rows.write(a, at, terms, p.gradient_scale, (float*)s.room);
  };
  if (p.dx.data) side(loops.x, w, of_x, p.dx, &Row::dx);
  if (!p.dy.data) return;
  for (i64 j = 0; j < n * pitch; j++) q[j] = w[j] * q[j];
  side(loops.y, q, of_y, p.dy, &Row::dy);
}

// In double: the classes [0, n) of each lane
KL_APART inline void few_classes(const double* __restrict a, const double* __restrict b, i64 n, const MemberLanes<double>& of,
                                 const Rows<double>& rows, Seen<double>& s) {
  for (i64 i = 0; i < n * rows.pitch; i += rows.pitch)
    for (i64 r = 0; r < rows.pitch; r++) {
      MemberRow row = {of.max_a[r], of.inv_s[r], of.max_b[r], of.inv_q[r], {of.shift[r], of.shift_low[r]},
                       rows.inverse_temperature[r], {}, {}};
      Class<double> c = class_of(a[i + r], b[i + r], row);
      s.p[i + r] = c.p;
      s.q[i + r] = c.q;
      s.d[i + r] = c.d;
      s.t[i + r] = c.t;
    }
}
// a and b of each lane's likeliest class: the first where `of` equals `top`, else class 0
KL_APART inline void few_tops(const double* __restrict of, const double* __restrict top, const double* __restrict a,
                              const double* __restrict b, i64 n, i64 pitch, double* __restrict top_a, double* __restrict top_b) {
  std::copy(a, a + pitch, top_a);   // if none is
  std::copy(b, b + pitch, top_b);
  for (i64 i = (n - 1) * pitch; i >= 0; i -= pitch)
    for (i64 r = 0; r < pitch; r++) {
      bool found = of[i + r] == top[r];
      top_a[r] = found ? a[i + r] : top_a[r];
      top_b[r] = found ? b[i + r] : top_b[r];
    }
}
KL_APART inline void few_centred(const double* __restrict p, const double* __restrict v, const double* __restrict centre, i64 n,
                                 i64 pitch, Real<double>::Bits* __restrict odd, double* __restrict mass, double* __restrict out) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) {
      odd[r] |= is_vast(v[i + r]) ? 1 : 0;
      out[i + r] = centred_score(p[i + r], v[i + r], 0.0, centre[r]);
      mass[i + r] = p[i + r];
    }
}
KL_APART inline void few_choose(const double* __restrict far, const double* __restrict from_limit, i64 n, i64 pitch,
                                double* __restrict v) {
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) v[i + r] = far[r] != 0 ? from_limit[i + r] : v[i + r];
}

KL_APART inline void few_members(const Plan& p, Rows<double>& rows, Block<double>& s, LogitsLanes<double>& k,
                                 MemberLanes<double>& of, double* values, char* alone) {
  i64 n = rows.n, pitch = rows.pitch;
  MemberLoops loops = member_loops(p);
  Seen<double> seen;
  alignas(64) double score[PIECE], from_limit[PIECE];
  alignas(64) Lane<double> top_a, top_b;
  struct { alignas(64) Lane<double> centre, far; bool any_far; } x, y;
  auto begin = [&](const SideLoops& loops_of, const double* by, const double* top, auto& side) {
    few_tops(by, top, s.x, s.y, n, pitch, top_a, top_b);
    few_classes(top_a, top_b, 1, of, rows, seen);
    loops_of.score[0](seen, (int)pitch, p.parameter, score);
    loops_of.score[1](seen, (int)pitch, p.parameter, from_limit);
    side.any_far = false;
    for (i64 r = 0; r < pitch; r++) {
      Side from = side_from(score[r], from_limit[r]);
      side.centre[r] = from.centre;
      side.far[r] = from.far;
      side.any_far |= from.far != 0;
    }
  };
  if (p.dx.data) begin(loops.x, s.x, k.max_a, x);
  if (p.dy.data) begin(loops.y, s.y, k.max_b, y);
  double *terms = s.dx, *of_x = s.a, *of_y = s.dy;
  for (i64 c = 0, most = PIECE / pitch; c < n; c += most) {
    i64 m = std::min(most, n - c), i = c * pitch;
    few_classes(s.x + i, s.y + i, m, of, rows, seen);
    loops.terms(seen, (int)(m * pitch), p.parameter, terms + i);
    auto add = [&](const SideLoops& loops_of, const auto& side, const double* mass, double* to_mass, double* out) {
      loops_of.score[0](seen, (int)(m * pitch), p.parameter, score);
      if (side.any_far) {
        loops_of.score[1](seen, (int)(m * pitch), p.parameter, from_limit);
        few_choose(side.far, from_limit, m, pitch, score);
      }
      few_centred(mass, score, side.centre, m, pitch, k.odd, to_mass + i, out + i);
    };
    if (p.dx.data) add(loops.x, x, seen.p, s.x, of_x);   // over the logits of these classes
    if (p.dy.data) add(loops.y, y, seen.q, s.y, of_y);
  }
  add_lanes(n, pitch, s.room, values, [=](i64 j) KL_LAMBDA { return terms[j]; });
  if (p.output == TERMS) rows.write(p.value, &Row::value, terms, 1, s.room);
  else few_values(p, rows, values, alone);
  auto write = [&](const double* mass, double* v, const Array& a, char* Row::*at) {
    add_lanes(n, pitch, s.room, of.sum, [=](i64 j) KL_LAMBDA { return v[j]; });
    add_lanes(n, pitch, s.room, of.mass, [=](i64 j) KL_LAMBDA { return mass[j]; });
    for (i64 r = 0; r < pitch; r++) of.sum[r] = with_mean({0.0, 0.0, of.sum[r], of.mass[r]}).sum;
    for (i64 i = 0; i < n * pitch; i += pitch)
      for (i64 r = 0; r < pitch; r++) v[i + r] = member_derivative(v[i + r], mass[i + r], of.sum[r], rows.inverse_temperature[r]);
    rows.write(a, at, v, p.gradient_scale, s.room);
  };
  if (p.dx.data) write(s.x, of_x, p.dx, &Row::dx);
  if (p.dy.data) write(s.y, of_y, p.dy, &Row::dy);
}

template <typename T, bool TEMPERED>
void few_family(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  LogitsLanes<T> k;
  MemberLanes<T> of;
  few_first<T, TEMPERED>(p, rows, s, k);
  few_begin(k, rows, p.parameter, of);
  if constexpr (sizeof(T) == sizeof(float)) few_members<TEMPERED>(p, rows, s, k, of, values, alone);
  else few_members(p, rows, s, k, of, values, alone);
  for (i64 i = 0; i < count; i++) alone[i] |= k.odd[i] != 0;
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
  alignas(64) Lane<T, double> s, cost, count, rest, alone, tied;
  alignas(64) Lane<T, typename Real<T>::Bits> odd;
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

// the divergence of logits or counts from another space, or from counts, by the steps of mixed_chunk
template <typename T> struct NormLanes {
  alignas(64) Lane<T, double> max, zero, ties, rest, alone, tied, log;
  alignas(64) Lane<T> top, count, undefined, log_s, log_s_low;
  alignas(64) Lane<T, typename Real<T>::Bits> odd;
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
  alignas(64) Lane<T, double> sums;
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
// Counts, which are computed in double
template <typename T> struct ShareLanes {};
template <> struct ShareLanes<double> {
  alignas(64) Lane<double> scale, sum, mean;
  struct Norm { double at[2]; };   // as tally_finish leaves it
  Norm norm(i64 r) const { return {{scale[r], sum[r]}}; }
};
// Counts to probabilities, in place; `e` holds one double per number. `whole`: counts may be of any size
KL_APART inline void few_shares(double* __restrict x, const Rows<double>& rows, bool whole, double* __restrict e, double* room,
                                ShareLanes<double>& k) {
  i64 n = rows.n, pitch = rows.pitch;
  alignas(64) Lane<double> fewer, more;
  for (i64 j = 0; j < n * pitch; j++) e[j] = count_of(x[j]);
  add_lanes(n, pitch, room, k.sum, [=](i64 j) KL_LAMBDA { return e[j]; });
  if (whole) {
    add_lanes(n, pitch, room, fewer, [=](i64 j) KL_LAMBDA { return e[j] * FEWER; });
    add_lanes(n, pitch, room, more, [=](i64 j) KL_LAMBDA { return e[j] * MORE; });
  }
  for (i64 r = 0; r < pitch; r++) {
    double norm[2];
    tally_finish({k.sum[r], whole ? fewer[r] : k.sum[r], whole ? more[r] : k.sum[r]}, norm);
    k.scale[r] = norm[SCALE];
    k.sum[r] = norm[SUM];
  }
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) x[i + r] = share_of(x[i + r], k.norm(r).at);
}
KL_APART inline void few_through_shares(double* __restrict d, const double* __restrict shares, const Rows<double>& rows,
                                        double* room, ShareLanes<double>& k) {
  i64 n = rows.n, pitch = rows.pitch;
  add_lanes(n, pitch, room, k.mean, [=](i64 j) KL_LAMBDA { return share_times(shares[j], d[j]); });
  for (i64 i = 0; i < n * pitch; i += pitch)
    for (i64 r = 0; r < pitch; r++) d[i + r] = through_share(d[i + r], k.mean[r], k.norm(r).at);
}
template <typename T> void few_mixed(const Plan& p, i64 r, int count, double* values, char* alone, void* scratch) {
  Block<T>& s = *(Block<T>*)scratch;
  Rows<T> rows(p, r, count);
  NormLanes<T> k;
  double* doubles = (double*)s.a;   // of floats, over dx too
  static_assert(offsetof(Block<T>, dx) - offsetof(Block<T>, a) == sizeof s.a);
  alignas(64) T low[sizeof(T) == sizeof(float) ? Block<T>::SIZE : 1];
  bool both = has_y(p.operation), of_y = p.dy.data && !is_final(p.operation);
  rows.cool();
  rows.read(p.x, &Row::x, s.x, s.a);
  if (p.space_x == LOGITS) few_log_probs(s.x, rows, doubles, low, s.room, k);
  if (both) rows.read(p.y, &Row::y, s.y, s.a);
  if (p.space_y == LOGITS) few_log_probs(s.y, rows, doubles, low, s.room, k);
  const T *x = s.x, *y = both ? s.y : s.x;
  ShareLanes<T> shares_x, shares_y;
  if constexpr (sizeof(T) == sizeof(double)) {
    if (p.space_x == COUNTS) few_shares(s.x, rows, p.x.dtype == FLOAT64, doubles, s.room, shares_x);
    if (p.space_y == COUNTS && both) few_shares(s.y, rows, p.y.dtype == FLOAT64, doubles, s.room, shares_y);
  }
  terms_of<T>(p)(x, y, low, p.parameter, rows.size(), s.a, s.dx, s.dy);
  if (sizeof(T) == sizeof(float) && p.space_y == LOGITS)
    for (i64 i = 0; i < count; i++) alone[i] = k.odd[i] != 0;
  if (p.dx.data && p.space_x == LOGITS) few_through_softmax(s.dx, x, low, rows, s.room);
  if (of_y && p.space_y == LOGITS) few_through_softmax(s.dy, y, low, rows, s.room);
  if constexpr (sizeof(T) == sizeof(double)) {
    if (p.dx.data && p.space_x == COUNTS) few_through_shares(s.dx, x, rows, s.room, shares_x);
    if (of_y && p.space_y == COUNTS) few_through_shares(s.dy, y, rows, s.room, shares_y);
  }
  few_outputs(p, rows, s, values, alone);
}

inline Few few(const Plan& p) {
  bool tempered = is_tempered(p);
  if (p.sparse || p.factors.data) return nullptr;
  if (p.dy.data && p.dy.data == p.y.data) return nullptr;   // rows marked odd are read again, after all rows are written
  if (of_logits(p))
    return p.wide ? (tempered ? few_logits<double, true> : few_logits<double, false>)
                  : (tempered ? few_logits<float, true> : few_logits<float, false>);
  if (of_members(p))
    return p.wide ? (tempered ? few_family<double, true> : few_family<double, false>)
                  : (tempered ? few_family<float, true> : few_family<float, false>);
  if (of_cross(p)) return p.wide ? few_cross_of<double>(p) : few_cross_of<float>(p);
  if (is_unnormalised(p.space_x) || is_unnormalised(p.space_y)) return p.wide ? few_mixed<double> : few_mixed<float>;
  return p.wide ? few_terms<double> : few_terms<float>;
}
