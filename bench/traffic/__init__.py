"""`python -m bench traffic`: the bytes that are read and written, and the kernels launched, counted on shapes alone.

`counting` watches operators and launches, `parts` says to which part of the work each belongs, `work` is what is
counted, `command` puts it together.
"""
