"""Scripts to begin from, tiny by default: ``python -m examples.trl_dpo`` and ``python -m examples.plain_loop``."""
