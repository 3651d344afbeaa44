"""Recipes for NVIDIA's profilers, and a table of the kernels that take the time. See README.md."""
