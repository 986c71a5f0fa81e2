"""Tests of what only a GPU shows, each of which also runs on the CPU as far as it can."""
