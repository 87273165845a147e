// What runs CUDA kernels on the CPU: fibers, barriers, launches. emulator.h says what a kernel asks of it; launch.h, which
// is compiled with each kernel, calls that kernel.
//
// Every CUDA thread is a fiber with its own stack. Fibers are switched only where CUDA threads wait for each other, so a
// run depends only on the seed of its schedule. Seed 0 runs everything in order. Other seeds permute blocks and threads and
// let some warps run far ahead; odd seeds also hold one warp of each block back until no other can continue. A correct
// kernel gives the same bits under every seed. What is undefined on a GPU and would go unnoticed on a CPU is an error here,
// which names kernel, block and thread: threads that wait for others that never arrive, lanes outside their own mask,
// misaligned vectors, shared memory overruns. Shared memory starts as NaNs, and asynchronous copies complete as late as
// allowed, so that missing waits and barriers show in the results.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#if !defined(__linux__) || !defined(__x86_64__)
#define EMULATOR_UCONTEXT 1   // elsewhere the C library switches stacks, which is slow
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

using namespace emulator;
namespace {

// ---- what one launch asks for ---------------------------------------------------------------------------------------
struct Launch {
  const char* name;                   // of the kernel
  void (*call)(void (*kernel)(), const void* plan);   // for one thread
  void (*kernel)();
  const void* plan;
  unsigned grid, block;               // blocks, threads per block
  std::size_t shared_bytes;           // per block
  unsigned seed;
  int threads;                        // of the operating system
};

struct Error { std::string text; };

constexpr std::size_t GUARD = 1024;   // bytes around a block's shared memory that must not be touched; keeps its alignment
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK = 512 << 10;
#else
constexpr std::size_t STACK = 256 << 10;
#endif

// ---- fibers ---------------------------------------------------------------------------------------------------------
struct Context {
#if defined(EMULATOR_UCONTEXT)
  ucontext_t registers;
#else
  void* top;                          // of the stack, where the registers are saved while another fiber runs
#endif
  const void* stack;
  std::size_t size;
  void* fake;                         // ASan's
};

#if !defined(EMULATOR_UCONTEXT)
// Saves the registers that a function must preserve, and continues where `to` was saved. Jumps instead of returning,
// because the processor would predict a return to this call's caller.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.local emulator_switch
.type emulator_switch, @function
.p2align 4
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size emulator_switch, .-emulator_switch
.popsection
)");
#endif

// `last`: `from` is never resumed
void change(Context& from, Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.stack, to.size);
#endif
  (void)last;
#if defined(EMULATOR_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  emulator_switch(&from.top, to.top);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void prepare(Context& c, char* stack, std::size_t size, void (*entry)()) {
  c.stack = stack, c.size = size, c.fake = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(stack + size - 16384, 16384);   // fibers leave through functions that never return
#if defined(EMULATOR_UCONTEXT)
  getcontext(&c.registers);
  c.registers.uc_stack.ss_sp = stack;
  c.registers.uc_stack.ss_size = size;
  c.registers.uc_link = nullptr;
  makecontext(&c.registers, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;                   // in place of a return address; unwinding ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; k++) *--top = nullptr;
  c.top = top;
#endif
}

// Memory for stacks, kept between launches: the first use of its pages costs more than the rest of a small launch. Each
// operating-system thread borrows a piece of it.
struct Pool {
  struct Piece { char* data; std::size_t bytes; };
  std::mutex lock;
  std::vector<Piece> free;

  Piece take(std::size_t bytes) {
    {
      std::lock_guard<std::mutex> guard(lock);
      for (std::size_t i = 0; i < free.size(); i++) {
        if (free[i].bytes < bytes) continue;
        Piece found = free[i];
        free.erase(free.begin() + (std::ptrdiff_t)i);
        return found;
      }
    }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_NOHUGEPAGE)
    madvise(data, bytes, MADV_NOHUGEPAGE);   // most stacks use only a page or two
#endif
    return {(char*)data, bytes};
  }
  void give(Piece piece) {
    std::lock_guard<std::mutex> guard(lock);
    free.push_back(piece);
  }
};
Pool& pool() {
  static Pool* shared = new Pool;     // never destroyed: threads may outlive this library
  return *shared;
}

// ---- threads, warps, a block ----------------------------------------------------------------------------------------
const char* name_of(Place p) {
  static const char* const names[] = {
    "is running", "has returned", "is at __syncthreads", "is at warps_barrier", "is at __syncwarp", "is at __shfl_sync",
    "is at __shfl_xor_sync", "is at __shfl_down_sync", "is at __all_sync", "is at __any_sync", "is at __ballot_sync",
  };
  return names[p];
}

struct Copy { void* to; const void* from; unsigned bytes; };

struct Warp {
  unsigned there, returned, waiting;  // one bit per lane
};

struct Fiber : Here {
  Context context;
  Warp* warp;
  Place place;
  // of a warp-wide operation: what this lane contributes, and what it receives
  unsigned mask, source;
  std::uint64_t value, result;
  std::vector<Copy> copies;           // that have not completed yet
};

// A queue of fibers that can run; it has room for all fibers.
struct Ring {
  std::vector<Fiber*> fibers;
  unsigned head = 0, tail = 0;

  bool empty() const { return head == tail; }
  unsigned size() const { return tail - head; }
  Fiber*& operator[](unsigned i) { return fibers[(head + i) & ((unsigned)fibers.size() - 1)]; }
  void push(Fiber& f) { fibers[tail++ & (fibers.size() - 1)] = &f; }
  Fiber* pop() { return fibers[head++ & (fibers.size() - 1)]; }
};

// Runs one block after the other on one thread of the operating system.
struct Scheduler {
  const Launch& launch;
  unsigned index = 0;                 // of the block
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  char* shared = nullptr;             // memory of the block
  unsigned arrived = 0, together = 0;   // threads at __syncthreads, at warps_barrier
  std::string error;

  explicit Scheduler(const Launch& l)
      : launch(l), fibers(l.block), warps((l.block + WARP - 1) / WARP) {
    unsigned capacity = 1;
    while (capacity < fibers.size()) capacity *= 2;
    ready.fibers.resize(capacity), behind.fibers.resize(capacity);
    bytes = (l.shared_bytes + 2 * GUARD + 1023) / 1024 * 1024;
    arena = (char*)std::aligned_alloc(1024, bytes);
    if (!arena) throw std::bad_alloc();
    shared = arena + GUARD;
    stacks = pool().take((fibers.size() + 1) * STACK);   // the first catches overruns of the second
    for (unsigned t = 0; t < l.block; t++) {
      Here& here = fibers[t];
      here = {{t, 0, 0}, {}, {l.block, 1, 1}, {l.grid, 1, 1}, t % WARP, shared};
      fibers[t].warp = &warps[t / WARP];
    }
  }
  ~Scheduler() {
    ASAN_UNPOISON_MEMORY_REGION(arena, bytes);
    std::free(arena);
    if (!error.empty()) {             // stopped fibers leave ASan's marks behind, or may have overrun their stacks
      ASAN_UNPOISON_MEMORY_REGION(stacks.data, stacks.bytes);
      for (std::size_t i = 0; i < fibers.size(); i++) {
        if (*far_end(i)) *far_end(i) = 0;
      }
    }
    pool().give(stacks);
  }
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  bool run(unsigned number);          // false: `error` says why
  void wake(Fiber& f) {
    f.place = RUNNING;
    (f.warp == held ? behind : ready).push(f);
  }
  void give_way();                    // to any fiber that can run; returns when this one is awake and its turn comes
  [[noreturn]] void leave();          // for good
  unsigned random(unsigned below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (unsigned)((state >> 32) * below >> 32);
  }
  std::string describe(const Fiber& f, const std::string& what) const {
    return std::string(launch.name) + ": block " + std::to_string(index) + ", thread " + std::to_string(f.thread.x) +
           ": " + what;
  }

 private:
  Context main;
  std::vector<Warp> warps;
  unsigned alive = 0;                 // threads that have not returned
  Ring ready, behind;                 // behind: of the warp that is held back
  const Warp* held = nullptr;         // runs only when no other warp can
  char* arena = nullptr;              // shared memory, and the guards around it
  std::size_t bytes = 0;
  Pool::Piece stacks{};
  std::uint64_t state = 1;
  bool hurried = false;               // prefer fibers woken last, so that some warps run far ahead of the others

  char* stack(std::size_t i) const { return stacks.data + (i + 1) * STACK; }
  // of a stack: zero until something overruns it
  volatile std::uint64_t* far_end(std::size_t i) const { return (volatile std::uint64_t*)stack(i); }
  Fiber* pick();
  std::string deadlock() const;
  void begin();
  void end();
  friend void enter();
};

thread_local Scheduler* scheduler = nullptr;

__attribute__((noinline)) std::string call() {
  Scheduler& s = *scheduler;
  try {
    s.launch.call(s.launch.kernel, s.launch.plan);
    return {};
  } catch (const Error& e) {
    return e.text;
  } catch (const std::exception& e) {
    return s.describe(*s.current, std::string("exception: ") + e.what());
  } catch (...) {
    return s.describe(*s.current, "an exception");
  }
}
__attribute__((noinline)) void call_and_report() {
  std::string error = call();
  if (!error.empty()) scheduler->error.swap(error);
}
#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize_address))
#endif
void enter() {
#if defined(__SANITIZE_ADDRESS__)
  Context& main = scheduler->main;
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (!main.stack) main.stack = stack, main.size = size;   // the first fiber was started from there
#endif
  call_and_report();
  scheduler->leave();
}

Fiber* Scheduler::pick() {
  Ring& ring = ready.empty() ? behind : ready;
  if (ring.empty()) return nullptr;
  if (launch.seed) {
    unsigned count = ring.size();
    std::swap(ring[count - 1 - random(hurried && count > WARP ? WARP : count)], ring[0]);
  }
  return ring.pop();
}

void Scheduler::give_way() {
  Fiber* me = current;
  Fiber* next = pick();
  if (next == me) return;
  if (!next) throw Error{deadlock()};
  current = next;
  change(me->context, next->context);
}

void Scheduler::leave() {
  Fiber& me = *current;
  if (error.empty()) {
    me.place = RETURNED;
    me.warp->returned |= 1u << me.lane;
    if (*far_end((std::size_t)(&me - fibers.data()))) error = describe(me, "the emulator's stack overflowed");
    if (--alive == 0) end();
  }
  Fiber* next = error.empty() ? pick() : nullptr;
  if (next) {
    current = next;
    change(me.context, next->context, true);
  }
  if (error.empty() && alive) error = deadlock();
  change(me.context, main, true);
  std::abort();
}

void Scheduler::end() {
#if !defined(__SANITIZE_ADDRESS__)
  const char* behind_it = shared + launch.shared_bytes;
  for (std::size_t i = 0; i < GUARD && error.empty(); i++) {
    if (behind_it[i] == '\xff') continue;
    error = std::string(launch.name) + ": block " + std::to_string(index) + ": wrote beyond its shared memory of " +
            std::to_string(launch.shared_bytes) + " bytes, at byte " + std::to_string(launch.shared_bytes + i);
  }
#endif
}

// Called when no fiber can run: says which thread waits, and for which.
std::string Scheduler::deadlock() const {
  for (const Fiber& f : fibers) {
    if (f.place <= RETURNED) continue;
    bool in_warp = f.place > WARPS_BARRIER;
    const Fiber* first = in_warp ? &f - f.lane : fibers.data();
    const Fiber* last = in_warp ? first + WARP : f.place == WARPS_BARRIER ? first + f.mask : first + launch.block;
    for (const Fiber* g = first; g != std::min(last, fibers.data() + launch.block); g++) {
      if (in_warp && !(f.mask >> g->lane & 1)) continue;
      if (g->place == f.place && (!in_warp || g->mask == f.mask)) continue;
      return describe(f, std::string(name_of(f.place)) + " and would wait for ever: thread " +
                             std::to_string(g->thread.x) + " " + name_of(g->place) +
                             (g->place == f.place ? ", with another mask" : ""));
    }
  }
  return std::string(launch.name) + ": deadlock";
}

void Scheduler::begin() {
  std::uint64_t mixed = (launch.seed * 0x9e3779b97f4a7c15ull) ^ ((index + 1) * 0xbf58476d1ce4e5b9ull);
  state = mixed ? mixed : 1;
  for (int k = 0; k < 4; k++) random(1);
  hurried = launch.seed && random(2);
  main.stack = nullptr;
  held = launch.seed % 2 && warps.size() > 1 ? &warps[random((unsigned)warps.size())] : nullptr;
  for (Ring* ring : {&ready, &behind}) ring->head = ring->tail = 0;
  arrived = together = 0;
  alive = launch.block;
  ASAN_UNPOISON_MEMORY_REGION(arena, bytes);
  std::memset(arena, 0xff, bytes);
  ASAN_POISON_MEMORY_REGION(arena, GUARD);
  ASAN_POISON_MEMORY_REGION(shared + launch.shared_bytes, bytes - GUARD - launch.shared_bytes);
  for (unsigned w = 0; w < warps.size(); w++) {
    unsigned lanes = std::min(launch.block - w * WARP, WARP);
    warps[w] = {lanes < WARP ? (1u << lanes) - 1 : ~0u, 0, 0};
  }
  for (std::size_t i = 0; i < fibers.size(); i++) {
    fibers[i].block = {index, 0, 0};
    fibers[i].copies.clear();
    // Stacks start at different cache lines of their pages; otherwise they would compete for the same few cache sets.
    prepare(fibers[i].context, stack(i), STACK - i * 576 % 8192 / 64 * 64, enter);
    wake(fibers[i]);
  }
}

bool Scheduler::run(unsigned number) {
  scheduler = this;
  index = number;
  begin();
  current = pick();
  change(main, current->context);
  scheduler = nullptr;
  return error.empty();
}

// ---- what a whole launch does ---------------------------------------------------------------------------------------
std::string run(const Launch& l) {
  std::string name = std::string(l.name) + ": ";
  if (l.grid == 0 || l.block == 0 || l.block > 1024)
    return name + std::to_string(l.grid) + " blocks of " + std::to_string(l.block) + " threads cannot be launched";

  std::vector<unsigned> order(l.grid);
  std::iota(order.begin(), order.end(), 0u);
  std::uint64_t state = l.seed * 0x9e3779b97f4a7c15ull;
  for (unsigned i = l.grid; l.seed && i > 1; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i - 1], order[(state >> 32) % i]);
  }

  std::atomic<unsigned> next(0);
  std::atomic<bool> failed(false);
  std::mutex lock;
  std::string error;
  unsigned of = l.grid;               // the first block that failed; those before it have all started
  auto report = [&](unsigned i, const std::string& text) {
    std::lock_guard<std::mutex> guard(lock);
    if (error.empty() || i < of) error = text, of = i;
    failed = true;
  };
  auto work = [&] {
    try {
      Scheduler s(l);
      for (unsigned i; !failed && (i = next++) < l.grid;) {
        if (!s.run(order[i])) report(i, s.error);
      }
    } catch (const std::exception& e) {
      report(l.grid, name + e.what());
    }
  };
  std::vector<std::thread> others;
  unsigned threads = std::min((unsigned)std::max(l.threads, 1), l.grid);
  for (unsigned t = 1; t < threads; t++) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  return error;
}

// ---- what a kernel asks for -----------------------------------------------------------------------------------------
struct OnFibers final : Runtime {
  const Here& here() override { return *scheduler->current; }

  void syncthreads() override {
    Scheduler& s = *scheduler;
    s.current->place = SYNCTHREADS;
    if (++s.arrived == s.launch.block) {
      s.arrived = 0;
      for (Fiber& f : s.fibers) s.wake(f);
    }
    s.give_way();
  }

  void warps_barrier(unsigned threads) override {
    Scheduler& s = *scheduler;
    Fiber& me = *s.current;
    if (me.thread.x >= threads || threads > s.launch.block)
      fail("is at a barrier of %u warps, but is in none of these, or the block has fewer", threads / WARP);
    me.place = WARPS_BARRIER, me.mask = threads;
    if (++s.together == threads) {
      s.together = 0;
      for (unsigned t = 0; t < threads; t++) s.wake(s.fibers[t]);
    }
    s.give_way();
  }

  std::uint64_t meet(Place place, unsigned mask, std::uint64_t value, unsigned source) override {
    Scheduler& s = *scheduler;
    Fiber& me = *s.current;
    Warp& w = *me.warp;
    Fiber* lanes = &me - me.lane;
    unsigned group = mask & w.there;
    me.place = place;
    if (!(mask >> me.lane & 1))
      fail("%s with mask %08x, which excludes its own lane, %u", name_of(place), mask, me.lane);
    if (group & w.returned)
      fail("%s with mask %08x, but lane %d has returned", name_of(place), mask, __builtin_ctz(group & w.returned));
    if (!(group >> source & 1)) fail("%s with mask %08x, but reads lane %u", name_of(place), mask, source);
    me.mask = mask, me.source = source, me.value = value;
    w.waiting |= 1u << me.lane;
    if ((w.waiting & group) == group) {
      unsigned votes = 0;
      for (unsigned rest = group; rest; rest &= rest - 1) {
        unsigned lane = (unsigned)__builtin_ctz(rest);
        const Fiber& f = lanes[lane];
        if (f.place != place || (f.mask & w.there) != group)
          fail("%s with mask %08x, but lane %u %s with mask %08x", name_of(place), mask, lane, name_of(f.place), f.mask);
        votes |= (f.value != 0 ? 1u : 0u) << lane;
      }
      w.waiting &= ~group;
      for (unsigned rest = group; rest; rest &= rest - 1) {
        Fiber& f = lanes[__builtin_ctz(rest)];
        f.result = place == SHFL || place == SHFL_XOR || place == SHFL_DOWN ? lanes[f.source].value : votes;
        s.wake(f);
      }
    }
    s.give_way();
    return me.result;
  }

  // Under seed 0 a copy completes when the thread waits for it, the last possible moment, so that reading without waiting
  // finds NaNs. Under other seeds it completes either now or then, at random, so that neither the old contents nor the
  // source may be used in between.
  void copy_async(void* to_shared, const void* from_global, unsigned bytes) override {
    Scheduler& s = *scheduler;
    std::ptrdiff_t offset = (char*)to_shared - s.shared;
    if (offset < 0 || (std::size_t)offset + bytes > s.launch.shared_bytes)
      fail("copies asynchronously to %p, which is not in the shared memory of its block", to_shared);
    const volatile char* source = (const volatile char*)from_global;
    (void)source[0], (void)source[bytes - 1];   // so that ASan reports it here, not where the thread waits
    Copy copy = {to_shared, from_global, bytes};
    if (s.launch.seed && s.random(2)) land(copy);
    else s.current->copies.push_back(copy);
  }
  void wait_copies() override {
    Scheduler& s = *scheduler;
    Fiber& me = *s.current;
    for (const Copy& c : me.copies) land(c);
    me.copies.clear();
    if (s.launch.seed) {              // other threads may run first
      s.wake(me);
      s.give_way();
    }
  }

  void fail(const char* format, ...) override {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Error{scheduler->describe(*scheduler->current, text)};
  }

 private:
  static void land(const Copy& c) { std::memcpy(c.to, c.from, c.bytes); }
};

}  // namespace

extern "C" Runtime* emulator_runtime() {
  static OnFibers* only = new OnFibers;
  return only;
}

// Runs a kernel to completion. `call`: emulator_call of the kernel's library. `seed`: of the schedule; 0: in order.
// `threads`: operating-system threads, which share the blocks. Returns null, or an error message that is valid until this
// thread's next launch.
extern "C" const char* emulator_launch(void (*call)(void (*)(), const void*), void (*kernel)(), const char* name,
                                       const void* plan, unsigned grid, unsigned block, std::size_t shared_bytes,
                                       unsigned seed, int threads) {
  static thread_local std::string error;
  error = run({name, call, kernel, plan, grid, block, shared_bytes, seed, threads});
  return error.empty() ? nullptr : error.c_str();
}
