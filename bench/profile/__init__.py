"""Scripts for NVIDIA's profilers, what they watch, and a table of the kernels that take the time (README.md).

It may import `bench.harness`, `bench.step` with its recipe and options, and `fastjepa.profiling`.
"""
