"""Benchmarks: what the program costs, measured on the running program. Not part of the package."""
