// All rows of a plan over OpenMP threads. Called by kl_cpu.pyx without the GIL; calls the sweeps of one row, or a block of short
// rows, through kl_isa.h. The only arithmetic here is the summation of rows, in the order of kl_tree.h: neither the number of
// threads, nor which of them computes what, changes a bit. All memory is allocated before anything is written.
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "kl_threads.h"

namespace kl {

// If classes are far apart in memory, neighbouring rows are computed together: LINE, which share cache lines, up to GROUP.
constexpr int LINE = 16, GROUP = 256;
constexpr i64 FEW = 4;                // fewer rows are not worth computing together
constexpr i64 TILE = 128 * CHUNK;      // numbers per array that such rows gather at once; fits in the second-level cache
constexpr i64 STREAM = 64 << 20;      // bytes from which on outputs bypass the caches
constexpr i64 KEPT = 4 << 20;         // the most bytes of a row's intermediate results that are kept for the last sweep
constexpr i64 AHEAD = 1 << 20;        // the most bytes of a pair of rows for the next pair to be read ahead
constexpr i64 ROUND = 16 * CHUNK;     // rows whose totals are held at once
constexpr i64 BLOCK = CHUNK;          // rows per partial sum when a gradient is summed over rows

// 64-byte aligned memory. Each thread keeps some between calls: freeing it every time would cost a small call a third of its time.
class Scratch {
 public:
  explicit Scratch(size_t bytes = 0) {
    if (bytes) take(bytes);
  }
  void take(size_t bytes) {           // call once
    Memory& mine = kept();
    if (bytes <= KEPT_BYTES && !mine.lent) {
      if (!mine.at) mine.at = allocate(KEPT_BYTES);
      mine.lent = true;
      at = mine.at;
    } else {
      at = own = allocate(bytes);
    }
  }
  ~Scratch() {
    if (own) release(own);
    else if (at) kept().lent = false;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return at; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t KEPT_BYTES = 0;   // so that the sanitizer sees accesses out of bounds
#else
  static constexpr size_t KEPT_BYTES = 192 * 1024;   // only the pages that have been used are resident
#endif
  struct Memory {
    char* at = nullptr;
    bool lent = false;
    ~Memory() {
      if (at) release(at);
    }
  };
  static Memory& kept() {
    static thread_local Memory memory;
    return memory;
  }
  static char* allocate(size_t bytes) { return (char*)::operator new(bytes, std::align_val_t(64)); }
  static void release(char* p) { ::operator delete(p, std::align_val_t(64)); }
  char *at = nullptr, *own = nullptr;
};

inline void write_zeros(const Array& a, char* row, i64 n, Worker& worker) {
  if (!a.data) return;
  i64 size = size_of(a.dtype);
  for (i64 start = 0; start < n && !worker.stops(CHUNK); start += CHUNK)
    for (i64 i = start; i < std::min(n, start + CHUNK); i++) std::memset(row + i * a.stride, 0, (size_t)size);
}

inline void write_value(const Array& a, char* at, double v) {
  generic::narrow_to(a.dtype, &v, 1.0, 1, at, 0);
}

// Merges neighbouring batch axes over which every array has a constant step.
inline void collapse(Plan& p) {
  Array* arrays[] = {&p.x, &p.y, &p.weights, &p.temperatures, &p.factors, &p.value, &p.dx, &p.dy, &p.known};
  for (int d = p.ndim - 2; d >= 0; d--) {
    bool even = true;
    for (Array* a : arrays) even = even && (!a->data || a->batch[d] == a->batch[d + 1] * p.shape[d + 1]);
    if (!even) continue;
    p.shape[d] *= p.shape[d + 1];
    p.ndim--;
    for (Array* a : arrays) a->batch[d] = a->batch[d + 1];
    for (int e = d + 1; e < p.ndim; e++) {
      p.shape[e] = p.shape[e + 1];
      for (Array* a : arrays) a->batch[e] = a->batch[e + 1];
    }
  }
}

inline bool scattered(const Array& a) { return a.data && std::abs(a.stride) > 64; }

// Transposes n classes of m rows that are neighbours in memory, from columns to rows `pitch` bytes apart, or back. Eight classes
// at a time use eight cache lines, which the rows share. The eight after the next ones are prefetched, since no hardware predicts
// strides of this size.
template <int SIZE, bool BACK> void turn_tile(char* columns, i64 stride, int m, int n, char* rows, i64 pitch) {
  constexpr int STEP = 8;
  for (int start = 0; start < n; start += STEP) {
    int end = std::min(start + STEP, n);
    for (int i = start + 2 * STEP; i < end + 2 * STEP && i < n; i++)
      for (int k = 0; k < m * SIZE; k += 64) prefetch(columns + i * stride + k);
    char *column = columns + start * stride, *row = rows + start * SIZE;
    if (BACK) turn<SIZE>(row, pitch, m, end - start, column, stride);
    else turn<SIZE>(column, stride, end - start, m, row, pitch);
  }
}

template <bool BACK> void turn_tile(int size, char* columns, i64 stride, int m, int n, char* rows, i64 pitch) {
  (size == 8 ? turn_tile<8, BACK> : size == 4 ? turn_tile<4, BACK> : turn_tile<2, BACK>)(columns, stride, m, n, rows, pitch);
}

struct Batch {
  const Plan& p;
  Kernel kernel;
  const Isa& isa;
  i64 chunks, group;
  i64 panel, panels;                  // chunks whose states are held at once; the number of such panels
  i64 per_row;                        // doubles for a row's states: those of a panel, then one per panel
  bool ahead;                         // prefetch the next row while this one is written
  Few few_rows;                       // for rows so short that several are computed together; or nullptr
  size_t bytes;                       // of scratch per thread: a chunk's, then states, then the rest
  size_t rows_at;                     // offset in the scratch of a group's rows
  size_t kept = 0;                    // offset of what a sweep keeps for the last one; 0: nothing is kept
  // If classes are far apart in memory, a chunk of all rows of a group is gathered into contiguous rows, the tile, before it is
  // computed, and results are scattered from there: `near` is the plan for the tile.
  static constexpr int OUTPUTS = 2, SIDES = 5;   // the index of the first output; the number of arrays
  static constexpr Array Plan::*sides[SIDES] = {&Plan::x, &Plan::y, &Plan::value, &Plan::dx, &Plan::dy};
  size_t tile[SIDES] = {0};           // offset in the scratch; 0: the array is used in place
  Plan near;

  // `whole`: all sweeps of a row follow each other, so that one may keep something for the last one
  Batch(const Plan& plan, const Isa& set, bool whole = true) : p(plan), kernel(set.kernel(plan)), isa(set), near(plan) {
    chunks = (p.n + CHUNK - 1) / CHUNK;
    bool far = scattered(p.x) || scattered(p.y) || scattered(p.dx) || scattered(p.dy);
    group = far ? group_size() : 1;
    few_rows = isa.few(p);
    if (p.n < 1 || p.n > COLUMNS || p.rows < FEW) few_rows = nullptr;
    if (few_rows) group = isa.lanes(p.n, p.wide);
    i64 size = p.x.dtype == FLOAT64 ? 8 : 4;
    ahead = group == 1 && kernel.sweeps > 1 && chunks > 1 && 2 * p.n * size <= AHEAD && p.x.stride == size &&
            p.y.stride == size;
    panel = std::min<i64>(CHUNK, (std::max<i64>(chunks, 1) + 7) & ~(i64)7);
    panels = (chunks + CHUNK - 1) / CHUNK;
    per_row = (panel + panels) * *std::max_element(std::begin(kernel.states), std::end(kernel.states));
    rows_at = SCRATCH + sizeof(double) * (size_t)(per_row * (few_rows ? 1 : group));
    bytes = (rows_at + (size_t)group * (sizeof(Row) + sizeof(double) * (MAX_STATS + 1) + 1) + 63) & ~(size_t)63;
    if (whole && group == 1 && kernel.kept > 0 && (i64)kernel.kept * chunks <= KEPT) {
      kept = bytes;
      bytes += kernel.kept * (size_t)chunks;
    }
    for (int k = 0; k < SIDES && group > 1 && !few_rows; k++) {
      Array& a = near.*sides[k];
      if (!scattered(a) || (&a == &near.value && p.output != TERMS)) continue;
      near.stream = 0;
      a.stride = size_of(a.dtype);
      tile[k] = bytes;
      bytes += (size_t)(pitch(k) * group);
    }
  }

  // How many rows are computed together: enough for TILE numbers, but few enough that every thread gets some.
  i64 group_size() const {
    i64 last = p.ndim ? p.shape[p.ndim - 1] : 1, rows = TILE / std::min<i64>(CHUNK, std::max<i64>(p.n, 1));
    rows = std::min<i64>(std::min<i64>(rows, GROUP), p.rows / (4ll * p.threads)) / LINE * LINE;
    return std::min(std::max<i64>(rows, LINE), std::max<i64>(last, 1));
  }

  // Rows of the tile begin at different offsets within a page: the first-level cache holds few lines of one offset.
  i64 pitch(int k) const { return ((std::min<i64>(CHUNK, p.n) * size_of((p.*sides[k]).dtype) + 63) & ~(i64)63) + 64; }
  static char*& place(Row& row, int k) {
    char** places[SIDES] = {(char**)&row.x, (char**)&row.y, &row.value, &row.dx, &row.dy};
    return *places[k];
  }

  // Copies the classes from `start` on of these rows, for sides [first, last), between arrays in which they are far apart and the
  // tile.
  template <bool BACK>
  void turn_chunk(int first, int last, Row* row, int count, i64 start, int n, char* scratch) const {
    for (int k = first; k < last; k++) {
      if (!tile[k]) continue;
      const Array& a = p.*sides[k];
      for (int i = 0, m; i < count; i += m) {
        char* at = place(row[i], k);
        for (m = 1; i + m < count && place(row[i + m], k) == at + m * size_of(a.dtype);) m++;
        turn_tile<BACK>(size_of(a.dtype), at + start * a.stride, a.stride, m, n, scratch + tile[k] + i * pitch(k), pitch(k));
      }
    }
  }

  // Row i in the tile, with addresses from which class `start` is the first one there
  Row in_tile(const Row& row, int i, i64 start, char* scratch) const {
    Row moved = row;
    for (int k = 0; k < SIDES; k++)
      if (tile[k]) place(moved, k) = scratch + tile[k] + i * pitch(k) - start * size_of((p.*sides[k]).dtype);
    return moved;
  }

  int size(i64 chunk) const { return (int)std::min<i64>(CHUNK, p.n - chunk * CHUNK); }

  // Merges a row's states of one panel into one; finish_row merges those of all panels.
  void fold_panel(const Row& row, int s, double* states, i64 k) const {
    int count = (int)std::min<i64>(CHUNK, chunks - k * CHUNK);
    kernel.fold(p, row, s, states, count, panel, states + panel * kernel.states[s] + k, panels);
  }
  void finish_row(const Row& row, int s, double* states, double* stats) const {
    finish_states(row, s, states + panel * kernel.states[s], panels, panels, stats);
  }
  // Merges `count` states, at least one, level by level, into one.
  void fold_states(const Row& row, int s, double* at, i64 count, i64 pitch, double* last) const {
    for (; count > CHUNK; count = (count + CHUNK - 1) / CHUNK)
      for (i64 k = 0; k * CHUNK < count; k++)
        kernel.fold(p, row, s, at + k * CHUNK, (int)std::min<i64>(CHUNK, count - k * CHUNK), pitch, at + k, pitch);
    kernel.fold(p, row, s, at, (int)count, pitch, last, 1);
  }
  // Merges them, and turns the result into the row's stats.
  void finish_states(const Row& row, int s, double* at, i64 count, i64 pitch, double* stats) const {
    double last[MAX_STATES];
    if (count > 0) fold_states(row, s, at, count, pitch, last);
    kernel.finish(p, row, s, count > 0 ? last : nullptr, stats);
  }

  // Sweeps [first, last) of rows [r, r + count), in one thread; false if the call should stop.
  bool rows(i64 r, int count, int first, int last, Row* row, double (*stats)[MAX_STATS], char* scratch,
            Worker& worker) const {
    double* states = (double*)(scratch + SCRATCH);
    for (int i = 0; i < count; i++) row[i] = locate(p, r + i);
    if (kept) row[0].kept = scratch + kept;
    if (ahead && r + count < p.rows) {
      Row next = locate(p, r + count);
      row[0].next_x = next.x;
      row[0].next_y = next.y;
    }
    for (int s = first; s < last; s++) {
      for (i64 k = 0; k < panels; k++) {
        for (i64 c = k * CHUNK; c < std::min(chunks, (k + 1) * CHUNK); c++) {
          if (worker.stops(count * size(c))) return false;
          turn_chunk<false>(0, OUTPUTS, row, count, c * CHUNK, size(c), scratch);
          for (int i = 0; i < count; i++)
            if (row[i].weight != 0)
              kernel.chunk(near, in_tile(row[i], i, c * CHUNK, scratch), s, c * CHUNK, size(c), stats[i],
                           states + i * per_row + c % CHUNK, panel, scratch);
          // results are copied out in the sweep that writes them: the next chunk takes their place in the tile
          if (s == kernel.terms_sweep()) turn_chunk<true>(OUTPUTS, OUTPUTS + 1, row, count, c * CHUNK, size(c), scratch);
          if (s == kernel.sweeps - 1) turn_chunk<true>(OUTPUTS + 1, SIDES, row, count, c * CHUNK, size(c), scratch);
        }
        for (int i = 0; i < count; i++)
          if (row[i].weight != 0) fold_panel(row[i], s, states + i * per_row, k);
      }
      for (int i = 0; i < count; i++)
        if (row[i].weight != 0) finish_row(row[i], s, states + i * per_row, stats[i]);
    }
    return true;
  }

  // All sweeps of rows [r, r + count), at most `group`, in one thread; `values`, if not nullptr, receives what they add to a total.
  void group_of_rows(i64 r, int count, double* values, char* scratch, Worker& worker) const {
    Row* row = (Row*)(scratch + rows_at);
    double(*stats)[MAX_STATS] = (double(*)[MAX_STATS])(row + group), *found = (double*)(stats + group);
    char* alone = (char*)(found + group);
    if (worker.stops(few_rows ? count * p.n : count)) return;
    if (few_rows) {
      std::memset(alone, count < FEW, (size_t)count);
      if (count >= FEW) few_rows(p, r, count, found, alone, scratch);   // writes whole vectors, up to `group`
      for (int i = 0; i < count; i++)
        if (alone[i] && rows(r + i, 1, 0, kernel.sweeps, row, stats, scratch, worker))
          found[i] = finish(row[0], stats[0], worker);
    } else if (rows(r, count, 0, kernel.sweeps, row, stats, scratch, worker)) {
      for (int i = 0; i < count; i++) found[i] = finish(row[i], stats[i], worker);
    }
    if (values && !worker.watch.stopped) std::copy(found, found + count, values);
  }

  // One row, with its chunks spread over all threads; returns what it adds to a total. `all` is the scratch of these threads.
  double long_row(i64 r, int threads, char* scratch, char* all, Watch& watch) const {
    Row row = locate(p, r);
    double stats[MAX_STATS] = {0}, *states = (double*)(scratch + SCRATCH);
    if (kept) row.kept = scratch + kept;
    for (int s = 0; s < kernel.sweeps && row.weight != 0; s++) {
      for (i64 k = 0; k < panels; k++) {
        i64 start = k * CHUNK;
        each(watch, threads, std::min<i64>(CHUNK, chunks - start), 8, p.stream, [&](i64 i, Worker& worker) {
          if (worker.stops(CHUNK)) return;
          kernel.chunk(p, row, s, (start + i) * CHUNK, size(start + i), stats, states + i, panel,
                       all + (size_t)worker.number * SCRATCH);
        });
        if (watch.stopped) return 0;
        fold_panel(row, s, states, k);
      }
      finish_row(row, s, states, stats);
    }
    Worker worker(watch, 0);
    return finish(row, stats, worker);
  }

  // Writes the outputs of a finished row; returns what it adds to the total.
  double finish(const Row& row, const double* stats, Worker& worker) const {
    if (row.weight == 0) {            // never read: its value and gradient are zero
      if (p.output == TERMS) write_zeros(p.value, row.value, p.n, worker);
      write_zeros(p.dx, row.dx, p.n, worker);
      write_zeros(p.dy, row.dy, p.n, worker);
    }
    double v = row.weight == 0 ? 0.0 : row.weight == 1 ? stats[0] : stats[0] * row.weight;
    if (p.output == PER_ROW) write_value(p.value, row.value, v);
    return v;
  }
};

// Sums the rows' totals in the order of kl_tree.h as they arrive
class Total {
 public:
  Total(const Isa& set, i64 rows) : isa(set) {
    for (i64 n = (rows + CHUNK - 1) / CHUNK; n > 0; n = n > CHUNK ? (n + CHUNK - 1) / CHUNK : 0) {
      sums.emplace_back();
      sums.back().reserve((size_t)std::min<i64>(n, CHUNK));
    }
  }
  void add(double* rows, i64 count) {   // a multiple of CHUNK, except in the last call; overwrites them
    for (i64 i = 0; i < count; i += CHUNK) push(0, isa.sum_levels(rows + i, std::min<i64>(CHUNK, count - i)));
  }
  double value() {
    double sum = 0.0;
    for (size_t k = 0; k < sums.size(); k++) {
      sum = add_up(k);
      if (k + 1 == sums.size() || sums[k + 1].empty()) break;
      push(k + 1, sum);
    }
    return sum;
  }

 private:
  const Isa& isa;
  std::vector<std::vector<double>> sums;   // of chunks of rows, of chunks of these, and so on: at most a chunk of each
  double add_up(size_t k) {
    double sum = isa.sum_levels(sums[k].data(), (i64)sums[k].size());
    sums[k].clear();
    return sum;
  }
  void push(size_t k, double sum) {
    if (sums[k].size() == CHUNK) push(k + 1, add_up(k));
    sums[k].push_back(sum);
  }
};

// The work for one plan. All memory is allocated by the constructor: nothing is written if there is too little.
struct Job {
  virtual void compute(Watch& watch) = 0;
  virtual ~Job() = default;
};

// Values, terms and gradients, row by row.
class EachRow : public Job {
 public:
  EachRow(Plan& plan, const Isa& isa) : p(prepared(plan)), b(p, isa), total(isa, p.output == TOTAL ? p.rows : 0) {
    by_chunk = p.threads > 1 && p.rows < 4 * p.threads && b.chunks >= 4 * p.threads;
    threads = granted((int)std::min<i64>(p.threads, by_chunk ? b.chunks : (p.rows + b.group - 1) / b.group));
    round = std::min<i64>(p.rows, p.output == TOTAL ? ROUND : p.rows);
    held.resize(p.output == TOTAL ? (size_t)round : 0);
    scratch.take(by_chunk ? b.bytes + (size_t)(SCRATCH * threads) : b.bytes * (size_t)threads);
  }

  void compute(Watch& watch) override {
    for (i64 start = 0; start < p.rows && !watch.stopped; start += round) {
      i64 count = std::min(round, p.rows - start);
      if (by_chunk)
        for (i64 r = 0; r < count && !watch.stopped; r++) {
          double v = b.long_row(start + r, threads, scratch.data(), scratch.data() + b.bytes, watch);
          if (p.output == TOTAL) held[(size_t)r] = v;
        }
      else row_by_row(start, count, watch);
      if (p.output == TOTAL) total.add(held.data(), count);
    }
    if (p.output == TOTAL) p.total = total.value();
  }

 private:
  Plan& p;
  Batch b;
  Total total;
  bool by_chunk;                      // few rows, whose chunks are shared among all threads
  int threads;
  i64 round;
  std::vector<double> held;           // what the rows of a round add to the total
  Scratch scratch;

  static Plan& prepared(Plan& p) {
    collapse(p);
    i64 outputs = (p.dx.data != nullptr) + (p.dy.data != nullptr) + (p.output == TERMS);
    p.stream = p.rows * p.n * 4 * outputs >= STREAM;
    p.threads = most_threads(p.threads, p.rows * std::max<i64>(p.n, 1));
    return p;
  }
  void row_by_row(i64 start, i64 rows, Watch& watch) {
    i64 groups = (rows + b.group - 1) / b.group;
    i64 share = std::max<i64>(1, groups / (threads * 8));   // runs of rows, so that each row finds the next one prefetched
    each(watch, threads, groups, share, p.stream, [&](i64 g, Worker& worker) {
      i64 r = g * b.group;
      b.group_of_rows(start + r, (int)std::min(b.group, rows - r), p.output == TOTAL ? held.data() + r : nullptr,
                      scratch.data() + (size_t)worker.number * b.bytes, worker);
    });
  }
};

// The gradient of an operand that is broadcast over the last `inner_axes` batch axes: the sum of the gradients of these rows.
// Blocks of BLOCK rows are summed row by row in double, then the blocks in order. The plan's dx or dy (whichever is present) has
// the operand's shape; its strides along the inner axes are not used.
//
// Several blocks are computed at once: first what the last sweep needs to know of their rows, then that sweep. If a row has enough
// chunks for all threads, a thread takes one chunk of all these blocks, otherwise one chunk of one of them.
class SummedGradient : public Job {
 public:
  SummedGradient(Plan& plan, const Isa& isa, int inner_axes) : SummedGradient(plan, isa, inner_axes, plan.dx.data) {}

  void compute(Watch& watch) override {
    for (i64 o = 0; o < outer; o++) {
      std::fill(result.begin(), result.end(), 0.0);
      for (i64 first = 0; first < blocks; first += at_once) {
        i64 begin = first * BLOCK, end = std::min(inner, begin + at_once * BLOCK);
        if (last > 0) know(o * inner + begin, end - begin, watch);
        add(o * inner + begin, end - begin, std::min(at_once, blocks - first), watch);
        if (watch.stopped) return;
      }
      if (!result.empty()) write(o * inner, 0, p.n, result.data());
    }
  }

 private:
  Plan &p, q;                         // q: one chunk of a row's gradient, as double, into a buffer
  bool of_x;
  Batch b;
  i64 inner = 1, outer, blocks, at_once;
  int last, threads;
  bool deep;                          // a thread takes a chunk of all blocks
  std::vector<double> known, sums, result;
  size_t pitch;                       // bytes of scratch per thread
  Scratch scratch;

  SummedGradient(Plan& plan, const Isa& isa, int inner_axes, bool x)
      : p(plan), q(plan), of_x(x), b(into_buffer(), isa, false) {
    for (int d = p.ndim - inner_axes; d < p.ndim; d++) inner *= p.shape[d];
    outer = inner ? p.rows / inner : 0;
    blocks = (inner + BLOCK - 1) / BLOCK;
    last = b.kernel.sweeps - 1;
    threads = granted((int)std::min<i64>(q.threads, std::max(inner, b.chunks)));
    deep = b.chunks >= 4 * threads;
    i64 some = deep ? 4 : std::min<i64>(2 * threads, 4 * threads / std::max<i64>(1, b.chunks) + 1);
    at_once = deep && last == 0 ? std::max<i64>(1, blocks) : std::max<i64>(1, std::min(blocks, some));
    known.resize(last > 0 ? (size_t)(std::min(inner, at_once * BLOCK) * MAX_STATS) : 0);
    sums.resize(deep ? 0 : (size_t)(at_once * p.n));
    result.resize(deep && at_once >= blocks ? 0 : (size_t)p.n);
    pitch = b.bytes + 3 * sizeof(double) * CHUNK;
    scratch.take(pitch * (size_t)threads);
  }
  const Plan& into_buffer() {
    Array& to = of_x ? q.dx : q.dy;
    q.threads = most_threads(p.threads, p.rows * std::max<i64>(p.n, 1));
    q.output = PER_ROW;
    q.value.data = nullptr;
    to.dtype = FLOAT64;
    to.stride = 8;
    return q;
  }

  char* mine(const Worker& worker) const { return scratch.data() + (size_t)worker.number * pitch; }
  double (*stats_of(i64 i))[MAX_STATS] { return (double(*)[MAX_STATS])(known.data() + i * MAX_STATS); }
  void write(i64 r, i64 start, i64 n, const double* gradient) const {
    Row row = locate(p, r);
    const Array& a = of_x ? p.dx : p.dy;
    generic::narrow_to(a.dtype, gradient, 1.0, n, (of_x ? row.dx : row.dy) + start * a.stride, a.stride);
  }

  // The stats before the last sweep of rows [r, r + rows).
  void know(i64 r, i64 rows, Watch& watch) {
    each(watch, threads, rows, 1, false, [&](i64 i, Worker& worker) {
      Row row;
      b.rows(r + i, 1, 0, last, &row, stats_of(i), mine(worker), worker);
    });
  }

  // The gradients of these rows, in `count` blocks: added to `result`, or written if these are all the blocks.
  void add(i64 r, i64 rows, i64 count, Watch& watch) {
    each(watch, threads, (deep ? 1 : count) * b.chunks, 1, false, [&](i64 item, Worker& worker) {
      i64 k = item / b.chunks, c = item % b.chunks, end = deep ? count : k + 1;
      int size = b.size(c);
      double *gradient = (double*)(mine(worker) + b.bytes), *sum = gradient + CHUNK, *all = sum + CHUNK;
      if (!deep) sum = sums.data() + k * p.n + c * CHUNK;
      else if (result.empty()) std::fill(all, all + size, 0.0);
      else all = result.data() + c * CHUNK;
      for (; k < end; k++) {
        std::fill(sum, sum + size, 0.0);
        for (i64 i = k * BLOCK; i < std::min(rows, (k + 1) * BLOCK); i++) {
          if (worker.stops(size)) return;
          Row row = locate(q, r + i);
          if (row.weight == 0) continue;
          (of_x ? row.dx : row.dy) = (char*)gradient - c * CHUNK * 8;
          double state[MAX_STATES];
          b.kernel.chunk(q, row, last, c * CHUNK, size, last > 0 ? *stats_of(i) : nullptr, state, 1, mine(worker));
          for (int j = 0; j < size; j++) sum[j] += gradient[j];
        }
        for (int j = 0; deep && j < size; j++) all[j] += sum[j];
      }
      if (deep && result.empty()) write(r, c * CHUNK, size, all);
    });
    for (i64 k = 0; k < count && !deep; k++)
      for (i64 j = 0; j < p.n; j++) result[(size_t)j] += sums[(size_t)(k * p.n + j)];
  }
};

// How many rows of few classes are computed together; 0: rows are computed one by one
inline int few_at_once(const Plan& p, const Isa& isa) {
  Batch b(p, isa);
  return b.few_rows ? (int)b.group : 0;
}

// A plan, and the number of its last batch axes over which a gradient is summed; -1: it is no such gradient
struct Task {
  Plan* plan;
  int inner_axes;
};

// Runs plans, at most MAX_TASKS, one after the other.
constexpr int MAX_TASKS = 3;
inline int run(const Task* tasks, int count, const Isa& isa, Ask ask) noexcept {
  return guarded(ask, [&](Watch& watch) {
    if (count == 1 && tasks[0].inner_axes < 0) return EachRow(*tasks[0].plan, isa).compute(watch);
    std::unique_ptr<Job> jobs[MAX_TASKS];
    for (int k = 0; k < count; k++) {
      if (tasks[k].inner_axes < 0) jobs[k] = std::make_unique<EachRow>(*tasks[k].plan, isa);
      else jobs[k] = std::make_unique<SummedGradient>(*tasks[k].plan, isa, tasks[k].inner_axes);
    }
    for (int k = 0; k < count && !watch.stopped; k++) jobs[k]->compute(watch);
  });
}

}  // namespace kl
