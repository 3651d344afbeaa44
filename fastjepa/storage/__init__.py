"""Everything that is written to disk and read back: checkpoints, run folders, exported weights.

Files from outside are untrusted: nothing read here runs code, and what does not fit is refused before anything changes.
It may import `fastjepa.files`, `fastjepa.config`, `fastjepa.model` and `fastjepa.optional_packages`.
"""
