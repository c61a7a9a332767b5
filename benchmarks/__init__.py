"""Measurements: each module is a command that writes its figures to benchmarks/results/."""
