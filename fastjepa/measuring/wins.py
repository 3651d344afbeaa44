"""What "auto" takes on a GPU, each with the committed file of measurements that says that it wins.

Names: the fused ops "batch_norm" and "projected_losses"; "train_step" and "rollout" as CUDA graphs. Nothing is taken on
trust: what was never timed on hardware is not here, and runs only when asked for.
"""

from __future__ import annotations

MEASURED_WINS: dict[str, str] = {}
