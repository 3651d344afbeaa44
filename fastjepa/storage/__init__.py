"""Everything that is written to disk and read back: atomic files, checkpoints, run folders, exported weights.

Files from outside are untrusted: nothing read here runs code, and what does not fit is refused before anything changes.
It may import `fastjepa.config`, `fastjepa.model` and `fastjepa.optional_packages`.
"""
