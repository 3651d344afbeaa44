"""What kernels say before they run: where they can, and what they take."""

from __future__ import annotations

import pytest
import torch

from fastjepa.kernels.checks import check_tensor, require_available, unavailable_reason


def test_availability_is_explained(needs_triton: None) -> None:
    from fastjepa.kernels import launch

    assert "'mps' is not supported" in str(unavailable_reason(torch.device("mps")))
    if launch.INTERPRET:
        assert unavailable_reason(torch.device("cpu")) is None
        with pytest.raises(RuntimeError, match="some_op: TRITON_INTERPRET=1 is set"):
            require_available("some_op", torch.device("cuda"))
    else:
        assert unavailable_reason(torch.device("cuda")) is None
        with pytest.raises(RuntimeError, match="some_op: Triton kernels need a CUDA device"):
            require_available("some_op", torch.device("cpu"))


def test_check_tensor_names_argument_given_and_accepted() -> None:
    x = torch.zeros(2, 3)
    check_tensor("op", "x", x, shape=(None, 3), device=x.device)
    with pytest.raises(TypeError, match="op: x must be a tensor, got list"):
        check_tensor("op", "x", [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"op: x has dtype torch.int64; accepted: torch.float32"):
        check_tensor("op", "x", x.long())
    for shape in ((None, 4), (2,), (2, 3, 1)):
        with pytest.raises(ValueError, match=r"op: x has shape \(2, 3\); accepted"):
            check_tensor("op", "x", x, shape=shape)
    with pytest.raises(ValueError, match="op: x is on cpu, but the other arguments are on meta"):
        check_tensor("op", "x", x, device=torch.device("meta"))
