"""The model in plain PyTorch, which is the eager reference: networks, losses, JEPA, unroll and training step.

Anyone can read it, run it on a CPU and trust it. Of `fastjepa.kernels` it imports only what needs no Triton: the ops'
definitions and the losses' closed form. Otherwise it may import `files`, `profiling` and `optional_packages`.
"""
