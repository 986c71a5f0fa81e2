"""Scripts to begin from, tiny by default: ``python -m examples.trl_dpo``, ``python -m examples.plain_loop``."""
