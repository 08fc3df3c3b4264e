"""Rows of the table over CUDA kernels of our own, in shared libraries that CMake builds and ctypes loads."""
