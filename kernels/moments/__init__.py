"""Two passes over rows x (N, D) that ops share: their mean and scatter, and a linear map of x − μ.

    x (N, D) contiguous rows, fp32 or bf16;  μ = Σx/N;  M2 = Σ(x−μ)(x−μ)ᵀ, (D, D);  out = base − constant − linear·(x−μ)

`fused` has the kernels and their launches, `reference` the definition. These are parts of other ops' forward and
backward passes, not `torch.library` ops of their own: what calls them registers them.

Exact for any offset of the data. Each program centres its rows at the mean of its first tile, so what it sums has the
size of the data's deviations, not of its mean: with T tiles, Σ(x−c)² ≤ (1+T)·Σ(x−μ_program)², since a first tile that
lies far from its program's mean is itself 1/T of the program's scatter. The programs' partials are then combined in
float64, in one order, by the exact formula for moments about different centres.
"""
