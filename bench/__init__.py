"""Measure and check: one file for each thing measured, on top of `harness`; the static audit; the report (README.md).

It may import everything of `fastjepa`, and is imported by tests only.
"""
