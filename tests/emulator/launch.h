// The door to the kernels of a CUDA source compiled with emulator.h: included after the source, which defines kl::Plan,
// the one argument of every kernel. Called through ctypes by tests/emulator/device.py.
#pragma once

namespace emulator {

inline void run_kernel(const Launch& l) {
  reinterpret_cast<void (*)(const kl::Plan)>(l.kernel)(*static_cast<const kl::Plan*>(l.plan));
}

#if defined(__ELF__)
// The linker marks the ends of a section that has a name fit for C; of one that does not exist, with null.
#define EMULATOR_EACH_CLUSTER(f) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(16)
#define EMULATOR_DECLARE(n)                                                                       \
  extern "C" __attribute__((weak, visibility("hidden"))) const char __start_emulator_cluster_##n[]; \
  extern "C" __attribute__((weak, visibility("hidden"))) const char __stop_emulator_cluster_##n[];
EMULATOR_EACH_CLUSTER(EMULATOR_DECLARE)
inline unsigned cluster_of(void (*kernel)(const kl::Plan)) {
  std::uintptr_t at = reinterpret_cast<std::uintptr_t>(kernel);
#define EMULATOR_LOOK(n) \
  if (at >= (std::uintptr_t)__start_emulator_cluster_##n && at < (std::uintptr_t)__stop_emulator_cluster_##n) return n;
  EMULATOR_EACH_CLUSTER(EMULATOR_LOOK)
  return 1;
}
#else
inline unsigned cluster_of(void (*)(const kl::Plan)) { return 1; }
#endif

}  // namespace emulator

// Runs a kernel to its end. `cluster`: blocks a cluster; 0 takes what __cluster_dims__ says of the kernel. `seed`: of
// the schedule, 0 in order. `threads`: of the operating system, among which clusters are shared out. Returns null, or
// what went wrong, valid until this thread's next launch.
extern "C" const char* emulator_launch(void (*kernel)(const kl::Plan), const char* name, const kl::Plan* plan,
                                       unsigned grid, unsigned block, unsigned cluster, std::size_t shared_bytes,
                                       unsigned seed, int threads) {
  static thread_local std::string error;
  error = emulator::run({name, emulator::run_kernel, reinterpret_cast<void (*)()>(kernel), plan, grid, block,
                         cluster ? cluster : emulator::cluster_of(kernel), shared_bytes, seed, threads});
  return error.empty() ? nullptr : error.c_str();
}

// Has this module use another's pool of stacks, or returns its own; else every module would keep megabytes.
extern "C" emulator::Pool* emulator_pool(emulator::Pool* other) {
  if (other) emulator::pool() = other;
  return emulator::pool();
}

extern "C" unsigned emulator_cluster(void (*kernel)(const kl::Plan)) { return emulator::cluster_of(kernel); }

extern "C" std::size_t emulator_plan_size() { return sizeof(kl::Plan); }
