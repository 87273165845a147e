// One row on the CPU: loads, sweeps over chunks, sums. kl_isa.h includes this file once for every instruction set,
// each time inside a namespace of its own; kl_batch.h calls what `kernel` returns. No formula of a term lives here
// (kl_math.h), and no threads (kl_batch.h). Loops are written so that the compiler's vectoriser takes them: over
// contiguous buffers, without branches, a multiple of 16 elements long. Every buffer fits the first-level cache.

// ---- sums: the order of addition of kl_tree.h ----------------------------------------------------------------------------

template <int N, typename T> void column_sums(const T* t, double* columns) {
  for (int j = 0; j < COLUMNS; j++) columns[j] = (double)Column<N>::sum(t + j);
}

inline double fold(double* columns, int width) {
  for (int half = width / 2; half >= 1; half /= 2)
    for (int j = 0; j < half; j++) columns[j] += columns[j + half];
  return columns[0] + 0.0;   // -0 becomes +0, as if every missing +0 had been added
}

// the sum of t[0..n), 0 < n <= COLUMNS: every column holds one element
template <typename T> double sum_short(const T* t, int n) {
  alignas(64) double columns[COLUMNS];
  int width = 1;
  while (width < n) width *= 2;
  for (int j = 0; j < n; j++) columns[j] = (double)t[j];
  for (int j = n; j < width; j++) columns[j] = 0.0;
  return fold(columns, width);
}

// the sum of t[0..n), 0 < n <= CHUNK; overwrites t[n..) up to a multiple of COLUMNS
template <typename T> double sum(T* t, int n) {
  if (n <= COLUMNS) return sum_short(t, n);
  alignas(64) double columns[COLUMNS];
  int depth = (n + COLUMNS - 1) / COLUMNS;
  for (int i = n; i < depth * COLUMNS; i++) t[i] = T(0);
  switch (depth) {
    case 2: column_sums<2>(t, columns); break;
    case 3: column_sums<3>(t, columns); break;
    case 4: column_sums<4>(t, columns); break;
    case 5: column_sums<5>(t, columns); break;
    case 6: column_sums<6>(t, columns); break;
    case 7: column_sums<7>(t, columns); break;
    default: column_sums<8>(t, columns);
  }
  return fold(columns, COLUMNS);
}

// the same of doubles that must stay as they are
inline double sum_kept(const double* t, int n) {
  alignas(64) double copy[CHUNK];
  for (int i = 0; i < n; i++) copy[i] = t[i];
  return sum(copy, n);
}

// the sum of any number of doubles, level by level; overwrites t
inline double sum_levels(double* t, i64 n) {
  if (n == 0) return 0.0;
  for (; n > CHUNK; n = (n + CHUNK - 1) / CHUNK)
    for (i64 g = 0; g * CHUNK < n; g++) t[g] = sum_kept(t + g * CHUNK, (int)(n - g * CHUNK < CHUNK ? n - g * CHUNK : CHUNK));
  return sum_kept(t, (int)n);
}

// m[j] = the larger of m[j] and t[j]; that of m where t is NaN. Loaded first: gcc would choose between addresses.
template <int N, typename T> KL_FN void take_larger(T* m, const T* t) {
  for (int j = 0; j < N; j++) {
    T a = t[j], b = m[j];
    m[j] = a > b ? a : b;
  }
}

// the largest element; NaN is passed over. n is a multiple of 16.
template <typename T> T maximum(const T* __restrict t, int n) {
  alignas(64) T m[64];
  for (int j = 0; j < 64; j++) m[j] = -infinity<T>();
  int i = 0;
  for (; i + 64 <= n; i += 64) take_larger<64>(m, t + i);
  for (; i < n; i += 16) take_larger<16>(m, t + i);
  take_larger<32>(m, m + 32);
  take_larger<16>(m, m + 16);
  take_larger<8>(m, m + 8);
  take_larger<4>(m, m + 4);
  take_larger<2>(m, m + 2);
  take_larger<1>(m, m + 1);
  return m[0];
}

// ---- loads and stores ----------------------------------------------------------------------------------------------------

template <int D, typename T> void widen_into(const char* p, i64 stride, int n, T* __restrict out) {
  typedef typename Stored<D>::Type S;
  if (stride == (i64)sizeof(S) && (std::uintptr_t)p % sizeof(S) == 0) {
    const S* s = (const S*)p;
    for (int i = 0; i < n; i++) out[i] = Stored<D>::template widen<T>(s[i]);
  } else {
    for (int i = 0; i < n; i++) {
      S s;
      std::memcpy(&s, p + i * stride, sizeof(S));
      out[i] = Stored<D>::template widen<T>(s);
    }
  }
}

// Elements [start, start+n) of a row as T, readable up to the next multiple of 16: in place where possible, else in buffer.
template <typename T> const T* load(const Array& a, const char* row, i64 start, int n, T* buffer) {
  const char* p = row + start * a.stride;
  if (a.dtype == code_of<T>() && a.stride == (i64)sizeof(T) && n % 16 == 0 && (std::uintptr_t)p % sizeof(T) == 0)
    return (const T*)p;
  switch (a.dtype) {
    case FLOAT64: widen_into<FLOAT64>(p, a.stride, n, buffer); break;
    case FLOAT32: widen_into<FLOAT32>(p, a.stride, n, buffer); break;
    case FLOAT16: widen_into<FLOAT16>(p, a.stride, n, buffer); break;
    default: widen_into<BFLOAT16>(p, a.stride, n, buffer);
  }
  for (int i = n; i % 16; i++) buffer[i] = buffer[0];
  return buffer;
}

template <int D, typename T> void narrow_from(const T* __restrict v, T scale, i64 n, char* p, i64 stride) {
  typedef typename Stored<D>::Type S;
  if (stride == (i64)sizeof(S) && (std::uintptr_t)p % sizeof(S) == 0) {
    S* __restrict s = (S*)p;
    for (i64 i = 0; i < n; i++) s[i] = Stored<D>::template narrow<T>(v[i] * scale);
  } else {
    for (i64 i = 0; i < n; i++) {
      S s = Stored<D>::template narrow<T>(v[i] * scale);
      std::memcpy(p + i * stride, &s, sizeof(S));
    }
  }
}

template <typename T> void narrow_to(int dtype, const T* v, T scale, i64 n, char* p, i64 stride) {
  switch (dtype) {
    case FLOAT64: narrow_from<FLOAT64>(v, scale, n, p, stride); break;
    case FLOAT32: narrow_from<FLOAT32>(v, scale, n, p, stride); break;
    case FLOAT16: narrow_from<FLOAT16>(v, scale, n, p, stride); break;
    default: narrow_from<BFLOAT16>(v, scale, n, p, stride);
  }
}

// v * scale to elements [start, start+n) of a row. Large outputs are streamed: nobody will find them in a cache later,
// and a store that misses the caches reads the line first.
template <typename T> void store(const Array& a, char* row, i64 start, int n, const T* v, double scale, bool stream) {
  char* p = row + start * a.stride;
  i64 size = a.dtype == FLOAT64 ? 8 : a.dtype == FLOAT32 ? 4 : 2;
  const Scale<T> by(scale);
  T near = by.near, products[CHUNK];
  if (by.far) {
    for (int i = 0; i < n; i++) products[i] = v[i] * by;
    v = products;
    near = T(1);
  }
  if (!stream || a.stride != size) return narrow_to(a.dtype, v, near, n, p, a.stride);
  alignas(64) char line[CHUNK * 8];
  narrow_to(a.dtype, v, near, n, line, size);
  i64 bytes = n * size, head = (i64)(-(std::uintptr_t)p & 63);
  head = head < bytes ? head : bytes;
  std::memcpy(p, line, (size_t)head);
  i64 at = head;
  for (; at + 64 <= bytes; at += 64) stream_line(p + at, line + at);
  std::memcpy(p + at, line + at, (size_t)(bytes - at));
}

// Runs f(i, m) over a chunk piece by piece, and with each piece asks for as much of the memory at px and py, so that it
// arrives while this chunk is computed: the hardware's own prefetch stops at every page.
template <typename T, class F> void pieces(const void* px, const void* py, int n, F f) {
  constexpr int PIECE = 128, LINE = 64;
  for (int i = 0; i < n; i += PIECE) {
    int m = n - i < PIECE ? n - i : PIECE;
    for (i64 k = i * (i64)sizeof(T); k < (i + m) * (i64)sizeof(T); k += LINE) {
      if (px) prefetch((const char*)px + k);
      if (py) prefetch((const char*)py + k);
    }
    f(i, m);
  }
}

// One chunk's worth each, in the scratch that kl_batch.h hands over. The padding keeps them at different offsets within a
// page: a load waits for an earlier store whose address agrees in the last 12 bits.
template <typename T> struct Buffers {
  static constexpr int SIZE = CHUNK + 576 / sizeof(T);
  T skip[576 / sizeof(T)], x[SIZE], y[SIZE], a[SIZE], b[SIZE], dx[SIZE], dy[SIZE];
};

// ---- terms ---------------------------------------------------------------------------------------------------------------

template <typename T> struct Terms {   // value, and the derivatives asked for, of n pairs
  typedef void (*Map)(const T* x, const T* y, T epsilon, int n, T* value, T* dx, T* dy);
};

// Ordinary arguments take the shorter form; the bits are those of the long one. Looked at beforehand, because what the
// shorter form makes of a zero are subnormals, with which processors are slow.
template <class F, typename T, bool DX, bool DY>
void terms(const T* __restrict x, const T* __restrict y, T e, int n, T* __restrict value, T* __restrict dx,
           T* __restrict dy) {
  if constexpr (F::has_ordinary) {
    typename Real<T>::Bits others = 0;
    for (int i = 0; i < n; i++) others |= F::ordinary(x[i], y[i]) ? 0 : 1;
    if (!others) {
      for (int i = 0; i < n; i++) {
        value[i] = value_of<F, false>(x[i], y[i], e);
        if (DX) dx[i] = dx_of<F, false>(x[i], y[i], e);
        if (DY) dy[i] = dy_of<F, false>(x[i], y[i], e);
      }
      return;
    }
  }
  for (int i = 0; i < n; i++) {
    value[i] = value_of<F, true>(x[i], y[i], e);
    if (DX) dx[i] = dx_of<F, true>(x[i], y[i], e);
    if (DY) dy[i] = dy_of<F, true>(x[i], y[i], e);
  }
}

template <class F, typename T> typename Terms<T>::Map terms_for(bool dx, bool dy) {
  if (dx) return dy ? terms<F, T, true, true> : terms<F, T, true, false>;
  return dy ? terms<F, T, false, true> : terms<F, T, false, false>;
}

template <int SX, int SY, typename T> typename Terms<T>::Map terms_in(int operation, bool dx, bool dy) {
  switch (operation) {
    case KL_DIV: return terms_for<Term<KL_DIV, SX, SY>, T>(dx, dy);
    case REL_ENTR: return terms_for<Term<REL_ENTR, SX, SY>, T>(dx, dy);
    case CROSS_ENTROPY: return terms_for<Term<CROSS_ENTROPY, SX, SY>, T>(dx, dy);
  }
  return terms_for<Term<ENTROPY, SX, SX>, T>(dx, dy);
}

inline int term_space(int space) { return space == LOGITS ? LOG_PROBS : space; }

template <typename T> typename Terms<T>::Map terms_of(const Plan& p) {
  int sx = term_space(p.space_x), sy = term_space(p.space_y);
  bool dx = p.dx.data, dy = p.dy.data;
  switch (p.operation) {   // each with the spaces that it is for
    case PYTORCH:
      return sx == PROBS ? terms_for<Term<PYTORCH, PROBS, LOG_PROBS>, T>(dx, dy)
                         : terms_for<Term<PYTORCH, LOG_PROBS, LOG_PROBS>, T>(dx, dy);
    case KERAS: return terms_for<Term<KERAS, PROBS, PROBS>, T>(dx, dy);
    case MXNET: return terms_for<Term<MXNET, PROBS, LOG_PROBS>, T>(dx, dy);
    case PUZZLELIB:
      if constexpr (sizeof(T) == 8)   // always of logits, and so wide
        return sx == PROBS ? terms_for<Term<PUZZLELIB, PROBS, LOG_PROBS>, T>(dx, dy)
                           : terms_for<Term<PUZZLELIB, LOG_PROBS, LOG_PROBS>, T>(dx, dy);
      return nullptr;
  }
  if (sx == sy)
    return sx == PROBS ? terms_in<PROBS, PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, LOG_PROBS, T>(p.operation, dx, dy);
  if constexpr (sizeof(T) == 8)   // the plan is wide wherever the spaces differ
    return sx == PROBS ? terms_in<PROBS, LOG_PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, PROBS, T>(p.operation, dx, dy);
  return nullptr;
}

// Term and gradients times the factors; `room` is for a chunk of them.
template <typename T> void multiply(const Plan& p, const Row& row, i64 start, int n, Buffers<T>& s, T* room) {
  if (!p.factors.data) return;
  const T* f = load(p.factors, row.factors, start, n, room);
  for (int i = 0; i < n; i++) s.a[i] *= f[i];
  if (p.dx.data)
    for (int i = 0; i < n; i++) s.dx[i] *= f[i];
  if (p.dy.data)
    for (int i = 0; i < n; i++) s.dy[i] *= f[i];
}

// Probabilities and log-probabilities: one sweep does everything.
template <typename T>
void terms_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double* state, i64, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* x = load(p.x, row.x, start, n, s.x);
  const T* y = p.operation == ENTROPY ? x : load(p.y, row.y, start, n, s.y);
  auto map = terms_of<T>(p);
  pieces<T>(x + CHUNK, y == x ? nullptr : y + CHUNK, (n + 15) & ~15,
            [&](int i, int m) { map(x + i, y + i, (T)p.epsilon, m, s.a + i, s.dx + i, s.dy + i); });
  multiply(p, row, start, n, s, s.b);
  if (p.dx.data) store(p.dx, row.dx, start, n, s.dx, row.weight * p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, row.dy, start, n, s.dy, row.weight * p.gradient_scale, p.stream);
  if (p.output == TERMS)
    store(p.value, row.value, start, n, s.a, row.weight, p.stream);
  else
    state[0] = sum(s.a, n);
}

// Several short rows that lie one behind the other: their terms in one go, then a sum for each.
template <typename T> void terms_flat(const Plan& p, const Row& first, int rows, double* totals, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  int n = (int)p.n, all = n * rows;
  const T* x = load(p.x, first.x, 0, all, s.x);
  const T* y = p.operation == ENTROPY ? x : load(p.y, first.y, 0, all, s.y);
  auto map = terms_of<T>(p);
  pieces<T>(x + CHUNK, y == x ? nullptr : y + CHUNK, (all + 15) & ~15,
            [&](int i, int m) { map(x + i, y + i, (T)p.epsilon, m, s.a + i, s.dx + i, s.dy + i); });
  if (p.dx.data) store(p.dx, first.dx, 0, all, s.dx, p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, first.dy, 0, all, s.dy, p.gradient_scale, p.stream);
  for (int r = 0; r < rows; r++) totals[r] = sum_short(s.a + r * n, n);
}

inline void terms_fold(const Plan&, int, const double* from, int count, i64, double* to, i64) {
  to[0] = sum_kept(from, count);
}

inline void terms_finish(const Plan&, int, const double* state, double* stats) { stats[0] = state ? state[0] : 0.0; }

// ---- the divergence of two rows of logits ----------------------------------------------------------------------------------

inline void put(double* state, i64 pitch, const Spread& s) {
  for (int k = 0; k < LOGITS_STATES; k++) state[k * pitch] = ((const double*)&s)[k];
}
inline Spread spread_at(const double* state, i64 pitch) {
  return {state[0], state[pitch], state[2 * pitch], state[3 * pitch], state[4 * pitch], state[5 * pitch],
          state[6 * pitch], state[7 * pitch], state[8 * pitch]};
}

template <typename T> void weights_and_means(const T* __restrict a, const T* __restrict b, int n, T m, T it,
                                             T* __restrict e, T* __restrict ec) {
  for (int i = 0; i < n; i++) {
    e[i] = weight(a[i], m, it);
    ec[i] = e[i] * (b[i] - a[i]);
  }
}

// returns whether any z is out of range or not a number
template <typename T> typename Real<T>::Bits spread(const T* __restrict a, const T* __restrict b, int n, T mean, T it,
                                                    T* __restrict e, T* __restrict ez) {
  typename Real<T>::Bits bad = 0;
  for (int i = 0; i < n; i++) {
    T z = centred(a[i], b[i], mean, it);
    bad |= in_range(z) ? 0 : 1;
    ez[i] = e[i] * z;
    e[i] = e[i] * expm1_minus(z);
  }
  return bad;
}

template <typename T> Spread far_chunk(const T* a, const T* b, int n, T m, double inverse_temperature, Buffers<T>& s) {
  T it = (T)inverse_temperature, max_b = maximum(b, (n + 15) & ~15);
  T zero = excluded(m) ? T(0) : m, from = excluded(max_b) ? T(0) : max_b;
  bool impossible = false;
  for (int i = 0; i < n; i++) {
    Shared<T> k = shared(a[i], b[i], zero, it);
    s.a[i] = k.e;
    s.b[i] = k.weight;
    s.dx[i] = k.c;
    impossible |= k.impossible;
  }
  double weights = sum(s.b, n);
  T mean = far_mean<T>(weights, sum(s.dx, n));
  for (int i = 0; i < n; i++) s.b[i] = softmax_weight((b[i] - from) * it);
  alignas(64) T near[CHUNK], near_x[CHUNK], mass[CHUNK];
  for (int i = 0; i < n; i++) {
    Apart<T> k = apart(a[i], b[i], s.a[i], s.b[i], mean, it);
    near[i] = k.near;
    near_x[i] = k.near_x;
    mass[i] = k.mass;
    s.dx[i] = k.weight;
    s.dy[i] = k.x;
  }
  return far_state(m, max_b, mean, inverse_temperature, sum(s.a, n), sum(s.b, n), sum(near, n), sum(near_x, n),
                   sum(mass, n), sum(s.dx, n), sum(s.dy, n), impossible);
}

template <typename T, int TERM, bool DX, bool DY>
void write_near(const T* __restrict a, const T* __restrict b, int n, Known<T> k, T* __restrict term, T* __restrict dx,
                T* __restrict dy) {
  for (int i = 0; i < n; i++) {
    Outputs<T> r = near_outputs(a[i], b[i], k, TERM, DX, DY);
    if (TERM) term[i] = r.term;
    if (DX) dx[i] = r.dx;
    if (DY) dy[i] = r.dy;
  }
}
template <typename T, int TERM>
void write_far(const T* __restrict a, const T* __restrict b, int n, Known<T> k, T* __restrict term, T* __restrict dx,
               T* __restrict dy) {
  for (int i = 0; i < n; i++) {
    Outputs<T> r = far_outputs(a[i], b[i], k, TERM);
    term[i] = r.term;
    dx[i] = r.dx;
    dy[i] = r.dy;
  }
}

template <typename T>
void logits_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state,
                  i64 pitch, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* a = load(p.x, row.x, start, n, s.x);
  const T* b = load(p.y, row.y, start, n, s.y);
  int n16 = (n + 15) & ~15;
  T it = (T)p.inverse_temperature;
  if (sweep == 0) {
    T m = maximum(a, n16);
    pieces<T>(a + CHUNK, nullptr, n16,
              [&](int i, int k) { weights_and_means(a + i, b + i, k, m, it, s.a + i, s.b + i); });
    double mean = sum(s.b, n), weights = sum(s.a, n);
    mean = mean / weights;
    typename Real<T>::Bits bad = usable(mean) ? 0 : 1;
    if (!bad)
      pieces<T>(nullptr, b + CHUNK, n16,
                [&](int i, int k) { bad |= spread(a + i, b + i, k, (T)mean, it, s.a + i, s.b + i); });
    if (bad) {
      put(state, pitch, far_chunk(a, b, n, m, p.inverse_temperature, s));
    } else {
      double x = sum(s.b, n);
      put(state, pitch, near_state(m, (T)mean, weights, x, sum(s.a, n)));
    }
    return;
  }
  Known<T> k(p.inverse_temperature, stats);
  bool literal = p.operation == REL_ENTR, term = p.output == TERMS, dx = p.dx.data, dy = p.dy.data;
  void (*outputs)(const T*, const T*, int, Known<T>, T*, T*, T*);
  if (stats[ROW_FAR] != 0) outputs = literal ? write_far<T, LITERAL> : write_far<T, DEVIANCE>;
  else if (term) outputs = literal ? write_near<T, LITERAL, true, true> : write_near<T, DEVIANCE, true, true>;
  else if (dx && dy) outputs = write_near<T, NO_TERM, true, true>;
  else outputs = dx ? write_near<T, NO_TERM, true, false> : write_near<T, NO_TERM, false, true>;
  // this sweep reads from the caches: the memory may bring the next row meanwhile
  i64 at = start * (i64)sizeof(T);
  pieces<T>(row.next_x ? row.next_x + at : nullptr, row.next_y ? row.next_y + at : nullptr, n16,
            [&](int i, int m) { outputs(a + i, b + i, m, k, s.a + i, s.dx + i, s.dy + i); });
  if (term) store(p.value, row.value, start, n, s.a, row.weight, p.stream);
  if (dx) store(p.dx, row.dx, start, n, s.dx, row.weight * p.gradient_scale, p.stream);
  if (dy) store(p.dy, row.dy, start, n, s.dy, row.weight * p.gradient_scale, p.stream);
}

template <typename T>
void logits_fold(const Plan& p, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep > 0) return;
  if (count == 1) {
    put(to, to_pitch, spread_at(from, pitch));
    return;
  }
  double it = p.inverse_temperature;
  alignas(64) double u[CHUNK], v[CHUNK];
  Spread all = {-infinity<double>(), 0, 0, 0, 0, -infinity<double>(), 0, 0, 0};
  for (int k = 0; k < count; k++) {
    Spread s = spread_at(from + k, pitch);
    all.max_a = s.max_a > all.max_a ? s.max_a : all.max_a;
    all.max_b = s.max_b > all.max_b ? s.max_b : all.max_b;
    all.far = s.far != 0 ? 1 : all.far;
    all.impossible = s.impossible != 0 ? 1 : all.impossible;
  }
  double zero = zero_for(all.max_a), zero_b = zero_for(all.max_b);
  for (int k = 0; k < count; k++) {
    Spread s = spread_at(from + k, pitch);
    u[k] = merge_weight(s.max_a, zero, it) * s.s;
    v[k] = u[k] * s.m;
  }
  double sum_c = sum(v, count);
  all.s = sum(u, count);
  all.m = merge_anchor<T>(sum_c, all.s);
  for (int k = 0; k < count; k++) {
    Moved to_anchor = moved(spread_at(from + k, pitch), zero, all.m, it);
    u[k] = to_anchor.x;
    v[k] = to_anchor.g;
    all.far = to_anchor.far ? 1 : all.far;
  }
  all.x = sum(u, count);
  all.g = sum(v, count);
  for (int k = 0; k < count; k++) {
    Spread s = spread_at(from + k, pitch);
    u[k] = s.q * merge_weight(s.max_b, zero_b, it);
  }
  all.q = sum(u, count);
  put(to, to_pitch, all);
}

template <typename T> void finish_logits(const Plan& p, int sweep, const double* s, double* stats) {
  if (sweep > 0) return;
  if (s) logits_finish<T>(spread_at(s, 1), p.inverse_temperature, stats);
  else std::fill(stats, stats + MAX_STATS, 0.0);
}

// ---- everything else with logits: normalise, then treat as log-probabilities; always wide ------------------------------------

enum { SUM_VALUE, SUM_DX, SUM_DY, SUM_STATES };
enum { NORM_X = 3, NORM_Y = 5 };   // stats: [0..2] the sums; then maximum and log S of x and of y

inline void norm_chunk(const Array& a, const char* row, i64 start, int n, double it, double* state, i64 pitch,
                       Buffers<double>& s) {
  const double* x = load(a, row, start, n, s.x);
  double m = maximum(x, (n + 15) & ~15), zero = zero_for(m);
  for (int i = 0; i < n; i++) {
    s.b[i] = x[i] == m ? 1.0 : 0.0;
    s.a[i] = norm_rest(x[i], m, zero, it);
  }
  state[0] = m;
  state[pitch] = excluded(m) ? 0.0 : sum(s.b, n);
  state[2 * pitch] = sum(s.a, n);
}

inline void norm_fold(double it, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  alignas(64) double ties[CHUNK], rest[CHUNK];
  double top = -infinity<double>();
  for (int k = 0; k < count; k++) top = from[k] > top ? from[k] : top;
  double zero = zero_for(top);
  for (int k = 0; k < count; k++) {
    Norm s = {from[k], from[k + pitch], from[k + 2 * pitch]};
    rest[k] = merge_rest(s, top, zero, it);
    ties[k] = s.max == top ? s.count : 0.0;
  }
  to[0] = top;
  to[to_pitch] = sum(ties, count);
  to[2 * to_pitch] = sum(rest, count);
}

inline void norm_finish(const double* state, double* max_and_log) {
  max_and_log[0] = state[0];
  max_and_log[1] = log_norm({state[0], state[1], state[2]});
}

inline const double* log_probs(const Array& a, const char* row, int space, i64 start, int n, double it,
                               const double* max_and_log, double* buffer) {
  const double* x = load(a, row, start, n, buffer);
  if (space != LOGITS) return x;
  int n16 = (n + 15) & ~15;
  double m = max_and_log[0], l = max_and_log[1];
  for (int i = 0; i < n16; i++) buffer[i] = log_prob_of(x[i], m, l, it);
  return buffer;
}

inline void mixed_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state,
                        i64 pitch, void* scratch) {
  Buffers<double>& s = *(Buffers<double>*)scratch;
  double it = p.inverse_temperature;
  bool has_y = p.operation != ENTROPY;
  if (sweep == 0) {
    if (p.space_x == LOGITS) norm_chunk(p.x, row.x, start, n, it, state, pitch, s);
    if (has_y && p.space_y == LOGITS) norm_chunk(p.y, row.y, start, n, it, state + NORM_STATES * pitch, pitch, s);
    return;
  }
  const double* x = log_probs(p.x, row.x, p.space_x, start, n, it, stats + NORM_X, s.x);
  const double* y = has_y ? log_probs(p.y, row.y, p.space_y, start, n, it, stats + NORM_Y, s.y) : x;
  int n16 = (n + 15) & ~15;
  terms_of<double>(p)(x, y, p.epsilon, n16, s.a, s.dx, s.dy);
  multiply(p, row, start, n, s, s.b);
  if (sweep == 1) {
    if (p.output == TERMS) store(p.value, row.value, start, n, s.a, row.weight, p.stream);
    state[SUM_VALUE * pitch] = sum(s.a, n);
    state[SUM_DX * pitch] = p.dx.data ? sum(s.dx, n) : 0.0;
    state[SUM_DY * pitch] = p.dy.data ? sum(s.dy, n) : 0.0;
    return;
  }
  double scale = row.weight * p.gradient_scale;
  if (p.dx.data) {
    if (p.space_x == LOGITS)   // through the softmax
      for (int i = 0; i < n16; i++) s.dx[i] = through_softmax(s.dx[i], x[i], stats[SUM_DX], it);
    store(p.dx, row.dx, start, n, s.dx, scale, p.stream);
  }
  if (p.dy.data) {
    if (p.space_y == LOGITS && !is_final(p.operation))
      for (int i = 0; i < n16; i++) s.dy[i] = through_softmax(s.dy[i], y[i], stats[SUM_DY], it);
    store(p.dy, row.dy, start, n, s.dy, scale, p.stream);
  }
}

inline void mixed_fold(const Plan& p, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep == 0) {
    if (p.space_x == LOGITS) norm_fold(p.inverse_temperature, from, count, pitch, to, to_pitch);
    if (p.operation != ENTROPY && p.space_y == LOGITS)
      norm_fold(p.inverse_temperature, from + NORM_STATES * pitch, count, pitch, to + NORM_STATES * to_pitch, to_pitch);
  } else if (sweep == 1) {
    for (int k = 0; k < SUM_STATES; k++) to[k * to_pitch] = sum_kept(from + k * pitch, count);
  }
}

inline void mixed_finish(const Plan& p, int sweep, const double* state, double* stats) {
  if (!state) {
    for (int k = 0; k < MAX_STATS; k++) stats[k] = 0;
  } else if (sweep == 0) {
    if (p.space_x == LOGITS) norm_finish(state, stats + NORM_X);
    if (p.operation != ENTROPY && p.space_y == LOGITS) norm_finish(state + NORM_STATES, stats + NORM_Y);
  } else if (sweep == 1) {
    for (int k = 0; k < SUM_STATES; k++) stats[k] = state[k];
  }
}

// ---- the choice ----------------------------------------------------------------------------------------------------------------

inline bool of_logits(const Plan& p) {   // the cancellation-free form is for the divergence of two rows of logits
  return p.space_x == LOGITS && p.space_y == LOGITS && (p.operation == KL_DIV || p.operation == REL_ENTR) &&
         !p.factors.data;
}

inline Kernel kernel(const Plan& p) {
  bool gradient = p.dx.data || p.dy.data;
  if (of_logits(p)) {
    int sweeps = gradient || p.output == TERMS ? 2 : 1;
    if (p.wide) return {sweeps, {LOGITS_STATES, 0, 0}, logits_chunk<double>, logits_fold<double>, finish_logits<double>,
                        nullptr};
    return {sweeps, {LOGITS_STATES, 0, 0}, logits_chunk<float>, logits_fold<float>, finish_logits<float>, nullptr};
  }
  if (p.space_x == LOGITS || p.space_y == LOGITS)
    return {gradient ? 3 : 2, {2 * NORM_STATES, SUM_STATES, 0}, mixed_chunk, mixed_fold, mixed_finish, nullptr};
  if (p.wide) return {1, {1, 0, 0}, terms_chunk<double>, terms_fold, terms_finish, terms_flat<double>};
  return {1, {1, 0, 0}, terms_chunk<float>, terms_fold, terms_finish, terms_flat<float>};
}

// klcore's own elementary functions over arrays, for the tests
template <typename T> void elementary(int function, const T* x, T* out, i64 n) {
  switch (function) {
    case 0: for (i64 i = 0; i < n; i++) out[i] = log(x[i]); break;
    case 1: for (i64 i = 0; i < n; i++) out[i] = exp(x[i]); break;
    case 2: for (i64 i = 0; i < n; i++) out[i] = log1p(x[i]); break;
    default: for (i64 i = 0; i < n; i++) out[i] = expm1(x[i]);
  }
}
