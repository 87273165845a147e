// The interface to the kernels of a CUDA source compiled with emulator.h. Included after the source, which defines kl::Plan,
// the only argument of every kernel, or names another type by KL_ARGUMENT. tests/emulator/device.py calls it through ctypes.
#pragma once
#if !defined(KL_ARGUMENT)
#define KL_ARGUMENT Plan
#endif

extern "C" void emulator_connect(emulator::Runtime* runtime) { emulator::runtime = runtime; }

// Calls a kernel for one CUDA thread.
extern "C" void emulator_call(void (*kernel)(), const void* plan) {
  typedef kl::KL_ARGUMENT Argument;
  reinterpret_cast<void (*)(const Argument)>(kernel)(*static_cast<const Argument*>(plan));
}

extern "C" std::size_t emulator_plan_size() { return sizeof(kl::KL_ARGUMENT); }
