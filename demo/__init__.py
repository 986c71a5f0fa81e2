"""The demo: DPO for positive sentiment on a real model and real human ratings, through `dpo_kernels`.

Run it with `python -m demo` (or `make demo`); `python -m demo --help` lists what can be changed.
Importing this package does nothing.
"""
