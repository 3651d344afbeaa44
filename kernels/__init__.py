"""Fused Triton ops, one folder each; `launch` is the only file that knows whether Triton compiles or interprets.

In the folder of an op, `reference` is its definition in plain torch, `fused` the function that callers use, and the
other files are its parts. Torch and Triton are all that is imported here: nothing else of fastjepa. The folder lies at
the top of the repository, where people look for it, and is imported as `fastjepa.kernels`.
"""

# One folder, tests/test_<op>.py and bench/<op>.py each: tests/test_stems.py holds the rule.
OPS = ("batch_norm", "convolution", "frame_windows", "moments", "projected_losses")
