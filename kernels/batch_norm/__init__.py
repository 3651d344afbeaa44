"""BatchNorm (+ residual) (+ ReLU) over channels-last tensors: one pass for the statistics, one to apply them.

    out = relu?( BN(x) + r ),   BN(x) = (x − mean)·rstd·weight + bias,   rstd = 1/sqrt(var + eps), per channel

in three forms: r absent; r a final tensor; r = BN_r(residual), where the raw output of a shortcut's convolution has a
BatchNorm of its own. Shapes: x, residual, out (N, C, H, W) in torch.channels_last, or (M, C); M = N·H·W rows.

For the backward pass only x, residual and the per-channel statistics are kept: normalised values and the ReLU's mask
are computed again there (`backward`). Sums and statistics are fp32; each result is rounded once, at its
store.

`fused` holds the functions to call; `reference` the definition. `tiling` cuts the rows into programs, `statistics`
makes mean and variance of each one's and `merge` those of all, `forward` and `backward` are the differentiable op,
`forked` gives its result to several users, `reduce` makes the sums that its backward needs, `relu` is the ReLU and its
mask.
"""
