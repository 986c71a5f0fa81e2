"""Tools for testing the CUDA kernels where there is no GPU: a judge of their machine code, and threads on the CPU."""
