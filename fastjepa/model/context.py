"""How many states predict the next one: asked by what draws and tabulates, which needs no torch."""

CONTEXT = 2  # states from which the next one is predicted
