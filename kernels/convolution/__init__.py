"""Convolutions for inference, with everything that surrounds them in one launch: BatchNorm is folded into the weights.

    out = head(relu(conv(sources) + shortcut(sources of a shortcut) + bias + residual))

A source is a feature map (N, C, H, W), channels-last in memory. Two sources stand side by side in the channels and are
read where they lie; the 1×1 shortcut is added in the same accumulator; each part but the convolution is optional.

`reference` is the definition, `fused` the functions to call, `weights` lays weights out, `layer` says what is computed
in sizes, and `table` how it is launched. Each of `gemm`, `split_k`, `strip`, `stem` and `transposed` is a kernel, and
`tile` what they share.
"""
