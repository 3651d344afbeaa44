"""`python -m bench prove`: all evidence that a machine can give, in one command, one folder and a given time.

`parts` says what is measured, the most valuable first; `supervise` runs it in child processes, so that whatever a
variant does costs that variant only; `proof` remembers what came of it; `card` sums it up; `archive` packs it. Of the
suites it uses names only: what they compute belongs to the children.
"""
