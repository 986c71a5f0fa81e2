"""The strategies: in which order the row operations run, and how many logits they hold.

The functions of a strategy take the kernels, the problem and the schedule. ``planning/tables.py`` says when each can
run.
"""
