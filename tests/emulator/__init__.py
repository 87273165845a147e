"""CUDA without a GPU: ``emulator.h`` runs the kernels on the CPU, ``device.py`` stands in for CuPy and NVRTC."""
