"""Fused Triton ops: one op per file; `launch` is the only file that knows whether Triton compiles or interprets."""
