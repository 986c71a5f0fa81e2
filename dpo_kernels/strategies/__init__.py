"""The algorithms: in which order the row operations run, and how much of the logits they hold.

A strategy is given its kernels, the problem and the schedule. ``planning/tables.py`` says when each can run.
"""
