"""Kernels with planted faults, which `python -m bench audit --module tests.audit_planted` must catch, and with loops
whose instructions it must count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from fastjepa.kernels.launch import AuditCase, LaunchConfig


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _centre_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))  # all of it lives until its mean is known
    tl.store(y_ptr + tl.arange(0, BLOCK), x - tl.sum(x) / BLOCK)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK_N + offs_n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc)


@triton.jit
def _two_matmuls_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A product of large tiles, and one of few rows, which is not made for wgmma."""
    _matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M, BLOCK_N, BLOCK_K)
    _matmul_kernel(a_ptr, b_ptr, c_ptr, K, 16, BLOCK_N, BLOCK_K)


@triton.jit
def _copy_tiles_kernel(x_ptr, y_ptr, tiles, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * tiles * BLOCK + tl.arange(0, BLOCK)
    tile = 0
    while tile < tiles:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs))
        offs += BLOCK
        tile += 1


@triton.jit
def _fma_kernel(x_ptr, y_ptr, tiles, times, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    """TIMES FMAs an element in straight code, or `times` of them in a loop if TIMES is 0."""
    offs = tl.program_id(0).to(tl.int64) * tiles * BLOCK + tl.arange(0, BLOCK)
    tile = 0
    while tile < tiles:
        x = tl.load(x_ptr + offs)
        for _ in tl.static_range(TIMES):
            x = x * x + 1.0
        if TIMES == 0:
            time = 0
            while time < times:
                x = x * x + 1.0
                time += 1
        tl.store(y_ptr + offs, x)
        offs += BLOCK
        tile += 1


@triton.jit
def _quotient_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if n > 0:
        x = tl.div_rn(x, x + 1.0)  # a subroutine, where the quick way is not exact
    tl.store(y_ptr + offs, tl.sqrt_rn(x))


def _fma_case(name: str, unrolled: int, loop_trips: tuple[int, ...], programs: int = 1320) -> AuditCase:
    """1320 programs of 10 tiles of 1024 numbers: 8 for each thread."""
    return AuditCase(
        name,
        _fma_kernel,
        {"x_ptr": "*fp32", "y_ptr": "*fp32", "tiles": "i32", "times": "i32"},
        {"TIMES": unrolled},
        LaunchConfig(blocks={"BLOCK": 1024}),
        bytes_moved=8 * 1320 * 10 * 1024,
        flops=0,
        programs=programs,
        loop_trips=loop_trips,
    )


def loop_cases() -> list[AuditCase]:
    vector = {"x_ptr": "*fp32", "y_ptr": "*fp32", "tiles": "i32"}
    copied = 8 * 1320 * 10 * 1024
    return [
        AuditCase(
            "copy in a loop",
            *(_copy_tiles_kernel, vector, {}, LaunchConfig(blocks={"BLOCK": 1024}), copied, 0),
            programs=1320,
            loop_trips=(10,),
        ),
        AuditCase(  # one number for each thread: ptxas unrolls it
            "copy in a short loop",
            *(_copy_tiles_kernel, vector, {}, LaunchConfig(blocks={"BLOCK": 128}), copied // 8, 0),
            programs=1320,
            loop_trips=(10,),
        ),
        _fma_case("100 FMAs in a loop", 100, (10,)),
        _fma_case("1000 FMAs in an inner loop", 0, (10, 1000)),
        _fma_case("trips of the inner loop forgotten", 0, (10,)),
        _fma_case("too few trips", 100, (5,)),
        _fma_case("programs forgotten", 100, (10,), programs=0),
    ]


def instruction_cases() -> list[AuditCase]:
    """Of kernels that are made for one kind of matrix instruction; on sm_90 only tiles of 64 rows make wgmma."""
    matmul = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}

    def case(name: str, rows: int, instructions: dict[int, str], kernel: Any = _matmul_kernel) -> AuditCase:
        config = LaunchConfig(4, 2, {"BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_K": 64})
        return AuditCase(
            name, kernel, matmul, {}, config, 4_300_000, 0, ("K",), expects_tensor_cores=True, instructions=instructions
        )

    return [
        case("wgmma as declared", 64, {90: "wgmma"}),
        case("mma.sync as declared", 16, {80: "mma.sync", 90: "mma.sync"}),
        case("mma.sync instead of wgmma", 16, {90: "wgmma"}),
        case("wgmma instead of mma.sync", 64, {90: "mma.sync"}),
        case("wgmma and mma.sync", 64, {90: "wgmma"}, _two_matmuls_kernel),
        replace(
            case("nothing instead of wgmma", 64, {90: "wgmma"}),
            **{"kernel": _copy_kernel, "signature": {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}},
            **{"config": LaunchConfig(blocks={"BLOCK": 1024}), "divisible_by_16": ("n",)},
        ),
        case("does not matter on sm_90", 16, {80: "wgmma", 100: "tcgen05"}),
    ]


def audit_cases() -> list[AuditCase]:
    vector = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    matmul = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    tiles = {"BLOCK_M": 128, "BLOCK_N": 128}
    copied = 4_300_000  # bytes: one microsecond of an H200's memory
    return [
        AuditCase(
            "copy",
            *(_copy_kernel, {**vector, "n": "i32"}, {}, LaunchConfig(4, 1, {"BLOCK": 1024}), copied, 0, ("n",)),
            programs=525,
        ),
        AuditCase("spills", _centre_kernel, vector, {"BLOCK": 65536}, LaunchConfig(num_warps=4), copied, 0),
        AuditCase(
            "spills allowed",
            *(_centre_kernel, vector, {"BLOCK": 65536}, LaunchConfig(num_warps=4), copied, 0),
            allowed_spill_bytes=1 << 20,
            allowed_spill_reason="planted",
        ),
        AuditCase(
            "too much shared memory",
            *(_matmul_kernel, matmul, {**tiles, "BLOCK_K": 128}, LaunchConfig(8, 5), copied, 0, ("K",)),
            expects_tensor_cores=True,
        ),
        AuditCase(
            "no tensor cores",
            *(_copy_kernel, {**vector, "n": "i32"}, {"BLOCK": 1024}, LaunchConfig(), copied, 0),
            expects_tensor_cores=True,
        ),
        AuditCase("does not compile", _copy_kernel, {**vector, "n": "i32"}, {"BLOCK": 1000}, LaunchConfig(), 0, 0),
        AuditCase("argument forgotten", _copy_kernel, vector, {"BLOCK": 1024}, LaunchConfig(), 0, 0),
        AuditCase("a quotient", _quotient_kernel, {**vector, "n": "i32"}, {"BLOCK": 256}, LaunchConfig(), 0, 0),
        *loop_cases(),
        *instruction_cases(),
    ]
