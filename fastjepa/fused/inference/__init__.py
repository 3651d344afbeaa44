"""Inference networks: the published ones with BatchNorm folded, a launch for a convolution and everything around it.

`layers` describes the launches, `weights` folds what they read, `run` runs them, and `networks` are the modules.
"""

from fastjepa.fused.inference.networks import Convolutions, InferenceEncoder, InferencePredictor, for_evaluation

__all__ = ["Convolutions", "InferenceEncoder", "InferencePredictor", "for_evaluation"]
