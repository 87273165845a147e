// One row on the CPU: loads, sweeps over chunks, sums. Included once for every instruction set (kl_isa.h), each time in
// a different namespace; kl_batch.h calls what `kernel` returns. The formulas of terms are in kl_math.h, the threads in
// kl_batch.h. Loops are written for the compiler's vectoriser: over contiguous buffers, without branches, a multiple of 16
// elements long. Every buffer fits in the first-level cache.

// ---- sums: the order of addition of kl_tree.h ----------------------------------------------------------------------------

#if defined(__GNUC__) || defined(__clang__)
#define KL_LAMBDA __attribute__((always_inline))   // after a lambda's parameters: vectorised with the calling loop
#else
#define KL_LAMBDA
#endif
// Keeps a function out of line, so that its parameters stay __restrict. If it is inlined, some compilers forget that, and do not
// vectorise its loops.
#if defined(_MSC_VER)
#define KL_APART __declspec(noinline)
#else
#define KL_APART __attribute__((noinline))
#endif

// Rows of columns that are added in one go, so that the sums stay in registers.
constexpr int DEPTH = 4, PIECE = DEPTH * COLUMNS;

template <int D, class F> KL_FN void at_depth(int j, F f) {
  f(j, D * COLUMNS + j);
  if constexpr (D + 1 < DEPTH) at_depth<D + 1>(j, f);
}
// Calls f(j, i) for the elements i of a piece of m and their columns j; each column gets its elements in order.
template <class F> KL_FN void down(int m, F f) {
  if (m == PIECE) {
    for (int j = 0; j < COLUMNS; j++) at_depth<0>(j, f);
    return;
  }
  for (int k = 0; k < m; k += COLUMNS) {
    int end = m - k < COLUMNS ? m - k : COLUMNS;
    for (int j = 0; j < end; j++) f(j, k + j);
  }
}

// The sums of a chunk's columns, and the fold. Plain arrays and loops of constant length, which compilers vectorise however they
// unroll them.
template <typename T> struct Columns {
  alignas(64) T at[COLUMNS];
  Columns() {
    for (int j = 0; j < COLUMNS; j++) at[j] = T(0);
  }
  double total() const {
    alignas(64) double d[COLUMNS / 2];
    for (int j = 0; j < COLUMNS / 2; j++) d[j] = (double)at[j] + (double)at[j + COLUMNS / 2];
    fold<COLUMNS / 4>(d);
    return d[0] + 0.0;   // -0 becomes +0, as if every missing +0 had been added
  }
  template <int HALF> static KL_FN void fold(double* d) {
    for (int j = 0; j < HALF; j++) d[j] += d[j + HALF];
    if constexpr (HALF > 1) fold<HALF / 2>(d);
  }
};

template <typename T> void add_columns(const T* __restrict t, int m, T* __restrict s) {
  down(m, [=](int j, int i) KL_LAMBDA { s[j] += t[i]; });
}
// the sum of t[0..n), 0 < n <= CHUNK
template <typename T> double sum(const T* t, int n) {
  Columns<T> s;
  for (int i = 0; i < n; i += PIECE) add_columns(t + i, n - i < PIECE ? n - i : PIECE, s.at);
  return s.total();
}

// the sum of any number of doubles, level by level; overwrites t
inline double sum_levels(double* t, i64 n) {
  if (n == 0) return 0.0;
  for (; n > CHUNK; n = (n + CHUNK - 1) / CHUNK)
    for (i64 g = 0; g * CHUNK < n; g++) t[g] = sum(t + g * CHUNK, (int)(n - g * CHUNK < CHUNK ? n - g * CHUNK : CHUNK));
  return sum(t, (int)n);
}

// m[j] = the larger of m[j] and t[j]; m[j] where t is NaN. Both are loaded first: gcc would select between addresses otherwise.
template <int N, typename T> KL_FN void take_larger(T* m, const T* t) {
  for (int j = 0; j < N; j++) {
    T a = t[j], b = m[j];
    m[j] = a > b ? a : b;
  }
}

// the largest element; NaN is ignored. n is a multiple of 16.
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

template <typename T> void widen(int dtype, const char* p, i64 stride, int n, T* out) {
  switch (dtype) {
    case FLOAT64: widen_into<FLOAT64>(p, stride, n, out); break;
    case FLOAT32: widen_into<FLOAT32>(p, stride, n, out); break;
    case FLOAT16: widen_into<FLOAT16>(p, stride, n, out); break;
    default: widen_into<BFLOAT16>(p, stride, n, out);
  }
}

// Elements [start, start+n) of a row as T, readable up to the next multiple of 16: in place where possible, else in buffer.
template <typename T> const T* load(const Array& a, const char* row, i64 start, int n, T* buffer) {
  const char* p = row + start * a.stride;
  if (a.dtype == code_of<T>() && a.stride == (i64)sizeof(T) && n % 16 == 0 && (std::uintptr_t)p % sizeof(T) == 0)
    return (const T*)p;
  widen(a.dtype, p, a.stride, n, buffer);
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

// Writes v * scale to n elements, at most CHUNK * 8 bytes, `stride` apart. Large outputs are streamed: they would not stay in a
// cache anyway, and an ordinary store that misses the caches reads the line first.
template <typename T> void store_to(int dtype, char* p, i64 stride, int n, const T* v, double scale, bool stream) {
  i64 size = size_of(dtype);
  const Scale<T> by(scale);
  T near = by.near, products[CHUNK * 8 / sizeof(T)];
  if (by.far) {
    for (int i = 0; i < n; i++) products[i] = v[i] * by;
    v = products;
    near = T(1);
  }
  if (!stream || stride != size) return narrow_to(dtype, v, near, n, p, stride);
  alignas(64) char line[CHUNK * 8];
  narrow_to(dtype, v, near, n, line, size);
  i64 bytes = n * size, head = (i64)(-(std::uintptr_t)p & 63);
  head = head < bytes ? head : bytes;
  std::memcpy(p, line, (size_t)head);
  i64 at = head;
  for (; at + 64 <= bytes; at += 64) stream_line(p + at, line + at);
  std::memcpy(p + at, line + at, (size_t)(bytes - at));
}

// Writes v * scale to elements [start, start+n) of a row.
template <typename T> void store(const Array& a, char* row, i64 start, int n, const T* v, double scale, bool stream) {
  store_to(a.dtype, row + start * a.stride, a.stride, n, v, scale, stream);
}

// Prefetches the memory of elements [i, i + m) at `next`.
template <typename T> KL_FN void ask_for(const char* next, int i, int m) {
  if (next)
    for (i64 at = i * (i64)sizeof(T); at < (i + m) * (i64)sizeof(T); at += 64) prefetch(next + at);
}

// Runs f(i, m) over a chunk piece by piece. Each piece prefetches as much of the memory at px and py, which arrives while the
// rest of this chunk is computed: the hardware prefetcher stops at every page.
template <typename T, class F> void pieces(const void* px, const void* py, int n, F f) {
  constexpr int STEP = 128;
  for (int i = 0; i < n; i += STEP) {
    int m = n - i < STEP ? n - i : STEP;
    ask_for<T>((const char*)px, i, m);
    ask_for<T>((const char*)py, i, m);
    f(i, m);
  }
}

// Buffers for one chunk each, in the scratch memory that kl_batch.h provides. The padding gives them different offsets within a
// page, because a load waits for an earlier store whose address agrees in the last 12 bits.
template <typename T> struct Buffers {
  static constexpr int SIZE = CHUNK + 576 / sizeof(T);
  T skip[576 / sizeof(T)], x[SIZE], y[SIZE], a[SIZE], b[SIZE], dx[SIZE], dy[SIZE];
};

// ---- terms ---------------------------------------------------------------------------------------------------------------

template <typename T> struct Terms {   // value and requested derivatives of n pairs; `low`: the low parts of numbers that are pairs
  typedef void (*Map)(const T* x, const T* y, const T* low, double parameter, int n, T* value, T* dx, T* dy);
};
template <bool PAIR, typename T> KL_FN auto number(const T* v, const T* low, i64 i) {
  if constexpr (PAIR) return Pair<T>{v[i], low[i]};
  else return v[i];
}

// A logarithm and an exponential in one loop are too long a chain for a processor to overlap iterations (see weigh_piece).
template <class F, typename T, bool ALL, bool DX, bool DY>
KL_FN void each_term(const T* __restrict x, const T* __restrict y, const T* __restrict low, double e, int n, T* __restrict value,
                     T* __restrict dx, T* __restrict dy) {
  if constexpr (F::has_gap) {
    for (int i = 0; i < n; i++) value[i] = F::template gap<ALL>(number<F::x_is_pair>(x, low, i), number<F::y_is_pair>(y, low, i));
    for (int i = 0; i < n; i++) {
      T t = value[i];
      auto a = number<F::x_is_pair>(x, low, i);
      auto b = number<F::y_is_pair>(y, low, i);
      value[i] = F::template value<ALL>(a, b, t);
      if (DX) dx[i] = F::template dx<ALL>(a, b, t);
      if (DY) dy[i] = F::template dy<ALL>(a, b, t);
    }
  } else {
    for (int i = 0; i < n; i++) {
      value[i] = value_of<F, ALL>(x[i], y[i], e);
      if (DX) dx[i] = dx_of<F, ALL>(x[i], y[i], e);
      if (DY) dy[i] = dy_of<F, ALL>(x[i], y[i], e);
    }
  }
}

// Ordinary arguments take the shorter form, which has the bits of the long one. They are checked first, because the shorter form
// turns a zero into subnormal numbers, which are slow.
template <class F, typename T, bool DX, bool DY>
void terms(const T* __restrict x, const T* __restrict y, const T* __restrict low, double e, int n, T* __restrict value,
           T* __restrict dx, T* __restrict dy) {
  if constexpr (F::has_ordinary) {
    typename Real<T>::Bits others = 0;
    for (int i = 0; i < n; i++) others |= F::ordinary(x[i], y[i]) ? 0 : 1;
    if (!others) return each_term<F, T, false, DX, DY>(x, y, low, e, n, value, dx, dy);
  }
  each_term<F, T, true, DX, DY>(x, y, low, e, n, value, dx, dy);
}

// The family (kl_family.h): first the numbers of each class, in loops that depend only on the spaces; then each output in a
// separate loop, which depends only on the operation. This keeps the number of long loops to compile small.
template <typename T> struct Seen { alignas(64) T p[PIECE], q[PIECE], d[PIECE], t[PIECE]; };
template <int SX, int SY, bool GAP, typename T> KL_APART void see(const T* __restrict x, const T* __restrict y, int m, Seen<T>& s) {
  for (int i = 0; i < m; i++) {
    Class<T> c = class_in<SX, SY, GAP>(x[i], y[i]);
    s.p[i] = c.p;
    s.q[i] = c.q;
    s.d[i] = c.d;
    s.t[i] = c.t;
  }
}
enum { MEMBER_VALUE, MEMBER_DP, MEMBER_DQ, MEMBER_DA, MEMBER_DB, MEMBER_DP_FAR, MEMBER_DQ_FAR };
template <bool TURNED, bool ABOVE, typename T> KL_APART void alpha_loop(const Seen<T>& s, int m, double k, T* __restrict v) {
  for (int i = 0; i < m; i++) v[i] = Member<ALPHA_DIV>::value_in<TURNED, ABOVE>(Class<T>{s.p[i], s.q[i], s.d[i], s.t[i]}, k);
}
template <int OP, int OUT, typename T> KL_APART void member_loop(const Seen<T>& s, int m, double k, T* __restrict v) {
  typedef Member<OP> M;
  if constexpr (OP == ALPHA_DIV && OUT == MEMBER_VALUE) {   // a vectoriser accepts no branches, not even loop-invariant ones
    if (k < 0.5) return k > 0 ? alpha_loop<true, true>(s, m, k, v) : alpha_loop<true, false>(s, m, k, v);
    return k < 1 ? alpha_loop<false, true>(s, m, k, v) : alpha_loop<false, false>(s, m, k, v);
  }
  for (int i = 0; i < m; i++) {
    Class<T> c = {s.p[i], s.q[i], s.d[i], s.t[i]};
    if constexpr (OUT == MEMBER_VALUE) v[i] = M::value(c, k);
    else if constexpr (OUT == MEMBER_DA) v[i] = M::da(c, k);
    else if constexpr (OUT == MEMBER_DB) v[i] = M::db(c, k);
    else if constexpr (OUT == MEMBER_DP_FAR && M::saturates) v[i] = M::dp_far(c, k);
    else if constexpr (OUT == MEMBER_DQ_FAR && M::saturates) v[i] = M::dq_far(c, k);
    else if constexpr (OUT == MEMBER_DP || OUT == MEMBER_DP_FAR) v[i] = M::dp(c, k);
    else v[i] = M::dq(c, k);
  }
}
template <int SX, int SY, typename T> KL_APART void spoil(const T* __restrict x, const T* __restrict y, int m, T* __restrict v) {
  for (int i = 0; i < m; i++) v[i] = unless_undefined<SX, SY>(x[i], y[i], v[i]);
}
template <int OP, int SX, int SY, typename T, bool DX, bool DY>
void member_terms(const T* x, const T* y, const T*, double k, int n, T* value, T* dx, T* dy) {
  Seen<T> s;
  for (int i = 0; i < n; i += PIECE) {
    int m = n - i < PIECE ? n - i : PIECE;
    see<SX, SY, SX == PROBS && SY == PROBS && Member<OP>::takes_gap>(x + i, y + i, m, s);
    member_loop<OP, MEMBER_VALUE>(s, m, k, value + i);
    spoil<SX, SY>(x + i, y + i, m, value + i);
    if (DX) member_loop<OP, SX == PROBS ? MEMBER_DP : MEMBER_DA>(s, m, k, dx + i), spoil<SX, SY>(x + i, y + i, m, dx + i);
    if (DY) member_loop<OP, SY == PROBS ? MEMBER_DQ : MEMBER_DB>(s, m, k, dy + i), spoil<SX, SY>(x + i, y + i, m, dy + i);
  }
}
template <int OP, int SX, int SY, typename T> typename Terms<T>::Map member_terms_for(bool dx, bool dy) {
  if (dx) return dy ? member_terms<OP, SX, SY, T, true, true> : member_terms<OP, SX, SY, T, true, false>;
  return dy ? member_terms<OP, SX, SY, T, false, true> : member_terms<OP, SX, SY, T, false, false>;
}

template <class F, typename T> typename Terms<T>::Map terms_for(bool dx, bool dy) {
  if (dx) return dy ? terms<F, T, true, true> : terms<F, T, true, false>;
  return dy ? terms<F, T, false, true> : terms<F, T, false, false>;
}

template <int SX, int SY, typename T> typename Terms<T>::Map terms_in(int operation, bool dx, bool dy) {
  switch (operation) {
#define KL_CASE(name, form, arguments) \
  case name:                           \
    if constexpr (form != BY_CLASS) return terms_for<Term<name, SX, arguments == 1 ? SX : SY>, T>(dx, dy);      \
    else if constexpr (sizeof(T) == sizeof(double) || (SX == PROBS && SY == PROBS))   /* others are wide */      \
      return member_terms_for<summed(name), SX, SY, T>(dx, dy);                                                 \
    break;
    KL_DIVERGENCES(KL_CASE)
#undef KL_CASE
  }
  return nullptr;
}

// The terms for logits that are pairs of floats
template <int SX, int SY, typename T> typename Terms<T>::Map terms_beside_logits(int operation, bool dx, bool dy) {
  switch (operation) {
#define KL_CASE(name, form, arguments) \
  case name:                           \
    if constexpr (form == BY_RATIO) return terms_for<Term<name, SX, SY>, T>(dx, dy); \
    break;
    KL_DIVERGENCES(KL_CASE)
#undef KL_CASE
  }
  return nullptr;
}

inline int term_space(int space) { return space == LOGITS ? LOG_PROBS : space == COUNTS ? PROBS : space; }

// Calls f with the Spaces of a plan, one of which is LOGITS; `alone`: there is only x.
template <int SX, int SY, bool SAME = false> struct Spaces {
  static constexpr int x = SX, y = SY;
  static constexpr bool alone = SAME;
};
template <class F> auto beside_logits(const Plan& p, F f) {
  if (p.space_x == LOGITS) return p.space_y == PROBS ? f(Spaces<LOGITS, PROBS>()) : f(Spaces<LOGITS, LOG_PROBS>());
  return p.space_x == PROBS ? f(Spaces<PROBS, LOGITS>()) : f(Spaces<LOG_PROBS, LOGITS>());
}

template <typename T> typename Terms<T>::Map terms_of(const Plan& p) {
  if constexpr (sizeof(T) == sizeof(float))   // BY_TERM is wide, and BY_COST goes through cross_chunk
    if (p.space_x == LOGITS || p.space_y == LOGITS)
      return beside_logits(p, [&](auto s) {
        return terms_beside_logits<decltype(s)::x, decltype(s)::y, T>(p.operation, p.dx.data, p.dy.data);
      });
  int sx = term_space(p.space_x), sy = term_space(p.space_y);
  bool dx = p.dx.data, dy = p.dy.data;
  switch (p.operation) {   // each with the spaces it accepts
    case PYTORCH:
      return sx == PROBS ? terms_for<Term<PYTORCH, PROBS, LOG_PROBS>, T>(dx, dy)
                         : terms_for<Term<PYTORCH, LOG_PROBS, LOG_PROBS>, T>(dx, dy);
    case KERAS: return terms_for<Term<KERAS, PROBS, PROBS>, T>(dx, dy);
    case MXNET: return terms_for<Term<MXNET, PROBS, LOG_PROBS>, T>(dx, dy);
    case PUZZLELIB:
      if constexpr (sizeof(T) == 8)   // always with logits, and so wide
        return sx == PROBS ? terms_for<Term<PUZZLELIB, PROBS, LOG_PROBS>, T>(dx, dy)
                           : terms_for<Term<PUZZLELIB, LOG_PROBS, LOG_PROBS>, T>(dx, dy);
      return nullptr;
#define KL_CASE(name, form, arguments) \
    case name: return terms_for<Term<name, LOG_PROBS, LOG_PROBS>, T>(dx, dy);
    KL_ESTIMATORS(KL_CASE)
#undef KL_CASE
  }
  if (sx == sy)
    return sx == PROBS ? terms_in<PROBS, PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, LOG_PROBS, T>(p.operation, dx, dy);
  return sx == PROBS ? terms_in<PROBS, LOG_PROBS, T>(p.operation, dx, dy) : terms_in<LOG_PROBS, PROBS, T>(p.operation, dx, dy);
}

// Multiplies terms and gradients by the factors; 0 times infinity is 0 here. `room` holds a chunk of factors.
template <typename T> void multiply(const Plan& p, const Row& row, i64 start, int n, Buffers<T>& s, T* room) {
  if (!p.factors.data) return;
  const T* f = load(p.factors, row.factors, start, n, room);
  auto times = [&](T* v) {
    for (int i = 0; i < n; i++) v[i] = f[i] == 0 ? T(0) : v[i] * f[i];
  };
  times(s.a);
  if (p.dx.data) times(s.dx);
  if (p.dy.data) times(s.dy);
}

// Probabilities and log-probabilities: one sweep does everything.
template <typename T>
void terms_chunk(const Plan& p, const Row& row, int, i64 start, int n, const double*, double* state, i64, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* x = load(p.x, row.x, start, n, s.x);
  const T* y = !has_y(p.operation) ? x : load(p.y, row.y, start, n, s.y);
  auto map = terms_of<T>(p);
  pieces<T>(x + CHUNK, y == x ? nullptr : y + CHUNK, (n + 15) & ~15,
            [&](int i, int m) { map(x + i, y + i, nullptr, p.parameter, m, s.a + i, s.dx + i, s.dy + i); });
  multiply(p, row, start, n, s, s.b);
  if (p.dx.data) store(p.dx, row.dx, start, n, s.dx, row.weight * p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, row.dy, start, n, s.dy, row.weight * p.gradient_scale, p.stream);
  if (p.output == TERMS)
    store(p.value, row.value, start, n, s.a, row.weight, p.stream);
  else
    state[0] = sum(s.a, n);
}

inline void terms_fold(const Plan&, const Row&, int, const double* from, int count, i64, double* to, i64) {
  to[0] = sum(from, count);
}

inline void terms_finish(const Plan&, const Row&, int, const double* state, double* stats) { stats[0] = state ? state[0] : 0.0; }

// ---- the divergence of two rows of logits ----------------------------------------------------------------------------------

static_assert(LOGITS_STATES <= MAX_STATES);
inline void put(double* state, i64 pitch, const Spread& s) {
  for (int k = 0; k < LOGITS_STATES; k++) state[k * pitch] = ((const double*)&s)[k];
}
inline Spread spread_at(const double* state, i64 pitch) {
  return {state[0], state[pitch], state[2 * pitch], state[3 * pitch], state[4 * pitch], state[5 * pitch],
          state[6 * pitch], state[7 * pitch], state[8 * pitch]};
}

// What the reading sweep leaves of a chunk for the writing sweep: the anchor, and the numbers that cost most to compute. If there
// is no memory for them, the writing sweep computes them again, by the same steps.
template <typename T> struct alignas(64) Kept {
  Anchor<T> at;
  bool far;
  alignas(64) T weight[CHUNK + 192 / sizeof(T)];   // offsets within a page as in Buffers
  T growth[CHUNK + 192 / sizeof(T)];               // e^z - 1, if dy is wanted
};

// If each element takes a long chain of instructions, few of those in the processor's window are independent of each other. So
// the functions below process a piece of a chunk in several short loops, which pass their results on through memory.

// The weights of n elements, zeros from there to m, the next multiple of 16, and what they add to the columns of the mean
template <typename T, bool TEMPERED>
KL_APART void weigh_piece(const T* __restrict a, const T* __restrict b, int n, int m, T max_a, T max_b, Inverse<T> it, T* __restrict w,
                 T* __restrict s, T* __restrict c) {
  for (int i = 0; i < m; i++) w[i] = weight<TEMPERED>(a[i], max_a, it);
  for (int i = n; i < m; i++) w[i] = T(0);
  down(m, [=](int j, int i) KL_LAMBDA {
    s[j] += w[i];
    c[j] = fma(w[i], below_tops(a[i], b[i], max_a, max_b), c[j]);
  });
}

// The chunk's anchor, its weights and their sum. `next`: memory that will be needed soon, prefetched on the way.
template <typename T, bool TEMPERED>
double weigh(const T* a, const T* b, int n, const Inverse<T>& it, const char* next, Kept<T>& k) {
  int n16 = (n + 15) & ~15;
  T max_a = maximum(a, n16), max_b = maximum(b, n16);
  Columns<T> s, c;
  for (int i = 0; i < n; i += PIECE) {
    int m = n16 - i < PIECE ? n16 - i : PIECE;
    ask_for<T>(next, i, m);
    weigh_piece<T, TEMPERED>(a + i, b + i, n - i, m, max_a, max_b, it, k.weight + i, s.at, c.at);
  }
  double weights = s.total(), mean = c.total() / weights;
  k.at = anchor(max_a, max_b, mean);
  k.far = !usable((double)k.at.mean);
  return weights;
}

template <typename T, bool TEMPERED, bool KEEP>
KL_APART bool spread_piece(const T* __restrict a, const T* __restrict b, const T* __restrict w, int m, Anchor<T> at, Inverse<T> it,
                  T* __restrict growth, T* __restrict sx, T* __restrict sg) {
  alignas(64) T e[PIECE], low[TEMPERED ? PIECE : 1];
  T* z = growth;   // until it is overwritten by e^z - 1
  typename Real<T>::Bits others = 0;
  for (int i = 0; i < m; i++) {
    Pair<T> any = centred<TEMPERED>(a[i], b[i], at, it), mine = counted(any, w[i]);
    others |= above_range(any.value) ? 1 : 0;
    z[i] = mine.value;
    if constexpr (TEMPERED) low[i] = mine.low;
  }
  for (int i = 0; i < m; i++) {
    others |= below_range(z[i]) ? 1 : 0;
    e[i] = spread_of<TEMPERED>(Pair<T>{z[i], TEMPERED ? low[i] : T(0)});
  }
  const T* __restrict excess = e;
  down(m, [=](int j, int i) KL_LAMBDA {
    sx[j] = fma(w[i], z[i], sx[j]);
    sg[j] = fma(w[i], excess[i], sg[j]);
    if (KEEP) growth[i] = excess[i] + z[i];
  });
  return others;
}

// The sums of w z and w (e^z - 1 - z)
template <typename T, bool TEMPERED, bool KEEP>
void spread(const T* a, const T* b, int n, const Inverse<T>& it, const char* next, Kept<T>& k, double& x, double& g) {
  int n16 = (n + 15) & ~15;
  Columns<T> sx, sg;
  bool far = false;
  for (int i = 0; i < n; i += PIECE) {
    int m = n16 - i < PIECE ? n16 - i : PIECE;
    ask_for<T>(next, i, m);
    far |= spread_piece<T, TEMPERED, KEEP>(a + i, b + i, k.weight + i, m, k.at, it, k.growth + i, sx.at, sg.at);
  }
  k.far = far;
  x = sx.total();
  g = sg.total();
}

// A chunk with classes excluded or far apart, in double
template <typename T> Spread far_chunk(const T* a, const T* b, int n, double it) {
  double max_a = -infinity<double>(), max_b = max_a;
  bool impossible = false;
  for (int i = 0; i < n; i++) {
    max_a = a[i] > max_a ? a[i] : max_a;
    max_b = b[i] > max_b ? b[i] : max_b;
  }
  double top_a = top_of(max_a), top_b = top_of(max_b);
  alignas(64) double e[CHUNK], u[CHUNK], v[CHUNK], near[CHUNK], near_x[CHUNK];
  for (int i = 0; i < n; i++) {
    Shared k = shared(a[i], b[i], top_a, top_b, it);
    e[i] = k.e;
    u[i] = k.weight;
    v[i] = k.c;
    impossible |= k.impossible;
  }
  double s = sum(e, n), shared_weights = sum(u, n);
  Anchor<double> at = far_anchor(top_a, top_b, shared_weights, sum(v, n));
  for (int i = 0; i < n; i++) u[i] = softmax_weight((b[i] - top_b) * it);
  double q = sum(u, n);
  for (int i = 0; i < n; i++) {
    Apart k = apart(a[i], b[i], e[i], u[i], at, it);
    near[i] = k.near;
    near_x[i] = k.near_x;
    u[i] = k.mass;
    e[i] = k.weight;
    v[i] = k.x;
  }
  return far_state(max_a, max_b, at, it, s, q, sum(near, n), sum(near_x, n), sum(u, n), sum(e, n), sum(v, n), impossible);
}

template <typename T>
void write_dy(const T* __restrict w, const T* __restrict growth, int n, const Slopes<T>& s, T* __restrict dy) {
  for (int i = 0; i < n; i++) dy[i] = w[i] * fma(growth[i], s.a, s.b);
}
template <typename T, bool TEMPERED>
void write_dx(const T* __restrict a, const T* __restrict b, const T* __restrict w, int n, const Inverse<T>& it,
              const Anchor<T>& at, const Slopes<T>& s, T* __restrict dx) {
  for (int i = 0; i < n; i++) dx[i] = w[i] * fma(counted(centred<TEMPERED>(a[i], b[i], at, it), w[i]).value, s.c, s.d);
}
template <typename T> void write_far(const T* a, const T* b, int n, const FarRow& row, T* dx, T* dy) {
  for (int i = 0; i < n; i++) {
    Outputs r = far_class<DEVIANCE>(a[i], b[i], row);
    if (dx) dx[i] = (T)r.dx;
    if (dy) dy[i] = (T)r.dy;
  }
}
template <typename T, int TERM, bool TEMPERED>
void write_terms(const T* __restrict a, const T* __restrict b, const T* __restrict w, int n, const Inverse<T>& it,
                   const Anchor<T>& at, const Slopes<T>& s, const FarRow& row, T* __restrict term) {
  typename Real<T>::Bits others = 0;
  for (int i = 0; i < n; i++) {
    bool good;
    term[i] = near_term<TERM, TEMPERED>(a[i], b[i], w[i], at, s, it, good);
    others |= good ? 0 : 1;
  }
  for (int i = 0; others && i < n; i++) {
    bool good;
    near_term<TERM, TEMPERED>(a[i], b[i], w[i], at, s, it, good);
    if (!good) term[i] = (T)far_class<TERM>(a[i], b[i], row).term;
  }
}

template <typename T, bool TEMPERED>
void logits_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state,
                  i64 pitch, void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* a = load(p.x, row.x, start, n, s.x);
  const T* b = load(p.y, row.y, start, n, s.y);
  double temperature = row.inverse_temperature;
  Inverse<T> it = inverse<T>(temperature);
  bool dx = p.dx.data, dy = p.dy.data, kept = row.kept;
  static_assert(sizeof(Kept<T>) <= sizeof s.a + sizeof s.b);
  Kept<T>& k = kept ? ((Kept<T>*)row.kept)[start / CHUNK] : *(Kept<T>*)s.a;
  double x = 0, g = 0;
  if (sweep == 0) {
    double weights = weigh<T, TEMPERED>(a, b, n, it, (const char*)(a + CHUNK), k);
    if (!k.far)
      (kept && dy ? spread<T, TEMPERED, true> : spread<T, TEMPERED, false>)(a, b, n, it, (const char*)(b + CHUNK), k, x, g);
    put(state, pitch, k.far ? far_chunk(a, b, n, temperature) : near_state(k.at, weights, x, g));
    return;
  }
  i64 at = start * (i64)sizeof(T);   // this sweep reads from the caches, so memory is free to bring the next row
  if (row.next_x) ask_for<T>(row.next_x + at, 0, n);
  if (row.next_y) ask_for<T>(row.next_y + at, 0, n);
  bool literal = p.operation == REL_ENTR;
  if (!kept) {
    weigh<T, TEMPERED>(a, b, n, it, nullptr, k);
    if (!k.far) spread<T, TEMPERED, true>(a, b, n, it, nullptr, k, x, g);
  }
  Slopes<T> along = slopes<T>((double)k.at.max_a, (double)k.at.max_b, mean_of(k.at), stats, temperature);
  FarRow far = k.far || p.output == TERMS ? far_row(stats, temperature) : FarRow{};
  if (p.output == TERMS) {   // before the gradients, one of which may overwrite b
    T* term = s.dx;
    if (k.far)
      for (int i = 0; i < n; i++) term[i] = (T)(literal ? far_class<LITERAL> : far_class<DEVIANCE>)(a[i], b[i], far).term;
    else
      (literal ? write_terms<T, LITERAL, TEMPERED> : write_terms<T, DEVIANCE, TEMPERED>)(a, b, k.weight, n, it, k.at, along,
                                                                                        far, term);
    store(p.value, row.value, start, n, term, row.weight, p.stream);
  }
  if (k.far && (dx || dy)) {
    write_far(a, b, n, far, dx ? s.dx : nullptr, dy ? s.dy : nullptr);
  } else {
    if (dx) write_dx<T, TEMPERED>(a, b, k.weight, n, it, k.at, along, s.dx);
    if (dy) write_dy(k.weight, k.growth, n, along, s.dy);
  }
  if (dx) store(p.dx, row.dx, start, n, s.dx, row.weight * p.gradient_scale, p.stream);
  if (dy) store(p.dy, row.dy, start, n, s.dy, row.weight * p.gradient_scale, p.stream);
}

inline void logits_fold(const Plan&, const Row& row, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep > 0) return;
  if (count == 1) {
    put(to, to_pitch, spread_at(from, pitch));
    return;
  }
  double it = row.inverse_temperature;
  alignas(64) double u[CHUNK], v[CHUNK], mass[CHUNK];
  double max_a = -infinity<double>(), max_b = max_a;
  bool far = false, impossible = false;
  for (int k = 0; k < count; k++) {
    Spread s = spread_at(from + k, pitch);
    max_a = s.max_a > max_a ? s.max_a : max_a;
    max_b = s.max_b > max_b ? s.max_b : max_b;
    far |= is_far(s.kind);
    impossible |= is_impossible(s.kind);
  }
  Tops top = tops(max_a, max_b);
  for (int k = 0; k < count; k++) {
    Spread s = spread_at(from + k, pitch);
    u[k] = merge_weight(s.max_a, top.a, it) * s.s;
    v[k] = u[k] * merge_mean(s, top);
    mass[k] = merge_mass(s, top, it);
  }
  double weights = sum(u, count);
  Pair<double> m = merge_anchor(sum(v, count), weights);
  for (int k = 0; k < count; k++) {
    Moved to_anchor = moved(spread_at(from + k, pitch), top, m, it);
    u[k] = to_anchor.x;
    v[k] = to_anchor.g;
    far |= to_anchor.far;
  }
  put(to, to_pitch, merged(max_a, max_b, weights, m, sum(u, count), sum(v, count), sum(mass, count), far, impossible));
}

inline void logits_done(const Plan&, const Row& row, int sweep, const double* s, double* stats) {
  if (sweep > 0) return;
  if (s) logits_finish(spread_at(s, 1), row.inverse_temperature, stats);
  else std::fill(stats, stats + MAX_STATS, 0.0);
}

// ---- cross-entropy and entropy with logits -------------------------------------------------------------------------------------

// The weights of n elements, zeros from there to m, the next multiple of 16; their costs; and, if y holds logits, the rest of S.
// Returns whether some cost is so large that it needs a closer look. ALONE: y is x.
template <typename T, int SX, int SY, bool ALONE, bool TEMPERED>
KL_APART bool pay_piece(const T* __restrict x, const T* __restrict y, int n, int m, T zero_a, T max_b, T zero_b, Inverse<T> it,
                        T* __restrict s, T* __restrict cost, T* __restrict rest) {
  alignas(64) T w[PIECE], c[PIECE], e[PIECE];
  typename Real<T>::Bits large = 0;
  for (int i = 0; i < m; i++) w[i] = cross_weight<SX, TEMPERED>(x[i], zero_a, it);
  for (int i = n; i < m; i++) w[i] = T(0);
  for (int i = 0; i < m; i++) {
    T any = cost_of<SY>(y[i], zero_b, it.value);
    large |= wants_look<SX>(x[i], any) ? 1 : 0;
    c[i] = counted_cost(w[i], any);
  }
  if constexpr (SY == LOGITS) {
    for (int i = 0; i < m; i++) {
      T v = ALONE ? w[i] : cross_weight<SY, TEMPERED>(y[i], zero_b, it);
      e[i] = y[i] == max_b ? T(0) : v;
    }
    for (int i = n; i < m; i++) e[i] = T(0);
  }
  down(m, [=, &w, &c, &e](int j, int i) KL_LAMBDA {
    s[j] += w[i];
    cost[j] = fma(w[i], c[i], cost[j]);
    if constexpr (SY == LOGITS) rest[j] += e[i];
  });
  return large;
}

// The state of a chunk, and whether it has to be computed in double. `next_x`, `next_y`: memory that will be needed soon.
template <typename T, int SX, int SY, bool ALONE, bool TEMPERED>
Cross pay(const T* x, const T* y, int n, double temperature, const char* next_x, const char* next_y, bool& in_double) {
  Inverse<T> it = inverse<T>(temperature);
  int n16 = (n + 15) & ~15;
  T max_a = SX == LOGITS ? maximum(x, n16) : T(0), max_b = ALONE ? max_a : SY == LOGITS ? maximum(y, n16) : T(0);
  T zero_a = (T)top_of(max_a), zero_b = (T)top_of(max_b);
  Columns<T> s, cost, rest;
  bool large = false, impossible = false;
  for (int i = 0; i < n; i += PIECE) {
    int m = n16 - i < PIECE ? n16 - i : PIECE;
    ask_for<T>(next_x, i, m);
    if (!ALONE) ask_for<T>(next_y, i, m);
    large |= pay_piece<T, SX, SY, ALONE, TEMPERED>(x + i, y + i, n - i, m, zero_a, max_b, zero_b, it, s.at, cost.at, rest.at);
  }
  for (int i = 0; large && i < n; i++) {
    impossible |= cannot_be<SX, SY>(x[i], y[i]);
    in_double |= costs_double<SX, SY>(x[i], y[i], zero_a, zero_b, it.value, false);
  }
  int count = 0;
  if (SY == LOGITS && !excluded(max_b))
    for (int i = 0; i < n; i++) count += y[i] == max_b ? 1 : 0;
  return {(double)max_a, s.total(), (double)max_b, (double)count, rest.total(), cost.total(), kind_of(false, impossible)};
}

template <typename T, int SX, int SY, bool TEMPERED>
KL_APART bool cross_outputs(const T* __restrict x, const T* __restrict y, int n, CrossRow<T> k, T* __restrict term, T* __restrict dx,
                            T* __restrict dy) {
  typename Real<T>::Bits large = 0;
  for (int i = 0; i < n; i++) large |= wants_look<SX>(x[i], cost_of<SY>(y[i], k.zero_b, k.it.value)) ? 1 : 0;
  if (term)
    for (int i = 0; i < n; i++) term[i] = cross_class<SX, SY, TEMPERED>(x[i], y[i], k).term;
  if (dx)
    for (int i = 0; i < n; i++) dx[i] = cross_class<SX, SY, TEMPERED>(x[i], y[i], k).dx;
  if (dy)
    for (int i = 0; i < n; i++) dy[i] = cross_class<SX, SY, TEMPERED>(x[i], y[i], k).dy;
  return large;
}

template <typename T, int SX, int SY, bool ALONE, bool TEMPERED>
void cross_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                 void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  const T* x = load(p.x, row.x, start, n, s.x);
  const T* y = ALONE ? x : load(p.y, row.y, start, n, s.y);
  double it = row.inverse_temperature;
  if (sweep == 0) {
    bool in_double = false;
    Cross k = pay<T, SX, SY, ALONE, TEMPERED>(x, y, n, it, (const char*)(x + CHUNK), (const char*)(y + CHUNK), in_double);
    if (in_double) {
      alignas(64) double a[CHUNK], b[CHUNK];
      for (int i = 0; i < ((n + 15) & ~15); i++) a[i] = x[i], b[i] = y[i];
      k = pay<double, SX, SY, ALONE, TEMPERED>(a, b, n, it, nullptr, nullptr, in_double);
    }
    for (int i = 0; i < CROSS_STATES; i++) state[i * pitch] = ((const double*)&k)[i];
    return;
  }
  T *term = p.output == TERMS ? s.a : nullptr, *dx = p.dx.data ? s.dx : nullptr, *dy = p.dy.data ? s.dy : nullptr;
  CrossRow<T> k = cross_row<T>(stats, it);
  bool all = costs_double(k), large = cross_outputs<T, SX, SY, TEMPERED>(x, y, n, k, term, dx, dy);
  for (int i = 0; (all || large) && i < n; i++) {
    if (!all && !costs_double<SX, SY>(x[i], y[i], k.zero_a, k.zero_b, k.it.value, dx)) continue;
    CrossOutputs<double> r = cross_class<SX, SY, TEMPERED>((double)x[i], (double)y[i], cross_row<double>(stats, it));
    if (term) term[i] = (T)r.term;
    if (dx) dx[i] = (T)r.dx;
    if (dy) dy[i] = (T)r.dy;
  }
  if (dx) store(p.dx, row.dx, start, n, dx, row.weight * p.gradient_scale, p.stream);
  if (dy) store(p.dy, row.dy, start, n, dy, row.weight * p.gradient_scale, p.stream);
  if (term) store(p.value, row.value, start, n, term, row.weight, p.stream);
}

inline void cross_fold(const Plan&, const Row& row, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep > 0) return;
  alignas(64) double s[CHUNK], cost[CHUNK], ties[CHUNK], rest[CHUNK];
  double max_a = -infinity<double>(), max_b = max_a;
  bool impossible = false;
  for (int k = 0; k < count; k++) {
    Cross c = cross_at(from + k, pitch);
    max_a = c.max_a > max_a ? c.max_a : max_a;
    max_b = c.max_b > max_b ? c.max_b : max_b;
    impossible |= is_impossible(c.kind);
  }
  for (int k = 0; k < count; k++) {
    Paid c = paid(cross_at(from + k, pitch), max_a, max_b, row.inverse_temperature);
    s[k] = c.s;
    cost[k] = c.cost;
    ties[k] = c.count;
    rest[k] = c.rest;
  }
  Cross all = {max_a, sum(s, count), max_b, sum(ties, count), sum(rest, count), sum(cost, count), kind_of(false, impossible)};
  for (int i = 0; i < CROSS_STATES; i++) to[i * to_pitch] = ((const double*)&all)[i];
}

template <int SX, int SY> void cross_done(const Plan&, const Row&, int sweep, const double* s, double* stats) {
  if (sweep > 0) return;
  if (!s) return (void)std::fill(stats, stats + MAX_STATS, 0.0);
  Cross k = cross_at(s, 1);
  cross_finish<SX, SY>(k, SY == LOGITS ? log_norm({k.max_b, k.count, k.rest}) : 0.0, stats);
}

template <typename T, int SX, int SY, bool ALONE> Kernel cross_kernel(const Plan& p) {
  bool outputs = p.dx.data || p.dy.data || p.output == TERMS, tempered = sizeof(T) == sizeof(double) || is_tempered(p);
  return {outputs ? 2 : 1, {CROSS_STATES, 0, 0},
          tempered ? cross_chunk<T, SX, SY, ALONE, true> : cross_chunk<T, SX, SY, ALONE, sizeof(T) == sizeof(double)>,
          cross_fold, cross_done<SX, SY>, 0};
}
// Calls f with the Spaces of a plan and its operation; also used by kl_few.h.
template <class F> auto cross_pair(const Plan& p, F f) {
  if (!has_y(p.operation)) return f(Spaces<LOGITS, LOGITS, true>());
  return p.space_x == LOGITS && p.space_y == LOGITS ? f(Spaces<LOGITS, LOGITS>()) : beside_logits(p, f);
}
template <typename T> Kernel cross_kernel_of(const Plan& p) {
  return cross_pair(p, [&](auto s) { return cross_kernel<T, decltype(s)::x, decltype(s)::y, decltype(s)::alone>(p); });
}

// ---- everything else with logits, and counts: normalised, then treated as log-probabilities and probabilities -----------------
//
// A row's normaliser is always computed in double. float32 logits beside another space go on in float, as log-probabilities in
// pairs; everything else is wide.

enum { SUM_VALUE, SUM_DX, SUM_DY, SUM_STATES };

template <typename T>
KL_APART void norm_piece(const T* __restrict x, int n, int m, double max, double zero, double it, double* __restrict rest) {
  alignas(64) double e[PIECE];
  for (int i = 0; i < m; i++) e[i] = norm_rest((double)x[i], max, zero, it);
  for (int i = n; i < m; i++) e[i] = 0.0;
  down(m, [=, &e](int j, int i) KL_LAMBDA { rest[j] += e[i]; });
}
// `ahead`: what will be read next, prefetched meanwhile
template <typename T> void norm_of(const T* x, int n, double it, double* state, i64 pitch, const T* ahead) {
  int n16 = (n + 15) & ~15, count = 0, undefined = 0;
  T m = maximum(x, n16);
  Columns<double> rest;
  for (int i = 0; i < n; i += PIECE) {
    ask_for<T>((const char*)ahead, i, PIECE);
    norm_piece(x + i, n - i, n16 - i < PIECE ? n16 - i : PIECE, (double)m, top_of((double)m), it, rest.at);
  }
  for (int i = 0; i < n; i++) {
    count += x[i] == m ? 1 : 0;
    undefined |= x[i] == x[i] ? 0 : 1;
  }
  state[0] = m;
  state[pitch] = excluded(m) ? 0.0 : count;
  state[2 * pitch] = undefined ? nan<double>() : rest.total();
}

template <typename T> void norm_of(const T* x, int n, double it, double* state, i64 pitch) {
  norm_of(x, n, it, state, pitch, x + CHUNK);
}

inline void tally_of(const double* x, int n, bool whole, double* state, i64 pitch) {   // `whole`: counts may be of any size
  alignas(64) double c[CHUNK];
  for (int i = 0; i < n; i++) c[i] = count_of(x[i]);
  state[0] = sum(c, n);
  state[pitch] = state[2 * pitch] = state[0];
  if (!whole) return;
  for (int i = 0; i < n; i++) c[i] *= FEWER;
  state[pitch] = sum(c, n);
  for (int i = 0; i < n; i++) c[i] = count_of(x[i]) * MORE;
  state[2 * pitch] = sum(c, n);
}

inline void norm_fold(double it, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  alignas(64) double ties[CHUNK], rest[CHUNK];
  double top = -infinity<double>();
  for (int k = 0; k < count; k++) top = from[k] > top ? from[k] : top;
  double zero = top_of(top);
  for (int k = 0; k < count; k++) {
    Norm s = {from[k], from[k + pitch], from[k + 2 * pitch]};
    rest[k] = merge_rest(s, top, zero, it);
    ties[k] = s.max == top ? s.count : 0.0;
  }
  to[0] = top;
  to[to_pitch] = sum(ties, count);
  to[2 * to_pitch] = sum(rest, count);
}

template <typename T>   // the normaliser of a side, if its space needs one
void side_chunk(int space, const Array& a, const char* row, i64 start, int n, double it, double* state, i64 pitch, Buffers<T>& s) {
  if (space == LOGITS) norm_of(load(a, row, start, n, s.x), n, it, state, pitch);
  if constexpr (sizeof(T) == sizeof(double))
    if (space == COUNTS) tally_of(load(a, row, start, n, s.x), n, a.dtype == FLOAT64, state, pitch);
}
inline void side_fold(int space, double it, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (space == LOGITS) norm_fold(it, from, count, pitch, to, to_pitch);
  for (int k = 0; space == COUNTS && k < NORM_STATES; k++) to[k * to_pitch] = sum(from + k * pitch, count);
}

inline void norm_finish(const double* state, double* max_and_log) {
  max_and_log[0] = state[0];
  max_and_log[1] = log_norm({state[0], state[1], state[2]});
}
inline void side_finish(int space, const double* state, double* norm) {
  if (space == LOGITS) norm_finish(state, norm);
  if (space == COUNTS) tally_finish(*(const Tally*)state, norm);
}

// What the second sweep leaves of a chunk for the third: derivatives that still have to go through the softmax
template <typename T> struct alignas(64) MixedKept {
  T dx[CHUNK + 192 / sizeof(T)], dy[CHUNK + 192 / sizeof(T)];
};

// The chunk's numbers, normalised into `buffer`, float logits also into `low`. `overflowed` is set if some overflowed.
template <typename T>
const T* normalised(const Array& a, const char* row, int space, i64 start, int n, double it, const double* norm, T* buffer,
                    T* low, bool& overflowed) {
  const T* x = load(a, row, start, n, buffer);
  if (!is_unnormalised(space)) return x;
  int n16 = (n + 15) & ~15;
  if constexpr (sizeof(T) == sizeof(double)) {
    double m = norm[0], l = norm[1];
    for (int i = 0; space == COUNTS && i < n16; i++) buffer[i] = share_of(x[i], norm);
    if (space == COUNTS) return buffer;
    for (int i = 0; i < n16; i++) buffer[i] = log_prob_of(x[i], m, l, it);
  } else {
    LogNorm<T> k = log_norm_of<T>(norm, it);
    typename Real<T>::Bits others = 0;
    for (int i = 0; i < n16; i++) {
      Pair<T> l = log_prob_of(x[i], k);
      others |= overflows(l) ? 1 : 0;
      buffer[i] = l.value;
      low[i] = l.low;
    }
    overflowed |= others;
  }
  return buffer;
}

// from a derivative with respect to normalised logits to the derivative with respect to the logits
template <typename T> KL_APART void write_through_softmax(const T* d, const T* l, const T* low, int n, Softmax<T> k, T* out) {
  for (int i = 0; i < n; i++) out[i] = through_softmax(d[i], number<PAIRED<T>>(l, low, i), k);
}

inline void write_through_share(const double* d, int n, double mean, const double* norm, double* out) {
  for (int i = 0; i < n; i++) out[i] = through_share(d[i], mean, norm);
}
// the mean of derivatives with respect to probabilities
inline double mean_of_shares(const double* p, const double* d, int n) {
  alignas(64) double v[CHUNK];
  for (int i = 0; i < n; i++) v[i] = share_times(p[i], d[i]);
  return sum(v, n);
}

template <typename T>
void mixed_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                 void* scratch) {
  Buffers<T>& s = *(Buffers<T>*)scratch;
  double it = row.inverse_temperature;
  bool both = has_y(p.operation), overflowed = false;
  bool of_x = p.dx.data && is_unnormalised(p.space_x);
  bool of_y = p.dy.data && is_unnormalised(p.space_y) && !is_final(p.operation);
  if (sweep == 0) {
    side_chunk(p.space_x, p.x, row.x, start, n, it, state, pitch, s);
    if (both) side_chunk(p.space_y, p.y, row.y, start, n, it, state + NORM_STATES * pitch, pitch, s);
    return;
  }
  const T* x = normalised(p.x, row.x, p.space_x, start, n, it, stats + NORM_X, s.x, s.b, overflowed);
  const T* y = both ? normalised(p.y, row.y, p.space_y, start, n, it, stats + NORM_Y, s.y, s.b, overflowed) : x;
  int n16 = (n + 15) & ~15;
  MixedKept<T>* kept = row.kept ? (MixedKept<T>*)row.kept + start / CHUNK : nullptr;
  T *dx = s.dx, *dy = s.dy;
  if (kept && sweep == 2) {
    dx = kept->dx;
    dy = kept->dy;
  } else {
    auto map = terms_of<T>(p);
    for (int i = 0; i < n16; i += COLUMNS)
      map(x + i, y + i, s.b + i, p.parameter, n16 - i < COLUMNS ? n16 - i : COLUMNS, s.a + i, s.dx + i, s.dy + i);
    if (overflowed && p.space_y == LOGITS) {
      T logits[CHUNK];
      widen(p.y.dtype, row.y + start * p.y.stride, p.y.stride, n, logits);
      LogNorm<T> k = log_norm_of<T>(stats + NORM_Y, it);
      for (int i = 0; i < n; i++) s.a[i] *= stretch(logits[i], k);
      for (int i = 0; p.dx.data && i < n; i++) s.dx[i] *= stretch(logits[i], k);
    }
    multiply(p, row, start, n, s, s.b);   // with factors it is wide, and `low` is not used
  }
  if (sweep == 1) {
    if (p.output == TERMS) store(p.value, row.value, start, n, s.a, row.weight, p.stream);
    state[SUM_VALUE * pitch] = sum(s.a, n);
    state[SUM_DX * pitch] = p.dx.data ? sum(s.dx, n) : 0.0;
    state[SUM_DY * pitch] = p.dy.data ? sum(s.dy, n) : 0.0;
    if constexpr (sizeof(T) == sizeof(double)) {
      if (of_x && p.space_x == COUNTS) state[SUM_DX * pitch] = mean_of_shares(x, s.dx, n);
      if (of_y && p.space_y == COUNTS) state[SUM_DY * pitch] = mean_of_shares(y, s.dy, n);
    }
    if (kept && p.dx.data) std::copy(dx, dx + n16, kept->dx);
    if (kept && p.dy.data) std::copy(dy, dy + n16, kept->dy);
    return;
  }
  double scale = row.weight * p.gradient_scale;
  auto through = [&](int space, const T* d, const T* l, int of, int norm, T* out) {
    if (space == LOGITS) write_through_softmax(d, l, s.b, n16, softmax_of_sum<T>(stats[of], it), out);
    if constexpr (sizeof(T) == sizeof(double))
      if (space == COUNTS) write_through_share(d, n16, stats[of], stats + norm, out);
  };
  if (of_x) through(p.space_x, dx, x, SUM_DX, NORM_X, s.dx);
  if (of_y) through(p.space_y, dy, y, SUM_DY, NORM_Y, s.dy);
  if (p.dx.data) store(p.dx, row.dx, start, n, of_x ? s.dx : dx, scale, p.stream);
  if (p.dy.data) store(p.dy, row.dy, start, n, of_y ? s.dy : dy, scale, p.stream);
}

inline void mixed_fold(const Plan& p, const Row& row, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep == 0) {
    double it = row.inverse_temperature;
    side_fold(p.space_x, it, from, count, pitch, to, to_pitch);
    if (has_y(p.operation))
      side_fold(p.space_y, it, from + NORM_STATES * pitch, count, pitch, to + NORM_STATES * to_pitch, to_pitch);
  } else if (sweep == 1) {
    for (int k = 0; k < SUM_STATES; k++) to[k * to_pitch] = sum(from + k * pitch, count);
  }
}

inline void mixed_finish(const Plan& p, const Row&, int sweep, const double* state, double* stats) {
  if (!state) {
    for (int k = 0; k < MAX_STATS; k++) stats[k] = 0;
  } else if (sweep == 0) {
    side_finish(p.space_x, state, stats + NORM_X);
    if (has_y(p.operation)) side_finish(p.space_y, state + NORM_STATES, stats + NORM_Y);
  } else if (sweep == 1) {
    for (int k = 0; k < SUM_STATES; k++) stats[k] = state[k];
  }
}

// ---- the family, for two rows of logits (kl_family.h) -------------------------------------------------------------------------
//
// The first sweep is that of kl_div; the second finds the value, the terms and what the gradients need; the third writes the
// gradients. A float32 chunk whose classes are all near is computed in float, everything else in double.

KL_APART inline void see_logits(const double* __restrict a, const double* __restrict b, int m, MemberRow row, Seen<double>& s) {
  for (int i = 0; i < m; i++) {
    Class<double> c = class_of(a[i], b[i], row);
    s.p[i] = c.p;
    s.q[i] = c.q;
    s.d[i] = c.d;
    s.t[i] = c.t;
  }
}
// The classes of a piece of a near chunk, in float. Returns whether all are near.
struct Near { alignas(64) float q[PIECE], d[PIECE], t[PIECE]; };
template <bool TEMPERED>
KL_APART bool see_near(const float* __restrict a, const float* __restrict b, int m, NearRow<float> row, Near& s) {
  Real<float>::Bits others = 0;
  for (int i = 0; i < m; i++) {
    s.t[i] = near_gap<TEMPERED>(a[i], b[i], row);
    others |= is_near(s.t[i], row) ? 0 : 1;
  }
  if (others) return false;
  for (int i = 0; i < m; i++) {
    Ordinary<float> c = near_class(s.t[i]);
    s.q[i] = c.q;
    s.d[i] = c.d;
  }
  return true;
}
KL_FN Ordinary<float> class_at(const Near& s, int i) { return {{1.f, s.q[i], s.d[i], s.t[i]}}; }
template <bool TURNED, bool ABOVE> KL_APART void near_alpha(const Near& s, int m, double k, float* __restrict v) {
  for (int i = 0; i < m; i++) v[i] = Member<ALPHA_DIV>::value_in<TURNED, ABOVE>(class_at(s, i), k);
}
// Terms and the requested scores in one loop, because they share much of the work
template <int OP, bool DX, bool DY>
KL_APART void near_loop(const Near& s, int m, double k, float* __restrict v, float* __restrict dx, float* __restrict dy) {
  typedef Member<OP> M;
  if constexpr (OP == ALPHA_DIV) {   // as member_loop
    if (k < 0.5) k > 0 ? near_alpha<true, true>(s, m, k, v) : near_alpha<true, false>(s, m, k, v);
    else k < 1 ? near_alpha<false, true>(s, m, k, v) : near_alpha<false, false>(s, m, k, v);
  }
  for (int i = 0; i < m; i++) {
    Ordinary<float> c = class_at(s, i);
    if constexpr (OP != ALPHA_DIV) v[i] = M::value(c, k);
    if constexpr (DX) dx[i] = M::dp(c, k);
    if constexpr (DY) dy[i] = M::dq(c, k);
  }
}

typedef void (*MemberLoop)(const Seen<double>&, int m, double parameter, double* v);
typedef void (*NearLoop)(const Near&, int m, double parameter, float* v, float* dx, float* dy);
struct SideLoops { MemberLoop score[2], by_log; double limit; };   // score[far]
struct MemberLoops { MemberLoop terms; SideLoops x, y; NearLoop near[2][2]; double apart; };   // near[dx][dy]
template <int OP> MemberLoops member_loops(double k) {
  typedef Member<OP> M;
  SideLoops x = {{member_loop<OP, MEMBER_DP>, member_loop<OP, MEMBER_DP>}, member_loop<OP, MEMBER_DA>, 0};
  SideLoops y = {{member_loop<OP, MEMBER_DQ>, member_loop<OP, MEMBER_DQ>}, member_loop<OP, MEMBER_DB>, 0};
  if constexpr (M::saturates) {
    x.score[1] = member_loop<OP, MEMBER_DP_FAR>, x.limit = M::p_limit(k);
    y.score[1] = member_loop<OP, MEMBER_DQ_FAR>, y.limit = M::q_limit(k);
  }
  return {member_loop<OP, MEMBER_VALUE>, x, y,
          {{near_loop<OP, false, false>, near_loop<OP, false, true>}, {near_loop<OP, true, false>, near_loop<OP, true, true>}},
          APART<OP>};
}
inline MemberLoops member_loops(const Plan& p) {
  switch (p.operation) {
#define KL_CASE(name, form, arguments) \
  case name: return member_loops<summed(name)>(p.parameter);
    KL_FAMILY(KL_CASE)
#undef KL_CASE
  }
  return {};
}
KL_APART inline bool any_vast(const double* __restrict s, int m) {
  Real<double>::Bits found = 0;
  for (int i = 0; i < m; i++) found |= is_vast(s[i]) ? 1 : 0;
  return found;
}
// p (score - centre), written to v, which holds p times the score where some scores are vast
KL_APART inline void centre_scores(const double* __restrict p, const double* __restrict s, int m, double centre,
                                   double* __restrict v) {
  for (int i = 0; i < m; i++) v[i] = centred_score(p[i], s[i], v[i], centre);
}

inline int likeliest(const double* t, int n) {   // the first of the largest; 0 if all are NaN
  double top = maximum(t, n & ~15);
  for (int i = n & ~15; i < n; i++) top = t[i] > top ? t[i] : top;
  auto in = [=](int i) KL_LAMBDA {
    int found = 0;
    for (int j = 0; j < 16; j++) found |= t[i + j] == top ? 1 : 0;
    return found;
  };
  int found = 0;
  while (found + 16 <= n && !in(found)) found += 16;
  while (found < n && !(t[found] == top)) found++;
  return found < n ? found : 0;
}

KL_APART inline void add_products(const float* __restrict w, const float* __restrict v, int m, float* __restrict s) {
  down(m, [=](int j, int i) KL_LAMBDA { s[j] = fma(w[i], v[i], s[j]); });
}
KL_APART inline void add_scores(const float* __restrict w, const float* __restrict v, int m, float* __restrict mass,
                                float* __restrict sum, float* __restrict size) {
  down(m, [=](int j, int i) KL_LAMBDA {
    mass[j] += w[i];
    sum[j] = fma(w[i], v[i], sum[j]);
    size[j] = fma(w[i], absolute(v[i]), size[j]);
  });
}
KL_APART inline void add_centred(const float* __restrict w, const float* __restrict v, int m, float centre, float* __restrict sum,
                                 float* __restrict size) {
  down(m, [=](int j, int i) KL_LAMBDA {
    float d = v[i] - centre;
    sum[j] = fma(w[i], d, sum[j]);
    size[j] = fma(w[i], absolute(d), size[j]);
  });
}

// What sweeps leave of a float32 chunk for later ones, if there is memory: sweep 0 the weights; sweep 1, for each requested side,
// the score of every class and the weight of that score.
struct NearWeights {
  alignas(64) float weight[CHUNK + 32];   // offsets within a page as in Buffers
  float max_a;
};
struct NearSide : NearWeights {
  alignas(64) float score[CHUNK + 32];
  bool apart;   // whether the scores are far enough apart to be used
};
inline size_t near_kept(const Plan& p) {
  int sides = (p.dx.data ? 1 : 0) + (p.dy.data ? 1 : 0);
  if (!sides) return p.n <= 128 * CHUNK ? sizeof(NearWeights) : 0;   // a value alone should take little memory
  return sides * sizeof(NearSide);
}
template <bool TEMPERED>
KL_APART void weigh_near(const float* __restrict a, int n, Inverse<float> it, NearWeights& k) {
  float max_a = k.max_a = maximum(a, n);
  for (int i = 0; i < n; i++) k.weight[i] = weight<TEMPERED>(a[i], max_a, it);
}
struct NearSums { Columns<float> mass, sum, size; };
inline Side centre(NearSide& k, int n, const NearSums& sums, double part, double apart) {
  Scores all = {sums.mass.total(), sums.sum.total(), sums.size.total()};
  k.apart = are_balanced(all);
  if (k.apart) return near_side(all, 0.0, all.sum, part);
  float from = centre_of(all);
  Columns<float> sum, size;
  for (int i = 0; i < n; i += PIECE)
    add_centred(k.weight + i, k.score + i, n - i < PIECE ? n - i : PIECE, from, sum.at, size.at);
  k.apart = are_apart(size.total(), all, apart);
  return near_side(all, from, sum.total(), part);
}
KL_APART inline void write_near(const NearSide& k, int n, Slope<float> by, float* __restrict out) {
  for (int i = 0; i < n; i++) out[i] = near_derivative(k.weight[i], k.score[i], by);
}

struct Left { bool value, dx, dy; };   // what is still to be found for a chunk

// A chunk in float, if all its classes are near: its value (whose terms are left in s.dx) and its sides. A side's weights may
// overwrite those of the chunk.
template <bool TEMPERED>
KL_APART void near_chunk(const Plan& p, const Row& row, i64 start, int n, const MemberRow& known, Buffers<double>& s,
                         NearWeights& k, NearSide* x, NearSide* y, Left& left, Members& found) {
  const float* a = load(p.x, row.x, start, n, (float*)s.x);
  const float* b = load(p.y, row.y, start, n, (float*)s.y);
  NearRow<float> by = near_row<float>(known, p.parameter);
  if (!row.kept) weigh_near<TEMPERED>(a, (n + 15) & ~15, by.it, k);
  MemberLoops loops = member_loops(p);
  double part = near_part(known, k.max_a);
  float* w = k.weight;
  Near seen;
  alignas(64) float v[PIECE];
  Columns<float> value;
  NearSums of_x, of_y;
  for (int i = 0; i < n; i += PIECE) {
    int m = n - i < PIECE ? n - i : PIECE, m16 = (m + 15) & ~15;
    if (!see_near<TEMPERED>(a + i, b + i, m16, by, seen)) return;
    loops.near[x != nullptr][y != nullptr](seen, m16, p.parameter, v, x ? x->score + i : nullptr, y ? y->score + i : nullptr);
    add_products(w + i, v, m, value.at);
    if (p.output == TERMS)
      for (int j = 0; j < m; j++) ((float*)s.dx)[i + j] = near_term_of(w[i + j], v[j], part);
    if (x) add_scores(w + i, x->score + i, m, of_x.mass.at, of_x.sum.at, of_x.size.at);
    if (y) {
      for (int j = 0; j < m16; j++) y->weight[i + j] = w[i + j] * seen.q[j];
      add_scores(y->weight + i, y->score + i, m, of_y.mass.at, of_y.sum.at, of_y.size.at);
    }
  }
  found.value = value.total() * part;
  if (x) found.x = centre(*x, n, of_x, part, loops.apart);
  if (y) found.y = centre(*y, n, of_y, part, loops.apart);
  left = {false, x && !x->apart, y && !y->apart};
}

static_assert(MEMBER_STATES <= MAX_STATES);
template <typename T>   // what is left, in the sweeps after the first; out of line: its stack must not add to the first sweep's
KL_APART void members_later(const Plan& p, const Row& row, int sweep, i64 start, int n, MemberRow known, Left wanted,
                            Buffers<double>& s, Members& found) {
  Seen<double>* kept = p.wide && row.kept ? (Seen<double>*)row.kept + start / PIECE : nullptr;   // written by sweep 1 for sweep 2
  bool look = sweep == 1 || !kept;
  const double* a = look ? load(p.x, row.x, start, n, s.x) : nullptr;
  const double* b = look ? load(p.y, row.y, start, n, s.y) : nullptr;
  MemberLoops loops = member_loops(p);
  T *out_x = (T*)s.dx, *out_y = (T*)s.dy;   // in sweep 1: the terms
  Seen<double> local;
  alignas(64) double v[PIECE], score[PIECE];
  auto begin = [&](const SideLoops& of, const double* likely) {
    double s, far;
    int top = likeliest(likely, n);
    see_logits(a + top, b + top, 1, known, local);
    of.score[0](local, 1, p.parameter, &s);
    of.score[1](local, 1, p.parameter, &far);
    return side_from(s, far);
  };
  if (sweep == 1 && wanted.dx) known.x = begin(loops.x, a);
  if (sweep == 1 && wanted.dy) known.y = begin(loops.y, b);
  Columns<double> value, x, mass_x, y, mass_y;
  for (int i = 0; i < n; i += PIECE) {
    int left = n - i < PIECE ? n - i : PIECE, m = (left + 15) & ~15;
    Seen<double>& seen = kept ? kept[i / PIECE] : local;
    if (look) see_logits(a + i, b + i, m, known, seen);
    if (wanted.value) {
      loops.terms(seen, m, p.parameter, v);
      add_columns(v, left, value.at);
      if (p.output == TERMS)
        for (int j = 0; j < left; j++) out_x[i + j] = (T)v[j];
    }
    auto side = [&](const SideLoops& of, const Side& k, const double* mass, Columns<double>& sum, Columns<double>& masses,
                    T* out) {
      of.score[k.far != 0](seen, m, p.parameter, score);
      if (any_vast(score, m)) of.by_log(seen, m, p.parameter, v);
      centre_scores(mass, score, m, k.centre, v);
      if (sweep == 1) {
        add_columns(v, left, sum.at);
        add_columns(mass, left, masses.at);
      } else {
        for (int j = 0; j < left; j++) out[i + j] = (T)member_derivative(v[j], mass[j], k.sum, known.it);   // k.sum is a mean by now
      }
    };
    if (wanted.dx) side(loops.x, known.x, seen.p, x, mass_x, out_x);
    if (wanted.dy) side(loops.y, known.y, seen.q, y, mass_y, out_y);
  }
  if (wanted.value) found.value = value.total();
  if (wanted.dx) found.x = {known.x.far, known.x.centre, x.total(), mass_x.total()};
  if (wanted.dy) found.y = {known.y.far, known.y.centre, y.total(), mass_y.total()};
}

template <typename T, bool TEMPERED>
void members_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                   void* scratch) {
  char* kept = row.kept && !p.wide ? row.kept + start / CHUNK * near_kept(p) : nullptr;
  if (sweep == 0) {
    Row alone = row;
    alone.kept = nullptr;
    logits_chunk<T, TEMPERED>(p, alone, sweep, start, n, stats, state, pitch, scratch);
    if (!kept) return;
    const Kept<T>& k = *(Kept<T>*)((Buffers<T>*)scratch)->a;
    std::memcpy(((NearWeights*)kept)->weight, k.weight, sizeof(float) * ((n + 15) & ~15));
    ((NearWeights*)kept)->max_a = (float)k.at.max_a;
    return;
  }
  Buffers<double>& s = *(Buffers<double>*)scratch;
  MemberRow known = member_row(stats, row.inverse_temperature);
  T *out_x = (T*)s.dx, *out_y = (T*)s.dy;
  Left left = {sweep == 1, p.dx.data != nullptr, p.dy.data != nullptr};
  Members found = {};
  if constexpr (sizeof(T) == sizeof(float)) {
    static_assert(2 * sizeof(NearSide) <= sizeof s.a + sizeof s.b);
    NearSide* sides = kept ? (NearSide*)kept : (NearSide*)s.a;
    NearSide *x = left.dx ? sides : nullptr, *y = left.dy ? sides + left.dx : nullptr;
    if (sweep == 1 || !kept) {
      if (x) x->apart = false;
      if (y) y->apart = false;
      near_chunk<TEMPERED>(p, row, start, n, known, s, *sides, x, y, left, found);
    }
    if (sweep > 1) {
      MemberLoops loops = member_loops(p);
      double part = near_part(known, sides->max_a);
      left = {false, x && !x->apart, y && !y->apart};
      if (x && x->apart) write_near(*x, n, near_slope<float>(known, known.x, loops.x.limit, part), out_x);
      if (y && y->apart) write_near(*y, n, near_slope<float>(known, known.y, loops.y.limit, part), out_y);
    }
  }
  if (left.value || left.dx || left.dy) members_later<T>(p, row, sweep, start, n, known, left, s, found);
  if (sweep == 1) {
    if (p.output == TERMS) store(p.value, row.value, start, n, out_x, row.weight, p.stream);
    for (int i = 0; i < MEMBER_STATES; i++) state[i * pitch] = ((const double*)&found)[i];
    return;
  }
  if (p.dx.data) store(p.dx, row.dx, start, n, out_x, row.weight * p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, row.dy, start, n, out_y, row.weight * p.gradient_scale, p.stream);
}

inline void members_fold(const Plan& p, const Row& row, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep == 0) return logits_fold(p, row, sweep, from, count, pitch, to, to_pitch);
  if (sweep > 1) return;
  alignas(64) double moved[CHUNK];
  MemberLoops loops = member_loops(p);
  to[0] = sum(from, count);
  for (int k = 1; k < MEMBER_STATES; k += SIDE_STATES) {   // x, y
    const double* mass = from + (k + 3) * pitch;
    auto side = [&](int i) {
      const double* at = from + k * pitch + i;
      return Side{at[0], at[pitch], at[2 * pitch], at[3 * pitch]};
    };
    Side all = side(likeliest(mass, count));
    for (int i = 0; i < count; i++) moved[i] = moved_score(side(i), all, k == 1 ? loops.x.limit : loops.y.limit);
    all.sum = sum(moved, count);
    all.mass = sum(mass, count);
    for (int i = 0; i < SIDE_STATES; i++) to[(k + i) * to_pitch] = ((const double*)&all)[i];
  }
}

inline void members_done(const Plan&, const Row& row, int sweep, const double* s, double* stats) {
  if (!s) return (void)std::fill(stats, stats + MAX_STATS, 0.0);
  if (sweep == 0) members_begin(spread_at(s, 1), row.inverse_temperature, stats);
  if (sweep == 1) members_finish(*(const Members*)s, stats);
}

// ---- Rényi divergence (kl_renyi.h) ---------------------------------------------------------------------------------------------
//
// The sweeps of alpha_div's value, one for tilted rows, and that of the gradient.

Kernel sums_kernel(const Plan& p);
inline bool of_members(const Plan& p) {
  return p.space_x == LOGITS && p.space_y == LOGITS && OPERATIONS[p.operation].form == BY_CLASS && !p.factors.data;
}
inline int sums_of(const Plan& p) { return is_unnormalised(p.space_x) || is_unnormalised(p.space_y) ? 2 : 1; }

inline void tilt_chunk(const Plan& p, const Row& row, i64 start, int n, const double* stats, double* state, i64 pitch,
                       Buffers<double>& s) {
  double it = row.inverse_temperature;
  const double *x = load(p.x, row.x, start, n, s.x), *y = load(p.y, row.y, start, n, s.y);
  const double *of_x = stats + NORM_X, *of_y = stats + NORM_Y;
  if (of_members(p)) {
    of_x = stats + MEMBER_MAX_A;
    of_y = stats + MEMBER_MAX_B;
    norm_of(x, n, it, state + NORM_STATES * pitch, pitch);
    norm_of(y, n, it, state + 2 * NORM_STATES * pitch, pitch);
  }
  for (int i = 0; i < (n + 15) / 16 * 16; i++)
    s.a[i] = tilt_of(rough(p.space_x, p.space_y, x[i], y[i], of_x, of_y, stats, it), p.parameter);
  norm_of(s.a, n, 1.0, state, pitch);
}
template <typename T> void tilt_outputs(const Plan& p, const Row& row, i64 start, int n, const double* stats, Buffers<double>& s) {
  const double *x = load(p.x, row.x, start, n, s.x), *y = load(p.y, row.y, start, n, s.y);
  TiltRow known = tilt_row(p.space_x, p.space_y, p.parameter, stats);
  T *dx = (T*)s.dx, *dy = (T*)s.dy;
  for (int i = 0; i < n; i++) {
    TiltSlopes d = tilt_slopes(p.space_x, p.space_y, x[i], y[i], known, stats, row.inverse_temperature);
    dx[i] = (T)d.dx;
    dy[i] = (T)d.dy;
  }
  if (p.dx.data) store(p.dx, row.dx, start, n, dx, row.weight * p.gradient_scale, p.stream);
  if (p.dy.data) store(p.dy, row.dy, start, n, dy, row.weight * p.gradient_scale, p.stream);
}

template <typename T>
void renyi_chunk(const Plan& p, const Row& row, int sweep, i64 start, int n, const double* stats, double* state, i64 pitch,
                 void* scratch) {
  int sums = sums_of(p);
  if (sweep < sums) {
    if (sums > 1) return sums_kernel(p).chunk(p, row, sweep, start, n, stats, state, pitch, scratch);
    Plan value = p;   // without gradients, which the sweep would write too
    value.dx.data = value.dy.data = nullptr;
    return sums_kernel(p).chunk(value, row, sweep, start, n, stats, state, pitch, scratch);
  }
  if (sweep == sums) {
    for (int k = 0; k < tilt_states(of_members(p)); k++) state[k * pitch] = 0;
    if (is_tilted(stats)) tilt_chunk(p, row, start, n, stats, state, pitch, *(Buffers<double>*)scratch);
    return;
  }
  if (is_tilted(stats)) return tilt_outputs<T>(p, row, start, n, stats, *(Buffers<double>*)scratch);
  double unused;
  Row scaled = row;
  scaled.weight *= stats[RENYI_SLOPE];
  sums_kernel(p).chunk(p, scaled, sums > 1 ? sums : 0, start, n, stats, &unused, 1, scratch);
}

inline void renyi_fold(const Plan& p, const Row& row, int sweep, const double* from, int count, i64 pitch, double* to, i64 to_pitch) {
  if (sweep < sums_of(p)) return sums_kernel(p).fold(p, row, sweep, from, count, pitch, to, to_pitch);
  if (sweep > sums_of(p)) return;
  for (int k = 0; k < tilt_states(of_members(p)); k += NORM_STATES)
    norm_fold(k == 0 ? 1.0 : row.inverse_temperature, from + k * pitch, count, pitch, to + k * to_pitch, to_pitch);
}

inline void renyi_done(const Plan& p, const Row& row, int sweep, const double* state, double* stats) {
  int sums = sums_of(p);
  if (sweep < sums) sums_kernel(p).finish(p, row, sweep, state, stats);
  if (sweep == sums - 1) renyi_begin(p.parameter, stats);
  if (sweep != sums) return;
  if (!is_tilted(stats)) return renyi_finish(p.parameter, stats);
  if (of_members(p)) {
    norm_finish(state + NORM_STATES, stats + NORM_X);
    norm_finish(state + 2 * NORM_STATES, stats + NORM_Y);
  }
  tilt_finish(p.space_x, p.space_y, p.parameter, {state[0], state[1], state[2]}, stats);
}

inline Kernel renyi_kernel(const Plan& p) {
  Kernel k = sums_kernel(p);
  int sums = sums_of(p);
  k.states[sums] = tilt_states(of_members(p));
  k.states[sums + 1] = 0;
  k.sweeps = sums + (p.dx.data || p.dy.data ? 2 : 1);
  k.chunk = p.wide ? renyi_chunk<double> : renyi_chunk<float>;
  k.fold = renyi_fold;
  k.finish = renyi_done;
  return k;
}

// ---- which kernel --------------------------------------------------------------------------------------------------------------

inline bool of_logits(const Plan& p) {   // the cancellation-free form is for the divergence of two rows of logits
  return p.space_x == LOGITS && p.space_y == LOGITS && OPERATIONS[p.operation].form == BY_RATIO && !p.factors.data;
}

inline bool of_cross(const Plan& p) {
  return (p.space_x == LOGITS || p.space_y == LOGITS) && p.space_x != COUNTS && p.space_y != COUNTS &&
         OPERATIONS[p.operation].form == BY_COST && !p.factors.data;
}

inline Kernel sums_kernel(const Plan& p) {
  bool gradient = p.dx.data || p.dy.data;
  if (of_logits(p)) {
    int sweeps = gradient || p.output == TERMS ? 2 : 1;
    bool tempered = is_tempered(p);
    auto chunk = p.wide ? (tempered ? logits_chunk<double, true> : logits_chunk<double, false>)
                        : (tempered ? logits_chunk<float, true> : logits_chunk<float, false>);
    return {sweeps, {LOGITS_STATES, 0, 0}, chunk, logits_fold, logits_done,
            gradient && p.output != TERMS ? (p.wide ? sizeof(Kept<double>) : sizeof(Kept<float>)) : 0};
  }
  if (of_members(p)) {
    bool tempered = is_tempered(p);
    return {gradient ? 3 : 2, {LOGITS_STATES, MEMBER_STATES, 0},
            p.wide ? (tempered ? members_chunk<double, true> : members_chunk<double, false>)
                   : (tempered ? members_chunk<float, true> : members_chunk<float, false>),
            members_fold, members_done,
            !p.wide ? near_kept(p) : gradient ? sizeof(Seen<double>) * (CHUNK / PIECE) : 0};
  }
  if (of_cross(p)) return p.wide ? cross_kernel_of<double>(p) : cross_kernel_of<float>(p);
  if (is_unnormalised(p.space_x) || is_unnormalised(p.space_y))
    return {gradient ? 3 : 2, {2 * NORM_STATES, SUM_STATES, 0}, p.wide ? mixed_chunk<double> : mixed_chunk<float>, mixed_fold,
            mixed_finish, !gradient ? 0 : p.wide ? sizeof(MixedKept<double>) : sizeof(MixedKept<float>)};
  if (p.wide) return {1, {1, 0, 0}, terms_chunk<double>, terms_fold, terms_finish, 0};
  return {1, {1, 0, 0}, terms_chunk<float>, terms_fold, terms_finish, 0};
}
Kernel sparse_kernel(const Plan& p);   // kl_sparse_rows.h
inline Kernel kernel(const Plan& p) {
  return p.sparse ? sparse_kernel(p) : p.operation == RENYI_DIV ? renyi_kernel(p) : sums_kernel(p);
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
