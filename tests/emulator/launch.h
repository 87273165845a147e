// The interface to the kernels of a CUDA source compiled with emulator.h. Included after the source, which defines kl::Plan,
// the only argument of every kernel, or names another type by KL_ARGUMENT. tests/emulator/device.py calls it through ctypes.
#pragma once
#if !defined(KL_ARGUMENT)
#define KL_ARGUMENT Plan
#endif

namespace emulator {

typedef kl::KL_ARGUMENT Argument;

inline void run_kernel(const Launch& l) {
  reinterpret_cast<void (*)(const Argument)>(l.kernel)(*static_cast<const Argument*>(l.plan));
}

}  // namespace emulator

// Runs a kernel to completion. `seed`: of the schedule; 0: in order. `threads`: operating-system threads, which share the
// blocks. Returns null, or an error message that is valid until this thread's next launch.
extern "C" const char* emulator_launch(void (*kernel)(const emulator::Argument), const char* name, const void* plan,
                                       unsigned grid, unsigned block, std::size_t shared_bytes, unsigned seed,
                                       int threads) {
  static thread_local std::string error;
  error = emulator::run({name, emulator::run_kernel, reinterpret_cast<void (*)()>(kernel), plan, grid, block,
                         shared_bytes, seed, threads});
  return error.empty() ? nullptr : error.c_str();
}

// Makes this module use another module's pool of stacks, or returns its own. Otherwise every module would keep megabytes.
extern "C" emulator::Pool* emulator_pool(emulator::Pool* other) {
  if (other) emulator::pool() = other;
  return emulator::pool();
}

extern "C" std::size_t emulator_plan_size() { return sizeof(emulator::Argument); }
