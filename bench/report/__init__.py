"""Rows made readable: a page of tables and pictures from committed rows, and from nothing else.

It may import `bench.harness`, the suites for their names, and the style of `fastjepa.figures`.
"""
