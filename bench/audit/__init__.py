"""The static audit: every kernel compiled for GPUs that need not be there, and judged by its machine code.

It may import `bench.harness` (tables, rooflines, files) and `fastjepa.kernels`.
"""
