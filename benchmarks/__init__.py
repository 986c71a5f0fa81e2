"""The benchmark suite; see README.md in this folder."""
