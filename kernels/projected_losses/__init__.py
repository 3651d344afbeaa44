"""Projected losses of a state and its predictions: std_loss, cov_loss and prediction losses under one projector.

    B batch  D channels ≤ 64  T frames  H, W pixels  N = B·T·H·W rows  K predictions  hidden, out features ≤ 128

P(x) = W2·relu(BatchNorm(W1·x + b1)), BatchNorm in train mode. Three modules have the function `projected_losses`, with
one signature: `reference` materialises every projection, as the definition says; `closed_form` computes the same
numbers from small moments in plain torch (`pixel_passes` over `chunks`, which `chunk_pool` spreads over a CPU's
threads); `fused` does that in Triton.

The closed form never stores the (N, hidden) and (N, out) activations: four passes over the D-wide rows replace them.

    1. mean and scatter of every tensor                       (`kernels.moments`)
    2. moments of r(z), and of r(z) − r(p) per prediction     (`forward`, on `activations`)
    3. Aᵀdy, Σdy and Σdy(x−μ)ᵀ                                (`backward`, on `activations` and `slope`)
    4. dx = Aᵀdy − BatchNorm's correction                     (`kernels.moments`)

Between the passes, matrices of at most 128×128 in float64: `algebra` in plain torch, and of the fused path one kernel
behind each of the first two passes, `hidden_affine` and `losses`, and one before and one behind the third,
`output_gradients` and `input_gradients`. `hidden_affine` and `output_gradients` split matrices into the `parts` that
the passes multiply.
"""
