"""Tools for testing Triton kernels where there is no GPU; importing this package imports no triton."""
