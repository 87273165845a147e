// The threads of a call: how many there are, where they come from, their floating-point state, and how they stop early. Used by
// kl_batch.h and kl_partial.h. The number of threads changes no bit, and a lack of threads does not end the process.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#elif !defined(KLCORE_NO_OPENMP)
#error "klcore needs a compiler with OpenMP (gcc or clang with -fopenmp, MSVC with /openmp). KLCORE_NO_OPENMP=1 builds it for one thread."
#endif
#if defined(__unix__) || defined(__APPLE__)
#define KL_PTHREADS 1
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif
#if defined(_M_X64)
#include <immintrin.h>
#endif

#include "kl_isa.h"

namespace kl {

constexpr i64 SERIAL = 32768;         // with fewer classes a second thread costs more than it gains

// The deepest calls take 70 KiB of stack, most of it arrays that gcc vectorises because they are local. The rest is for Python's
// signal handlers.
constexpr size_t STACK = 128 * 1024;

// ---- threads and stacks ------------------------------------------------------------------------------------------------

// A thread started by klcore
class Thread {
 public:
  typedef void* (*Run)(void*);        // must not throw
  bool start(Run run, void* argument, size_t stack) {
#if defined(KL_PTHREADS)
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    if (stack) pthread_attr_setstacksize(&attributes, stack);   // if this size is refused, the system's default applies
    started = !pthread_create(&thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
#else
    (void)stack;
    try {
      thread = std::thread(run, argument);
      started = true;
    } catch (...) {
    }
#endif
    return started;
  }
  ~Thread() {
    if (!started) return;
#if defined(KL_PTHREADS)
    pthread_join(thread, nullptr);
#else
    thread.join();
#endif
  }

 private:
  bool started = false;
#if defined(KL_PTHREADS)
  pthread_t thread;
#else
  std::thread thread;
#endif
};

// Whether the calling thread has STACK bytes left: Python's threads may have as little as 32 KiB in all.
inline bool has_stack() {
#if defined(KL_PTHREADS)
  static thread_local char *low = nullptr, *high = nullptr;
  char* here = (char*)__builtin_frame_address(0);
  if (!high) {
#if defined(__APPLE__)
    high = (char*)pthread_get_stackaddr_np(pthread_self());
    low = high - pthread_get_stacksize_np(pthread_self());
#else
    pthread_attr_t attributes;
    void* address = nullptr;
    size_t size = 0;
    high = here;
    if (!pthread_getattr_np(pthread_self(), &attributes)) {
      if (!pthread_attr_getstack(&attributes, &address, &size)) low = (char*)address, high = low + size;
      pthread_attr_destroy(&attributes);
    }
#if defined(__linux__) && !defined(__GLIBC__)   // musl reports only what the main thread has touched so far
    rlimit most;
    if (getpid() == (pid_t)syscall(SYS_gettid) && !getrlimit(RLIMIT_STACK, &most))
      low = most.rlim_cur > (rlim_t)(std::uintptr_t)high ? nullptr : std::min(low, high - most.rlim_cur);
#endif
#endif
  }
  return here < low || here >= high || (size_t)(here - low) >= STACK;   // outside: the program has switched to another stack
#else
  return true;
#endif
}

// The stack size that OpenMP was told to give its threads, in bytes; 0: none
inline size_t openmp_stack() {
  static const size_t found = [] {
    for (const char* name : {"OMP_STACKSIZE", "GOMP_STACKSIZE", "KMP_STACKSIZE"}) {
      const char *text = std::getenv(name), *units = "bkmg";
      char* unit = nullptr;
      double number = text ? std::strtod(text, &unit) : 0;
      if (!(number > 0 && number < 1e12)) continue;
      while (*unit == ' ') unit++;
      const char* at = std::strchr(units, *unit ? *unit | 32 : 'k');
      if (at && *at) return (size_t)(number * (double)(1ull << (10 * (at - units))));
    }
    return (size_t)0;
  }();
  return found;
}

inline std::atomic<bool>& forked() {
  static std::atomic<bool> flag(false);
  return flag;
}
// Whether this process is a child of fork() that has not called exec since: another library may have used the pool before.
inline bool born_by_fork() {
#if defined(__linux__)
  char text[512] = "";
  unsigned flags = 0;
  if (FILE* file = std::fopen("/proc/self/stat", "r")) {
    size_t size = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    text[size] = 0;
  }
  const char* behind = std::strrchr(text, ')');   // the end of the program's name
  if (behind) std::sscanf(behind + 1, " %*c %*d %*d %*d %*d %*d %u", &flags);
  return flags & 0x40;                // PF_FORKNOEXEC
#else
  return false;
#endif
}
inline void watch_forks() {
  forked() = born_by_fork();
#if defined(KL_PTHREADS)
  pthread_atfork(nullptr, nullptr, [] { forked() = true; });
#endif
}

// Whether OpenMP's threads do the work; otherwise threads are started for each call. A child of fork() inherits the memory of
// OpenMP's pool without its threads, and GNU's runtime would wait for them forever.
inline bool by_openmp() {
#if defined(_OPENMP)
  return !forked() && !(openmp_stack() && openmp_stack() < STACK);
#else
  return false;
#endif
}

// ---- how many ----------------------------------------------------------------------------------------------------------

// The number of processors that tests pretend there are; 0: the real number
inline std::atomic<int>& pretended_processors() {
  static std::atomic<int> n(0);
  return n;
}

// The number of threads for so many classes, at most `wanted`. More threads than processors gain nothing, and each takes memory.
inline int most_threads(int wanted, i64 classes) {
#if defined(_OPENMP)
  if (wanted <= 1 || classes <= SERIAL) return 1;
  int pretended = pretended_processors(), processors = pretended ? pretended : omp_get_num_procs();
  return (int)std::min<i64>(std::min(wanted, processors), classes / SERIAL + 1);
#else
  (void)wanted, (void)classes;
  return 1;
#endif
}

// How many of `n` threads the system can provide: they are started, wait for the last one, and end.
inline int threads_to_be_had(int n) {
  struct Gate {
    std::mutex mutex;
    std::condition_variable opened;
    bool open = false;
    static void* wait(void* gate) {
      Gate& g = *(Gate*)gate;
      std::unique_lock<std::mutex> lock(g.mutex);
      g.opened.wait(lock, [&] { return g.open; });
      return nullptr;
    }
  } gate;
  std::unique_ptr<Thread[]> made(new Thread[(size_t)n]);
  int count = 0;
  while (count < n && made[(size_t)count].start(Gate::wait, &gate, openmp_stack())) count++;
  void* room = std::malloc(65536 + 4096 * (size_t)count);   // what OpenMP allocates besides
  std::free(room);
  {
    std::lock_guard<std::mutex> lock(gate.mutex);
    gate.open = true;
  }
  gate.opened.notify_all();
  return room ? count : 0;
}

// The size of the team that OpenMP keeps for the calling thread. It only grows: if a smaller team is requested, OpenMP ends the
// other threads, and they have to be started again.
inline int& team() {
  static thread_local int n = 1;
  return n;
}

// At most `wanted` threads, including the calling one. OpenMP ends the process if it cannot start a thread (RLIMIT_AS,
// RLIMIT_NPROC, a pids cgroup), so as many threads are started as a trial. The calling thread exists already, which leaves one
// thread for others.
inline int granted(int wanted) {
#if defined(_OPENMP)
  static std::mutex making;
  if (wanted <= 1 || !by_openmp()) return wanted;
  if (omp_in_parallel()) return 1;    // a signal handler has called klcore within a call
  if (wanted > team()) {
    std::lock_guard<std::mutex> lock(making);
    int found = threads_to_be_had(wanted);
    if (found > team()) {
#pragma omp parallel num_threads(found)
      {}                              // started now, before another thread of this process takes their place
      team() = found;
    }
    wanted = std::min(wanted, team());
  }
#endif
  return wanted;
}

// ---- how they compute, and stop ------------------------------------------------------------------------------------------

// While an Arithmetic lives, its thread computes as numerics v2 requires: round to nearest, keep subnormal numbers. The program
// may have chosen otherwise (torch.set_flush_denormal, a library linked with -ffast-math), and threads inherit that.
struct Arithmetic {
  Arithmetic(const Arithmetic&) = delete;
#if defined(__SSE2__) || defined(_M_X64)
  static constexpr unsigned ORDINARY = 0x1f80, MODES = 0xffc0;   // the other bits are flags
  unsigned found = _mm_getcsr();
  Arithmetic() {
    if ((found & MODES) != ORDINARY) _mm_setcsr(ORDINARY);
  }
  ~Arithmetic() {
    if ((found & MODES) != ORDINARY) _mm_setcsr(found);
  }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
  std::uint64_t found;
  Arithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(found));
    if (found) asm volatile("msr fpcr, %0" : : "r"((std::uint64_t)0));
  }
  ~Arithmetic() {
    if (found) asm volatile("msr fpcr, %0" : : "r"(found));
  }
#else
  Arithmetic() {}
#endif
};

// Returns whether the call should end early; called by the thread that made the call. nullptr: never.
typedef int (*Ask)();

// Stops a call early, if `ask`, which is called every tenth of a second, says so
struct Watch {
  static constexpr std::chrono::milliseconds APART{100};
  static constexpr i64 STEP = 65536;  // classes between two looks at the clock: about 20 microseconds

  Ask ask;
  std::atomic<bool> stopped{false};
  std::chrono::steady_clock::time_point next{};
  alignas(64) i64 left = STEP;        // until the next look at the clock; not in the cache line of `stopped`, which all read
  explicit Watch(Ask how) : ask(how) {}

  void look() {
    if (!ask || stopped) return;      // once an exception is set, do not ask again
    auto now = std::chrono::steady_clock::now();
    if (next == std::chrono::steady_clock::time_point{}) next = now + APART;
    if (now < next) return;
    stopped = ask() != 0;
    next = std::chrono::steady_clock::now() + APART;   // after the handler, however long that took
  }
};

// One thread of a call.
struct Worker {
  Watch& watch;
  int number;                         // 0: the one that looks at the clock
  Arithmetic arithmetic;
  Worker(Watch& w, int k) : watch(w), number(k) {}

  // Whether to stop; called before so many classes are computed.
  bool stops(i64 classes) {
    if (number == 0 && (watch.left -= classes) < 0) {
      watch.left = Watch::STEP;
      watch.look();
    }
    return watch.stopped.load(std::memory_order_relaxed);
  }
};

// The items of a call; threads take `share` of them at a time
template <class Work> struct Items {
  Watch& watch;
  i64 items, share;
  bool stream;
  Work& work;
  std::atomic<i64> next{0};
  std::atomic<int> helpers{0}, finished{0};

  void take(int number) {
    Worker worker(watch, number);
    for (i64 i; (i = next.fetch_add(share)) < items;)
      for (i64 end = std::min(items, i + share); i < end && !worker.stops(0); i++) work(i, worker);
    if (stream) stream_end();
    if (number > 0) finished++;
  }
  // The first thread has no items left, but others may have: it goes on looking.
  void wait_for(int others) {
    for (int k = 0; watch.ask && !watch.stopped && finished < others; k++) {
      if (k < 1000) std::this_thread::yield();
      else std::this_thread::sleep_for(std::chrono::milliseconds(1));
      watch.look();
    }
  }
  static void* help(void* all) {
    Items& s = *(Items*)all;
    s.take(++s.helpers);
    return nullptr;
  }
};

// Runs work(item, worker) for all items on so many threads, which take `share` items at a time. Ends early, leaving items out, if
// the watch says so. `work` must not throw.
template <class Work> void each(Watch& watch, int threads, i64 items, i64 share, bool stream, Work work) {
  Items<Work> all{watch, items, share, stream, work};
  if (threads <= 1) return all.take(0);
#if defined(_OPENMP)
  if (by_openmp()) {
#pragma omp parallel num_threads(team())
    {
      int k = omp_get_thread_num();
      if (k < threads) all.take(k);
      if (k == 0) all.wait_for(std::min(threads, omp_get_num_threads()) - 1);
    }
    return;
  }
#endif
  std::unique_ptr<Thread[]> others(new (std::nothrow) Thread[(size_t)threads - 1]);
  int count = 0;
  while (others && count < threads - 1 && others[(size_t)count].start(Items<Work>::help, &all, 2 * STACK)) count++;
  all.take(0);
  all.wait_for(count);
}

// Runs `work(watch)`. Returns 0, or 1 if memory ran out, or 2 if it was stopped early. Uses another thread if the stack of this
// one is too small.
template <class Work> int guarded(Ask ask, Work work) noexcept {
  Watch watch(ask);
  auto caught = [&] {
    try {
      Arithmetic arithmetic;
      work(watch);
    } catch (...) {
      return 1;
    }
    return watch.stopped ? 2 : 0;
  };
  if (has_stack()) return caught();
  try {
    std::packaged_task<int()> task(caught);
    std::future<int> result = task.get_future();
    watch.ask = nullptr;              // this thread asks, the other one works
    Thread thread;
    if (!thread.start([](void* t) { return (*(std::packaged_task<int()>*)t)(), (void*)nullptr; }, &task, 2 * STACK)) return 1;
    while (result.wait_for(Watch::APART) != std::future_status::ready)
      if (ask && !watch.stopped) watch.stopped = ask();
    int found = result.get();
    return found == 1 ? 1 : watch.stopped ? 2 : 0;   // it may have been stopped after the work was done
  } catch (...) {
    return 1;
  }
}

}  // namespace kl
