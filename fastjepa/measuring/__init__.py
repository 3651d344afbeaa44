"""What makes a measurement count, wherever it is made: the exactness policy, the stopwatches, and what has won so far.

Tests, benchmarks and whatever verifies or calibrates on a user's machine share these. They know tensors only: this room
imports nothing else of the package.
"""
