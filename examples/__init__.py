"""Scripts to begin from, tiny by default.

``python -m examples.trl_dpo`` and ``python -m examples.plain_loop`` need one process, and
``torchrun --nproc-per-node 4 -m examples.tensor_parallel_dpo`` four.
"""
