"""Two passes over rows x (N, D), of which `projected_losses` is made: mean and scatter, and a linear map of x − μ.

    x (N, D) contiguous rows, fp32 or bf16;  μ = Σx/N;  M2 = Σ(x−μ)(x−μ)ᵀ, (D, D);  out = base − constant − linear·(x−μ)

`fused` has the functions to call, `reference` the definition; `scatter`, with `narrow` for few channels, and
`centred_linear` are the two passes, several `tensors` in a launch; `merge` adds what programs, or devices, leave, and
`blocks` says how both passes cut the channels. These are parts of another op's forward and backward passes, not
`torch.library` ops of their own: what calls them registers them. They take more than it needs (D up to 512 in blocks of
64, no constant, no base), which makes any loss that depends on a covariance, and its gradient, two passes; tests and
audit cover all of it.

Exact for any offset of the data. Each program centres its rows at the mean of its first tile, so what it sums has the
size of the data's deviations, not of its mean: with T tiles, Σ(x−c)² ≤ (1+T)·Σ(x−μ_program)², since a first tile that
lies far from its program's mean is itself 1/T of the program's scatter. The programs' partials are then merged in
float64, in one order, by the exact formula for moments about different centres.
"""
