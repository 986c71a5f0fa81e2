"""Strategies: in which order, and holding how much, the kernels are run. They are given kernels and the loss."""
