"""The model in plain PyTorch, which is the eager reference: networks, losses, JEPA, unroll and training step.

Anyone can read it, run it on a CPU and trust it. It may import `fastjepa.kernels` (of those only what needs no Triton,
until a fused path is asked for), `files`, `profiling` and `optional_packages`, and nothing else of the package.
"""
