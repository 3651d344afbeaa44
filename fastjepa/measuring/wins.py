"""What "auto" takes on a GPU, each with the committed file of measurements that says that it wins.

Nothing is taken on trust: what was never timed on hardware is not here, and runs only when asked for. Ops are asked for
by `fused.swap`, graphs by `graphs.capture.use_cuda_graph`.
"""

from __future__ import annotations

# What a measurement may say of: fused ops, then CUDA graphs.
CANDIDATES = ("batch_norm", "projected_losses", "train_step", "rollout")

# candidate → path of a committed .jsonl file of rows, from the root of the repository
MEASURED_WINS: dict[str, str] = {}
