"""What replaces parts of a model to make it faster, and the swap that puts it in: fused networks, losses, folding.

A fused module is made from the eager one it replaces and shares its parameters, buffers and names, and so is a folded
one, for inference. Fused kernels are called from here and from `model.projected_losses` only; what needs Triton
(`networks`, and the kernels that `inference` calls) is imported when it is first needed. It may import
`fastjepa.kernels`, `model`, and what the self-check needs (`autotune`, the policy, sizes read from weights).
"""
