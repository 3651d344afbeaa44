"""What makes a measurement count, wherever it is made: the policy, the stopwatches, and processes that may crash.

Tests, benchmarks and whatever verifies on a user's machine share these. They know tensors only: this room
imports nothing else of the package.
"""
