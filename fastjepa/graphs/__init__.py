"""CUDA graphs: rollouts and whole training steps in one launch. `fastjepa.graphs.capture` has the contract.

It may import the model, `fastjepa.fused` for folding and folded networks, `fastjepa.moving_mnist` for clips, and
`profiling`, and of the kernels their input checks.
"""

from fastjepa.graphs.capture import CudaGraphChoice, GraphCaptureError, use_cuda_graph
from fastjepa.graphs.rollout import GraphedRollout
from fastjepa.graphs.train_step import GraphedTrainStep, make_capturable

__all__ = [
    "CudaGraphChoice",
    "GraphCaptureError",
    "GraphedRollout",
    "GraphedTrainStep",
    "make_capturable",
    "use_cuda_graph",
]
