"""The launch gate: the one place that knows whether Triton compiles for a GPU or interprets on the CPU.

`TRITON_INTERPRET=1` (read once, here and by Triton, when a kernel is decorated) runs every kernel in Triton's CPU
interpreter, so the same tests run with and without a GPU. Everything an op file needs around its kernels is here:
op registration, the dot helper, and the record from which the static audit compiles a kernel.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

INTERPRET: bool = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = tl.constexpr(INTERPRET)

KERNEL_OPS: dict[str, Callable[..., Any]] = {}  # every registered op by its name: the function that launches

TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def dot_precision(dtype: torch.dtype) -> str:
    """The `PRECISION` of dots on operands of `dtype`: fp32 needs "tf32x3" to keep 1e-5 on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"  # products of bf16 numbers are exact in fp32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc (M, N) fp32 + a (M, K) @ b (K, N); PRECISION is "ieee", "tf32" or "tf32x3" and matters for fp32 only.

    The interpreter's bf16 dot works on bit patterns and returns garbage, so operands are upcast there; the product of
    two bf16 numbers is exact in fp32, so this changes nothing but the order of the sum.
    """
    if _INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x rounded to the nearest DTYPE, for a dot or a store.

    The interpreter truncates fp32 → bf16, which biases every sum; there x is rounded by hand (to nearest, ties to even)
    and stays fp32, with a value that bf16 holds exactly.
    """
    if _INTERPRET:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            y = bits.to(tl.float32, bitcast=True)
        else:
            y = x.to(DTYPE)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr, ORDERED_FP32: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b for a sum over many tiles.

    Tensor cores add into their accumulator with truncation. Over the hundreds of steps of a long sum that alone can
    exceed 1e-5, so with ORDERED_FP32 each tile's product starts from zero and is added to acc by a rounded fp32 add. It
    is written as a subtraction because Triton folds acc + dot(a, b, 0) back into dot(a, b, acc).
    """
    return acc - dot(-a, b, tl.zeros_like(acc), PRECISION) if ORDERED_FP32 else dot(a, b, acc, PRECISION)


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    x_ptr, offs_n, offs_d, n_rows, D: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr
):
    """A tile (BLOCK_N, BLOCK_D) of contiguous rows (n_rows, D), 0 outside; offs_n is int64: n_rows·D may be large."""
    ptrs = x_ptr + offs_n[:, None] * D + offs_d[None, :]
    if EVEN_N and EVEN_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(offs_n[:, None] < n_rows) & (offs_d[None, :] < D), other=0.0)
    return x


class KernelOp(Protocol[P, R]):
    """A registered op: called like the function that it was made from."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op."""
        ...

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """See torch.library.register_autograd."""
        ...


def kernel_op(
    name: str, fake: Callable[..., Any], *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[P, R]], KernelOp[P, R]]:
    """Register a function that launches kernels as the `torch.library` op `name` ("fastjepa::...").

    Compiled, it is a `triton_op`, so that torch.compile sees the kernels inside; interpreted, a `custom_op`, because
    the interpreter cannot run on the fake tensors with which torch.compile traces a `triton_op`. `fake` computes the
    outputs' shapes and dtypes from the same arguments. `mutates_args` names those that are changed in place.

    Raises TypeError if one of those has a default: torch drops arguments that equal their defaults from the end of a
    call, and torch 2.11 then looks for those that the op changes, and fails.
    """

    def register(function: Callable[P, R]) -> KernelOp[P, R]:
        parameters = inspect.signature(function).parameters
        optional = [
            argument for argument in mutates_args if parameters[argument].default is not inspect.Parameter.empty
        ]
        if optional:
            raise TypeError(f"{name} changes {', '.join(optional)} in place, which may have no default")
        KERNEL_OPS[name] = function
        op: Any = (custom_op if INTERPRET else triton_op)(name, function, mutates_args=mutates_args)
        op.register_fake(fake)
        registered: KernelOp[P, R] = op
        return registered

    return register


def wrap(kernel: Any) -> Any:
    """The kernel in the form in which a `kernel_op` launches it: `wrap(kernel)[grid](...)`."""
    return kernel if INTERPRET else wrap_triton(kernel)


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched: data, chosen from a measured or audited table, never tuned on the user's first step."""

    num_warps: int = 4
    num_stages: int = 1
    blocks: dict[str, int] = field(default_factory=dict)  # BLOCK_* constexprs
    # Programmatic dependent launch, from sm_90 on: begin while the kernel before still runs. The kernel itself waits.
    launch_pdl: bool = False


def launch_kernel(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, **arguments: Any) -> None:
    """Launch `kernel` over `grid` with the blocks, warps and stages of `config`.

    `arguments` by keyword, in the order of the kernel's signature, in which the config's BLOCK_* come last.
    """
    options = {"launch_pdl": True} if config.launch_pdl and not INTERPRET else {}
    wrap(kernel)[grid](
        **arguments, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages, **options
    )


@dataclass(frozen=True)
class RowSplit:
    """How the programs of a kernel share N rows: each takes `tiles` consecutive tiles of `block_n` rows."""

    programs: int
    tiles: int
    rows_per_program: int  # tiles · block_n
    even: bool  # programs · rows_per_program == N: no row needs a mask

    @staticmethod
    def of(n_rows: int, block_n: int, max_programs: int, *, prefer_even: bool = False) -> RowSplit:
        """At most `max_programs` programs, of as few tiles each as that allows.

        `prefer_even`: up to twice as many tiles each if the tiles then divide evenly, for kernels that are compiled
        without masks where they do. The split depends on sizes only, never on the device, so that sums have one order,
        and give the same bits, everywhere.
        """
        n_tiles = -(-n_rows // block_n)
        tiles = fewest = -(-n_tiles // max_programs)
        if prefer_even:
            tiles = next((t for t in range(fewest, 2 * fewest + 1) if n_tiles % t == 0), fewest)
        return RowSplit(-(-n_tiles // tiles), tiles, tiles * block_n, n_rows % (tiles * block_n) == 0)

    @staticmethod
    def one_tile_each(n_rows: int, block_n: int) -> RowSplit:
        """As many programs as there are tiles, for kernels that keep no sums."""
        return RowSplit.of(n_rows, block_n, max(1, -(-n_rows // block_n)))


@dataclass(frozen=True)
class AuditCase:
    """One kernel × config × dtype: what the static audit compiles, and the work it does at the default recipe's size.

    Every op file has `audit_cases() -> list[AuditCase]`. `signature` maps every non-constexpr argument to its Triton
    type ("*bf16", "*fp32", "i32", "i64", "fp32"); pointers, and the integers named in `divisible_by_16`, are compiled
    as multiples of 16, as in a real launch. `bytes_moved` counts each input read once and each output written once.

    `programs` and `loop_trips` are facts of the launch that the estimate of its issue slots needs: the programs of the
    grid, and how often one of them goes through its loop over tiles, e.g. `(split.tiles,)`. Where that loop has others
    inside, the trips of those follow, per trip of the one around them; loops side by side have the same trips. What is
    unrolled (`tl.static_range`, or a `range` over a constexpr that the compiler unrolls) needs no entry, and may have
    one.

    `instructions`: compute capability → the matrix instruction that the kernel is made for there, "mma.sync", "wgmma"
    or "tcgen05"; the audit finds that one and no other, and compiles the case for no other architecture. Empty: all
    architectures, and whichever instruction the compiler takes.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    config: LaunchConfig
    bytes_moved: int
    flops: int
    divisible_by_16: tuple[str, ...] = ()
    expects_tensor_cores: bool = False
    allowed_spill_bytes: int = 0
    allowed_spill_reason: str = ""
    programs: int = 0  # unknown: no estimate
    loop_trips: tuple[int, ...] = ()  # no loop
    instructions: Mapping[int, str] = field(default_factory=dict)


def audit_signature(
    kernel: Any, dtype: torch.dtype, in_dtype: Collection[str], absent: Collection[str] = ()
) -> dict[str, str]:
    """Triton types of all arguments but the `absent`: the pointers `in_dtype` are to `dtype`, the others to fp32."""
    types = {}
    for name in kernel.arg_names:
        if name in absent or name.isupper():  # None, or a constexpr
            continue
        if name.endswith("_ptr"):
            types[name] = f"*{TRITON_TYPE[dtype]}" if name in in_dtype else "*fp32"
        else:
            types[name] = "fp32" if name.endswith("eps") else "i32"
    return types
