"""Windows of consecutive states, side by side in the channels, as a predictor's network reads them; their gradient.

Shapes: states (B, D, T, H, W); windows of c states (B, c·D, T - c + 1, H, W), window i holding the states from i to
i + c - 1, the oldest first; all channels-last in memory (B, T, H, W, D).

`reference` is the definition; `fused` the functions to call; `gather` the kernel that gathers a state's gradient from
the windows that hold it.
"""
