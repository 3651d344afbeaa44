"""Measure and check: the static audit of every kernel, and the benchmark harness with its cases. See README.md."""
