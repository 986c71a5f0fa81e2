"""Triton kernels. The only place that imports triton; imported at its first use."""
