"""How measuring is done, whatever is measured: cases and variants, rounds, memory, rows, rooflines, command lines.

Nothing here knows a particular computation. It may import `fastjepa`; the suites beside this folder import it.
"""
