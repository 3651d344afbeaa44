"""`torch.compile(step.losses, fullgraph=True)`: the whole forward as one graph, with the numbers of the uncompiled one.

Most tests stop before code is generated ("aot_eager"): that is where tracing, the backward graph, the mutation of
buffers and the fake versions of ops could go wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bench.harness.variants import needs_compiler
from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.fused.swap import accelerate
from fastjepa.kernels.projected_losses import closed_form
from fastjepa.kernels.projected_losses.chunks import chunking_for
from fastjepa.model.losses import ProjectionPath, projected_losses
from fastjepa.model.networks import Projector
from fastjepa.model.step import TrainStep
from projector_cases import loss_and_gradients, make_case
from tiny import tiny_batch, tiny_model

CALLS = 3
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form as on a GPU, where the compiler sees its operations, on tensors of a CPU."""
    monkeypatch.setattr(closed_form, "chunking_for", lambda _, *, compiling: chunking_for("cuda", compiling=compiling))


def outcome(
    path: ProjectionPath = "eager",
    *,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    fused: bool = False,
    backend: Any = None,
    steps: int = 1,
    calls: int = CALLS,
) -> dict[str, Tensor]:
    """Losses, gradients and BatchNorm's buffers after some steps on changing clips; `backend`: compiled by it.

    Gradients and buffers are one tensor for each part of the model, so that errors are relative to the largest.
    """
    jepa, decoder, head = (module.to(dtype) for module in tiny_model())
    if fused:
        accelerate(jepa, backend="fused", verbose=False)
    step = TrainStep(jepa, decoder, head, steps=steps, projection=path, autocast_dtype=autocast_dtype)
    if backend is not None:
        step.losses = torch.compile(step.losses, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    found = {}
    for seed in range(calls):
        losses = step(*(x.to(dtype) for x in tiny_batch(2, 3, (8, 9), seed)))
        found[f"losses {seed}"] = torch.stack(losses)
    regularizer: Any = jepa.regularizer
    parts: dict[str, nn.Module] = {
        "encoder": jepa.encoder, "predictor": jepa.predictor, "projector": regularizer.proj,
        "decoder": decoder, "head": head,
    }  # fmt: skip
    for name, part in parts.items():
        gradients = dict(sorted((n, p.grad) for n, p in part.named_parameters()))
        found[f"gradient of {name}"] = torch.cat([g.flatten() for g in gradients.values() if g is not None])
        assert len(gradients) == sum(g is not None for g in gradients.values()) > 0
        buffers = dict(sorted(part.named_buffers()))
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            tensors = [b.flatten() for n, b in buffers.items() if n.endswith(kind)]
            if tensors:
                found[f"{kind} of {name}"] = torch.cat(tensors)
    return found


@functools.cache
def true_outcome(**sizes: int) -> dict[str, Tensor]:
    return outcome(dtype=torch.float64, **sizes)  # type: ignore[arg-type]


def assert_compiled_is_plain(
    path: ProjectionPath, autocast_dtype: torch.dtype | None, *, fused: bool = False, **sizes: int
) -> None:
    options: dict[str, Any] = {"autocast_dtype": autocast_dtype, "fused": fused, **sizes}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = outcome(path, backend=counter, **options)
    assert counter.frame_count == 1, "one graph, compiled once"
    plain, truth = outcome(path, **options), true_outcome(**sizes)
    assert compiled.keys() == plain.keys() == truth.keys()
    for name, value in compiled.items():
        if name.startswith("num_batches_tracked"):
            assert torch.equal(value, plain[name])
            assert torch.equal(value, truth[name])
        else:
            # Networks as narrow as these are conditioned worse than the 1e-5 of an op.
            assert_as_exact_as_eager(
                value, plain[name], truth[name], name, precision=autocast_dtype, relative_limit=None
            )


@pytest.mark.parametrize("autocast_dtype", [None, BF16])
@pytest.mark.parametrize("path", ["eager", "closed_form"])
def test_the_whole_forward(path: ProjectionPath, autocast_dtype: torch.dtype | None) -> None:
    assert_compiled_is_plain(path, autocast_dtype)


@pytest.mark.parametrize(("autocast_dtype", "steps"), [(None, 2), (BF16, 1)])
@pytest.mark.usefixtures("traced")
def test_the_whole_forward_with_the_closed_form_traced(autocast_dtype: torch.dtype | None, steps: int) -> None:
    assert_compiled_is_plain("closed_form", autocast_dtype, steps=steps)


@pytest.mark.usefixtures("traced")
def test_the_traced_closed_form_in_float64() -> None:
    """Its losses already have the dtype in which they are returned: a result must still not be an intermediate."""
    case = make_case((2, 4, 3, 5), 1, hidden=6, out=5).double()
    truth = loss_and_gradients(closed_form.projected_losses, case)
    compiled = torch.compile(closed_form.projected_losses, fullgraph=True, backend="aot_eager")
    for name, value in loss_and_gradients(compiled, case).items():
        assert_close_to_truth(value, truth[name], name, limit=1e-12)


@pytest.mark.parametrize(("autocast_dtype", "calls"), [(None, CALLS), (BF16, 1)])
def test_the_whole_fused_forward(device: str, autocast_dtype: torch.dtype | None, calls: int) -> None:
    assert_compiled_is_plain("fused", autocast_dtype, fused=True, calls=calls)


def test_a_smaller_last_batch() -> None:
    """Its sizes are new, so it is one more compilation, but no other."""
    jepa, decoder, head = tiny_model()
    step = TrainStep(jepa, decoder, head, steps=1, projection="closed_form")
    plain = TrainStep(*tiny_model(), steps=1, projection="closed_form")
    counter = CompileCounterWithBackend("aot_eager")
    step.losses = torch.compile(step.losses, fullgraph=True, backend=counter)  # type: ignore[method-assign]
    for batch in (3, 2, 3, 2):
        video, digit_location = tiny_batch(batch, 3, (8, 9))
        found, expected = step(video, digit_location), plain(video, digit_location)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0.0)
    assert counter.frame_count == 2


@pytest.mark.skipif(needs_compiler(torch.device("cpu")) is not None, reason=str(needs_compiler(torch.device("cpu"))))
@pytest.mark.usefixtures("traced")
def test_the_generated_code_of_the_traced_closed_form() -> None:
    """What the default backend makes of the losses and of the buffers' advance; rows beyond whole blocks included."""

    def run(dtype: torch.dtype, *, compiled: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        proj = Projector("4-6-5").to(dtype)
        randn = torch.Generator().manual_seed(0)
        shape = (2, 4, 3, 33, 32)
        z, *predictions = (torch.randn(shape, generator=randn).to(dtype).requires_grad_() for _ in range(2))
        function = torch.compile(projected_losses, fullgraph=True) if compiled else projected_losses
        losses = function(proj, proj, z, predictions, path="closed_form")
        (10 * losses.std_loss + 100 * losses.cov_loss + losses.prediction_losses.sum()).backward()
        found: dict[str, Any] = losses._asdict() | dict(proj.named_buffers())
        found |= {f"gradient of {name}": p.grad for name, p in proj.named_parameters()}
        return found | {"gradient of z": z.grad, "gradient of p": predictions[0].grad}

    compiled, truth = run(torch.float32, compiled=True), run(torch.float64, compiled=False)
    assert torch.equal(compiled.pop("net.1.num_batches_tracked"), truth["net.1.num_batches_tracked"])
    assert not compiled.pop("gradient of net.0.bias").any()  # exactly 0: BatchNorm undoes a shift
    for name, value in compiled.items():
        assert_close_to_truth(value, truth[name], name)
