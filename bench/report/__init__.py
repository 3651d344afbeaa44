"""Rows made readable: a page of tables and pictures from committed rows, and from nothing else.

It may import `bench.harness`, names of `bench.recipe`, and of fastjepa the style of figures, the environment and the
writing of files.
"""
