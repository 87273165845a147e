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

template <int D> struct Stored;   // how a dtype lies in memory; T is float or double
template <> struct Stored<FLOAT64> {
  typedef double Type;
  template <typename T> static KL_FN T widen(double v) { return (T)v; }
  template <typename T> static KL_FN double narrow(T v) { return (double)v; }
};
template <> struct Stored<FLOAT32> {
  typedef float Type;
  template <typename T> static KL_FN T widen(float v) { return (T)v; }
  template <typename T> static KL_FN float narrow(T v) { return (float)v; }
};
template <> struct Stored<BFLOAT16> {
  typedef std::uint16_t Type;
  template <typename T> static KL_FN T widen(std::uint16_t v) { return (T)real((unsigned)v << 16); }
  template <typename T> static KL_FN std::uint16_t narrow(T v) {   // to nearest, ties to even
    unsigned b = bits((float)v);
    unsigned r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (std::uint16_t)((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
  }
};
template <> struct Stored<FLOAT16> {
  typedef std::uint16_t Type;
  template <typename T> static KL_FN T widen(std::uint16_t v) {
    unsigned m = v & 0x7fffu, sign = (unsigned)(v & 0x8000u) << 16;
    unsigned finite = bits(real(m << 13) * 0x1p112f);    // rebias; the product is exact, subnormal halves included
    return (T)real((m >= 0x7c00u ? 0x7f800000u | (m << 13) : finite) | sign);
  }
  template <typename T> static KL_FN std::uint16_t narrow(T v) {   // to nearest, ties to even
    unsigned b = bits((float)v), m = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    unsigned normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    unsigned subnormal = bits(real(m) + 0.5f) - 0x3f000000u;       // adding 1/2 leaves multiples of 2^-24
    unsigned r = m < 0x38800000u ? subnormal : normal;
    r = m >= 0x477ff000u ? 0x7c00u : r;                            // rounds beyond 65504
    r = m > 0x7f800000u ? 0x7e00u : r;
    return (std::uint16_t)(r | sign);
  }
};

template <typename T> constexpr int code_of() { return sizeof(T) == 8 ? FLOAT64 : FLOAT32; }

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
  if (!stream || a.stride != size) return narrow_to(a.dtype, v, (T)scale, n, p, a.stride);
  alignas(64) char line[CHUNK * 8];
  narrow_to(a.dtype, v, (T)scale, n, line, size);
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
  typedef void (*Map)(const T* x, const T* y, int n, T* value, T* dx, T* dy);
};

// Ordinary arguments take the shorter form; the bits are those of the long one. Looked at beforehand, because what the
// shorter form makes of a zero are subnormals, with which processors are slow.
template <class F, typename T, bool DX, bool DY>
void terms(const T* __restrict x, const T* __restrict y, int n, T* __restrict value, T* __restrict dx, T* __restrict dy) {
  if constexpr (F::has_ordinary) {
    typename Real<T>::Bits others = 0;
    for (int i = 0; i < n; i++) others |= F::ordinary(x[i], y[i]) ? 0 : 1;
    if (!others) {
      for (int i = 0; i < n; i++) {
        value[i] = F::template value<false>(x[i], y[i]);
        if (DX) dx[i] = F::template dx<false>(x[i], y[i]);
        if (DY) dy[i] = F::template dy<false>(x[i], y[i]);
      }
      return;
    }
  }
  for (int i = 0; i < n; i++) {
    value[i] = F::value(x[i], y[i]);
    if (DX) dx[i] = F::dx(x[i], y[i]);
    if (DY) dy[i] = F::dy(x[i], y[i]);
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
  if (sx == sy)
    return sx == PROBS ? terms_in<PROBS, PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, LOG_PROBS, T>(p.operation, dx, dy);
  if constexpr (sizeof(T) == 8)   // the plan is wide wherever the spaces differ
    return sx == PROBS ? terms_in<PROBS, LOG_PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, PROBS, T>(p.operation, dx, dy);
  return nullptr;
}

// Probabilities and log-probabilities: one sweep does everything.
template <typename T>
void terms_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double* state, i64, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* x = load(p.x, row.x, start, n, s.x);
  const T* y = p.operation == ENTROPY ? x : load(p.y, row.y, start, n, s.y);
  auto map = terms_of<T>(p);
  pieces<T>(x + CHUNK, y == x ? nullptr : y + CHUNK, (n + 15) & ~15,
            [&](int i, int m) { map(x + i, y + i, m, s.a + i, s.dx + i, s.dy + i); });
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
            [&](int i, int m) { map(x + i, y + i, m, s.a + i, s.dx + i, s.dy + i); });
  if (p.dx.data) store(p.dx, first.dx, 0, all, s.dx, p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, first.dy, 0, all, s.dy, p.gradient_scale, p.stream);
  for (int r = 0; r < rows; r++) totals[r] = sum_short(s.a + r * n, n);
}

inline void terms_fold(const Plan&, int, const double* from, int count, i64, double* to, i64) {
  to[0] = sum_kept(from, count);
}

inline void terms_finish(const Plan&, int, const double* state, double* stats) { stats[0] = state ? state[0] : 0.0; }

template <typename T> KL_FN T softmax_weight(T u) { return u == u ? exp_flushed(u) : u; }   // where NaN may come

// ---- the divergence of two rows of logits ----------------------------------------------------------------------------------
//
// A chunk's state, with T the temperature, a = x's logits, b = y's, c = b - a and z = (c - M)/T:
enum {
  MAX_A,   // m = max a
  S,       // sum e^((a-m)/T): the weights
  M,       // weighted mean of c, rounded to T: the anchor
  X,       // sum of weights * z, nearly 0
  G,       // sum of weights * (e^z - 1 - z) >= 0
  MAX_B,   // where y's mass is measured from:
  Q,       // sum e^((b - MAX_B)/T)
  FAR,     // some class has e^z beyond what the weights can carry
  IMPOSSIBLE,   // some class is possible for x and impossible for y
  LOGITS_STATES
};
// A row's stats: the value, then what the writing sweep needs
enum { VALUE, ROW_MAX_A, ROW_INV_S, ROW_SHIFT, ROW_SHIFT_LOW, ROW_MAX_B, ROW_INV_Q, ROW_FAR, ROW_MEAN, ROW_MEAN_LOW };

template <typename T> void weights_and_means(const T* __restrict a, const T* __restrict b, int n, T m, T it,
                                             T* __restrict e, T* __restrict ec) {
  for (int i = 0; i < n; i++) {
    e[i] = exp_flushed((a[i] - m) * it);
    ec[i] = e[i] * (b[i] - a[i]);
  }
}

// returns whether any z is out of range or not a number
template <typename T> typename Real<T>::Bits spread(const T* __restrict a, const T* __restrict b, int n, T mean, T it,
                                                    T* __restrict e, T* __restrict ez) {
  typename Real<T>::Bits bad = 0;
  for (int i = 0; i < n; i++) {
    T low, c = difference(b[i], a[i], low), z = ((c - mean) + low) * it;
    bad |= z < Real<T>::far ? 0 : 1;
    ez[i] = e[i] * z;
    e[i] = e[i] * expm1_minus(z);
  }
  return bad;
}

// The same chunk where e^z leaves the range, or classes are excluded: y's mass is measured from its own maximum.
template <typename T> void far_chunk(const Plan& p, const T* a, const T* b, int n, double m, double* state, i64 pitch,
                                     Buffers<T>& s) {
  int n16 = (n + 15) & ~15;
  T it = (T)p.inverse_temperature, mb = maximum(b, n16), zero = m == -infinity<double>() ? T(0) : (T)m;
  T from = mb == -infinity<T>() ? T(0) : mb;
  typename Real<T>::Bits impossible = 0;
  for (int i = 0; i < n; i++) {                       // weights, and the mean over classes that both allow
    T e = softmax_weight((a[i] - zero) * it), shared = b[i] > -infinity<T>() ? e : T(0), c = e * (b[i] - a[i]);
    T alone = a[i] > -infinity<T>() ? T(1) : T(0);
    alone = excluded(b[i]) ? alone : T(0);
    impossible |= bits(alone);
    s.a[i] = e;
    s.b[i] = shared;
    s.dx[i] = shared > T(0) ? c : T(0);
  }
  double weights = sum(s.b, n), mean_c = weights > 0 ? sum(s.dx, n) / weights : 0.0;
  T mean = (T)mean_c;
  mean = absolute(mean) < infinity<T>() ? mean : T(0);
  for (int i = 0; i < n; i++) s.b[i] = s.a[i];
  state[S * pitch] = sum(s.b, n);
  for (int i = 0; i < n; i++) s.b[i] = softmax_weight((b[i] - from) * it);
  for (int i = 0; i < n; i++) s.dy[i] = s.b[i];
  state[Q * pitch] = sum(s.dy, n);
  // near classes by the series; of the others, y's mass (b), x's (dx) and x's times z (dy)
  alignas(64) T near[CHUNK], near_x[CHUNK];
  for (int i = 0; i < n; i++) {
    T low, c = difference(b[i], a[i], low), e = s.a[i];
    low = absolute(c) < infinity<T>() ? low : T(0);
    T z = ((c - mean) + low) * it;
    T near_e = z < Real<T>::far ? e : T(0), near_z = z < Real<T>::far ? z : T(0);
    T far_e = z < Real<T>::far ? T(0) : e, mass = z < Real<T>::far ? T(0) : s.b[i];
    near_e = excluded(b[i]) ? T(0) : near_e;
    near_z = excluded(b[i]) ? T(0) : near_z;
    near[i] = near_e * expm1_minus(near_z);
    near_x[i] = near_e * near_z;
    s.b[i] = e > T(0) ? mass : s.b[i];
    s.dx[i] = far_e;
    s.dy[i] = far_e * (far_e > T(0) ? z : T(0));
  }
  double far_x = sum(s.dy, n), far_mass = sum(s.b, n), far_weights = sum(s.dx, n);
  double scale = far_mass > 0 ? exp(((double)from - (zero + (double)mean)) * p.inverse_temperature) : 0.0;
  state[M * pitch] = mean;
  state[X * pitch] = sum(near_x, n) + far_x;
  state[G * pitch] = sum(near, n) + ((far_mass * scale - far_weights) - far_x);
  state[MAX_B * pitch] = mb;
  state[FAR * pitch] = 1;
  state[IMPOSSIBLE * pitch] = impossible ? 1 : 0;
}

// what a row's classes contribute, once its stats are known
template <typename T> struct Known {
  // t = (c - shift - shift_low)/T; t + KL = (c - mean - mean_low)/T, which has nothing to cancel
  T m, it, inv_s, shift, shift_low, mean, mean_low, max_b, inv_q;
  Known(const Plan& p, const double* stats)
      : m((T)stats[ROW_MAX_A]), it((T)p.inverse_temperature), inv_s((T)stats[ROW_INV_S]),
        shift((T)stats[ROW_SHIFT]), shift_low((T)stats[ROW_SHIFT_LOW]), mean((T)stats[ROW_MEAN]),
        mean_low((T)stats[ROW_MEAN_LOW]), max_b((T)stats[ROW_MAX_B]), inv_q((T)stats[ROW_INV_Q]) {}
};

enum { NO_TERM, DEVIANCE, LITERAL };   // the term wanted: that of kl_div, or of rel_entr

template <typename T, int TERM, bool DX, bool DY>
void near_outputs(const T* __restrict a, const T* __restrict b, int n, Known<T> k, T* __restrict term, T* __restrict dx,
                  T* __restrict dy) {
  for (int i = 0; i < n; i++) {
    T w = exp_flushed((a[i] - k.m) * k.it) * k.inv_s;
    T low, c = difference(b[i], a[i], low), t = ((c - k.shift) + (low - k.shift_low)) * k.it;
    if (TERM) term[i] = TERM == LITERAL ? T(0) - w * t : w * expm1_minus(t);
    if (DX) dx[i] = T(0) - (w * (((c - k.mean) + (low - k.mean_low)) * k.it)) * k.it;
    if (DY) dy[i] = (w * expm1_of(t, expm1_minus(t))) * k.it;
  }
}

// the same where classes are excluded, or weights cannot carry e^t
template <typename T, int TERM>
void far_outputs(const T* __restrict a, const T* __restrict b, int n, Known<T> k, T* __restrict term, T* __restrict dx,
                 T* __restrict dy) {
  T nothing = T(0) * k.inv_s;   // NaN where the row is undefined
  for (int i = 0; i < n; i++) {
    T w = softmax_weight((a[i] - k.m) * k.it) * k.inv_s, q = softmax_weight((b[i] - k.max_b) * k.it) * k.inv_q;
    w = excluded(a[i]) ? T(0) : w;
    q = excluded(b[i]) ? T(0) : q;
    T low, c = difference(b[i], a[i], low);
    low = absolute(c) < infinity<T>() ? low : T(0);
    T t = ((c - k.shift) + (low - k.shift_low)) * k.it, wt = w * t;
    wt = w > T(0) ? wt : T(0);
    T near = t < Real<T>::far ? t : T(0), g = expm1_minus(near);
    T v = t < Real<T>::far ? w * g : (q - w) - wt, d = t < Real<T>::far ? w * expm1_of(near, g) : q - w;
    v = w > T(0) ? v : q + nothing;
    d = w > T(0) ? d : q + nothing;
    if (TERM == LITERAL) v = T(0) - wt;
    v = excluded(b[i]) ? infinity<T>() : v;
    v = excluded(a[i]) ? (TERM == LITERAL ? nothing : q + nothing) : v;
    T s = T(0) - (w * (((c - k.mean) + (low - k.mean_low)) * k.it)) * k.it;
    term[i] = v;
    dx[i] = w > T(0) ? s : T(0) * k.mean_low + nothing;
    dy[i] = d * k.it;
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
    state[MAX_A * pitch] = m;
    typename Real<T>::Bits bad = absolute(mean) < 1e300 ? 0 : 1;
    if (!bad)
      pieces<T>(nullptr, b + CHUNK, n16,
                [&](int i, int k) { bad |= spread(a + i, b + i, k, (T)mean, it, s.a + i, s.b + i); });
    if (!bad) {
      state[S * pitch] = weights;
      state[M * pitch] = (T)mean;
      double x = sum(s.b, n), g = sum(s.a, n);
      state[X * pitch] = x;
      state[G * pitch] = g;
      state[MAX_B * pitch] = (double)m + (double)(T)mean;
      state[Q * pitch] = (weights + x) + g;
      state[FAR * pitch] = 0;
      state[IMPOSSIBLE * pitch] = 0;
    } else {
      far_chunk(p, a, b, n, m, state, pitch, s);
    }
    return;
  }
  Known<T> k(p, stats);
  bool literal = p.operation == REL_ENTR, term = p.output == TERMS, dx = p.dx.data, dy = p.dy.data;
  void (*outputs)(const T*, const T*, int, Known<T>, T*, T*, T*);
  if (stats[ROW_FAR] != 0) outputs = literal ? far_outputs<T, LITERAL> : far_outputs<T, DEVIANCE>;
  else if (term) outputs = literal ? near_outputs<T, LITERAL, true, true> : near_outputs<T, DEVIANCE, true, true>;
  else if (dx && dy) outputs = near_outputs<T, NO_TERM, true, true>;
  else outputs = dx ? near_outputs<T, NO_TERM, true, false> : near_outputs<T, NO_TERM, false, true>;
  // this sweep reads from the caches: the memory may bring the next row meanwhile
  i64 at = start * (i64)sizeof(T);
  pieces<T>(row.next_x ? row.next_x + at : nullptr, row.next_y ? row.next_y + at : nullptr, n16,
            [&](int i, int m) { outputs(a + i, b + i, m, k, s.a + i, s.dx + i, s.dy + i); });
  if (term) store(p.value, row.value, start, n, s.a, row.weight, p.stream);
  if (dx) store(p.dx, row.dx, start, n, s.dx, row.weight * p.gradient_scale, p.stream);
  if (dy) store(p.dy, row.dy, start, n, s.dy, row.weight * p.gradient_scale, p.stream);
}

// Up to CHUNK states into one, by the same steps as for the classes of a chunk, between chunks.
template <typename T>
void logits_fold(const Plan& p, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep > 0) return;
  if (count == 1) {
    for (int k = 0; k < LOGITS_STATES; k++) to[k * to_pitch] = from[k * pitch];
    return;
  }
  double it = p.inverse_temperature;
  const double *m = from + MAX_A * pitch, *s = from + S * pitch, *mean = from + M * pitch, *x = from + X * pitch,
               *g = from + G * pitch, *mb = from + MAX_B * pitch, *q = from + Q * pitch, *far = from + FAR * pitch,
               *impossible = from + IMPOSSIBLE * pitch;
  alignas(64) double w[CHUNK], u[CHUNK], v[CHUNK];
  double top = -infinity<double>(), top_b = top, is_far = 0, is_impossible = 0;
  for (int k = 0; k < count; k++) {
    top = m[k] > top ? m[k] : top;
    top_b = mb[k] > top_b ? mb[k] : top_b;
    is_far = far[k] != 0 ? 1 : is_far;
    is_impossible = impossible[k] != 0 ? 1 : is_impossible;
  }
  double zero = excluded(top) ? 0.0 : top, zero_b = excluded(top_b) ? 0.0 : top_b;
  for (int k = 0; k < count; k++) {
    w[k] = exp_flushed((m[k] - zero) * it);
    u[k] = w[k] * s[k];
    v[k] = u[k] * mean[k];
  }
  double sum_v = sum(v, count), sum_s = sum(u, count), anchor = sum_s > 0 ? (double)(T)(sum_v / sum_s) : 0.0;
  for (int k = 0; k < count; k++) {
    double d = (mean[k] - anchor) * it, shifted = x[k] + d * s[k];
    double e = d < Real<double>::far ? d : 0.0, gap = expm1_minus(e);
    double near = w[k] * ((exp(e) * g[k] + gap * s[k]) + expm1_of(e, gap) * x[k]);
    bool is_near = (absolute(d) < Real<double>::far) & (g[k] < infinity<double>()) & (w[k] > 0);
    u[k] = w[k] * shifted;
    v[k] = near;
    if (!is_near) {
      double mass = q[k] > 0 ? q[k] * exp((mb[k] - (zero + anchor)) * it) : q[k];
      v[k] = mass - (w[k] * s[k] + u[k]);
      is_far = 1;
    }
  }
  double sum_x = sum(u, count), sum_g = sum(v, count);
  for (int k = 0; k < count; k++) u[k] = q[k] * exp_flushed((mb[k] - zero_b) * it);
  double sum_q = sum(u, count);
  to[MAX_A * to_pitch] = top;
  to[S * to_pitch] = sum_s;
  to[M * to_pitch] = anchor;
  to[X * to_pitch] = sum_x;
  to[G * to_pitch] = sum_g;
  to[MAX_B * to_pitch] = top_b;
  to[Q * to_pitch] = sum_q;
  to[FAR * to_pitch] = is_far;
  to[IMPOSSIBLE * to_pitch] = is_impossible;
}

template <typename T> void logits_finish(const Plan& p, int sweep, const double* s, double* stats) {
  if (sweep > 0) return;
  if (!s) {
    for (int k = 0; k < MAX_STATS; k++) stats[k] = 0;
    return;
  }
  double it = p.inverse_temperature;
  double mean_z = s[X] / s[S], y = (s[G] + s[X]) / s[S];
  bool close = y < 1 && s[IMPOSSIBLE] == 0;
  double lse, shift, shift_low;   // log E_p[e^z]; log q - log p = (c - shift - shift_low)/T
  if (close) {
    lse = log1p(y);
    shift = s[M];
    shift_low = lse / it;
  } else {                        // not small: from the two masses
    double apart = (s[MAX_B] - s[MAX_A]) + log(s[Q] / s[S]) / it;
    lse = (apart - s[M]) * it;
    shift = (T)apart;
    shift_low = apart - shift;
  }
  double value = lse - mean_z;
  value = value < 0 ? 0.0 : value;                     // rounding of an exact zero
  value = s[IMPOSSIBLE] != 0 ? infinity<double>() : value;
  bool defined = s[S] > 0 && s[S] < infinity<double>() && s[Q] > 0 && s[MAX_B] < infinity<double>();
  stats[VALUE] = defined ? value : nan<double>();
  stats[ROW_MAX_A] = s[MAX_A];
  stats[ROW_INV_S] = defined ? 1.0 / s[S] : nan<double>();
  stats[ROW_SHIFT] = shift;
  stats[ROW_SHIFT_LOW] = shift_low;
  stats[ROW_MAX_B] = s[MAX_B];
  stats[ROW_INV_Q] = 1.0 / s[Q];
  stats[ROW_FAR] = s[FAR];
  stats[ROW_MEAN] = s[M];
  stats[ROW_MEAN_LOW] = s[IMPOSSIBLE] != 0 ? nan<double>() : mean_z / it;   // no derivative where the value is infinite
}

// ---- everything else with logits: normalise, then treat as log-probabilities; always wide ------------------------------------
//
// log S of a row is kept as (max, how many classes attain it, the rest of the sum), so that log S is precise near 0.
enum { NORM_MAX, NORM_COUNT, NORM_REST, NORM_STATES };
enum { SUM_VALUE, SUM_DX, SUM_DY, SUM_STATES };
enum { NORM_X = 3, NORM_Y = 5 };   // stats: [0..2] the sums; then maximum and log S of x and of y

inline void norm_chunk(const Array& a, const char* row, i64 start, int n, double it, double* state, i64 pitch,
                       Buffers<double>& s) {
  const double* x = load(a, row, start, n, s.x);
  double m = maximum(x, (n + 15) & ~15), zero = excluded(m) ? 0.0 : m;
  for (int i = 0; i < n; i++) {
    bool top = x[i] == m;
    s.b[i] = top ? 1.0 : 0.0;
    s.a[i] = top ? 0.0 : softmax_weight((x[i] - zero) * it);
  }
  state[NORM_MAX * pitch] = m;
  state[NORM_COUNT * pitch] = excluded(m) ? 0.0 : sum(s.b, n);
  state[NORM_REST * pitch] = sum(s.a, n);
}

inline void norm_fold(double it, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  const double *m = from + NORM_MAX * pitch, *c = from + NORM_COUNT * pitch, *r = from + NORM_REST * pitch;
  alignas(64) double ties[CHUNK], rest[CHUNK];
  double top = -infinity<double>();
  for (int k = 0; k < count; k++) top = m[k] > top ? m[k] : top;
  double zero = excluded(top) ? 0.0 : top;
  for (int k = 0; k < count; k++) {
    double below = exp_flushed((m[k] - zero) * it) * (c[k] + r[k]);
    rest[k] = m[k] == top ? r[k] : below;
    ties[k] = m[k] == top ? c[k] : 0.0;
  }
  to[NORM_MAX * to_pitch] = top;
  to[NORM_COUNT * to_pitch] = sum(ties, count);
  to[NORM_REST * to_pitch] = sum(rest, count);
}

inline void norm_finish(const double* state, double* max_and_log) {
  double top = state[NORM_MAX], ties = state[NORM_COUNT], rest = state[NORM_REST];
  bool defined = ties > 0 && top < infinity<double>();
  max_and_log[0] = top;
  max_and_log[1] = !defined ? nan<double>() : ties == 1.0 ? log1p(rest) : log(ties + rest);
}

inline const double* log_probs(const Array& a, const char* row, int space, i64 start, int n, double it,
                               const double* max_and_log, double* buffer) {
  const double* x = load(a, row, start, n, buffer);
  if (space != LOGITS) return x;
  int n16 = (n + 15) & ~15;
  double m = max_and_log[0], l = max_and_log[1];
  for (int i = 0; i < n16; i++) buffer[i] = (x[i] - m) * it - l;
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
  terms_of<double>(p)(x, y, n16, s.a, s.dx, s.dy);
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
      for (int i = 0; i < n16; i++) s.dx[i] = (s.dx[i] - exp(x[i]) * stats[SUM_DX]) * it;
    store(p.dx, row.dx, start, n, s.dx, scale, p.stream);
  }
  if (p.dy.data) {
    if (p.space_y == LOGITS)
      for (int i = 0; i < n16; i++) s.dy[i] = (s.dy[i] - exp(y[i]) * stats[SUM_DY]) * it;
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
  return p.space_x == LOGITS && p.space_y == LOGITS && (p.operation == KL_DIV || p.operation == REL_ENTR);
}

inline Kernel kernel(const Plan& p) {
  bool gradient = p.dx.data || p.dy.data;
  if (of_logits(p)) {
    int sweeps = gradient || p.output == TERMS ? 2 : 1;
    if (p.wide) return {sweeps, {LOGITS_STATES, 0, 0}, logits_chunk<double>, logits_fold<double>, logits_finish<double>,
                        nullptr};
    return {sweeps, {LOGITS_STATES, 0, 0}, logits_chunk<float>, logits_fold<float>, logits_finish<float>, nullptr};
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
