"""CUDA graphs: rollouts and whole training steps in one launch. `fastjepa.graph_capture` has the contract."""

from fastjepa.graph_capture import MEASURED_WINS, CudaGraphChoice, GraphCaptureError, use_cuda_graph
from fastjepa.graphed_rollout import GraphedRollout
from fastjepa.graphed_train_step import GraphedTrainStep, make_capturable

__all__ = [
    "MEASURED_WINS",
    "CudaGraphChoice",
    "GraphCaptureError",
    "GraphedRollout",
    "GraphedTrainStep",
    "make_capturable",
    "use_cuda_graph",
]
