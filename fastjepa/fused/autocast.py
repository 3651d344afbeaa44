"""A network that computes in bf16 autocast of its own, whatever surrounds it, and stays eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InBf16(nn.Module):
    """`network` in bf16 autocast, with inputs and outputs in the caller's dtype.

    It shares parameters, buffers and submodules under their own names, so that state_dicts stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in network.named_children():
            self.add_module(name, child)
        # In a tuple, so that it is not a submodule, whose parameters would count twice.
        self._eager = (network,)
        self.training = network.training

    def __getattr__(self, name: str) -> Any:
        """Whoever asks a network for what it says of itself (`context_length`, `avg_pool`) still finds it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_eager" not in self.__dict__ or name.startswith("__"):  # while it is being made, copied or unpickled
                raise
            return getattr(self.__dict__["_eager"][0], name)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """What the network gives, in the dtype of x."""
        network = self._eager[0]
        network.training = self.training
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return network(x, *arguments).to(x.dtype)

    def extra_repr(self) -> str:
        """What is wrapped."""
        return type(self._eager[0]).__name__
