"""Every kernel compiles for NVIDIA GPUs on a machine without one, and reads and writes pixels four at a time."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vlmdefend.kernels.fused import apgd, l2, linf, margin, momentum, normalize, resize, start  # noqa: E402

NUMBERS = {"alpha": "fp32", "eps": "fp32", "decay": "fp32", "classes": "*i64"}
TABLES = {"row_first": "*i32", "column_first": "*i32"}
# name: (kernel, its constants, whole-image values that one thread reads and writes per pixel)
KERNELS: dict[str, tuple[Any, dict[str, Any], tuple[int, int]]] = {
    "linf": (linf.linf_kernel, {"alpha_each": False, "eps_each": False, "block": 1024}, (3, 1)),
    "linf, per image": (linf.linf_kernel, {"alpha_each": True, "eps_each": True, "block": 1024}, (3, 1)),
    "apgd": (apgd.apgd_kernel, {"eps_each": False, "block": 1024}, (4, 1)),
    "apgd, per image": (apgd.apgd_kernel, {"eps_each": True, "block": 1024}, (4, 1)),
    "random start": (start.noisy_kernel, {"eps_each": False, "block": 1024}, (2, 1)),
    "normalisation": (normalize.normalize_kernel, {"block": 1024}, (1, 1)),
    "momentum, sum": (momentum.absolute_sum_kernel, {"block": 4096}, (1, 0)),
    "momentum, step": (
        momentum.momentum_kernel,
        {"alpha_each": False, "eps_each": False, "parts_block": 64, "block": 1024},
        (4, 2),
    ),
    "l2, sums": (l2.sums_kernel, {"block": 4096}, (3, 0)),
    "l2, scales": (l2.scales_kernel, {"alpha_each": False, "eps_each": True, "block": 64}, (0, 0)),
    "l2, step": (l2.l2_kernel, {"block": 1024}, (3, 1)),
    "margin": (margin.logit_loss_kernel, {"ratio": False, "block": 1024}, (0, 0)),
    "dlr": (margin.logit_loss_kernel, {"ratio": True, "block": 1024}, (0, 0)),
    "resize": (resize.resize_kernel, {"block": 256}, (0, 0)),
}


@cache
def ptx(name: str, capability: int, stored: str = "fp32") -> str:
    """The kernel's assembly, for pointers and counts that are multiples of 16, as those of whole images are."""
    kernel, constants, _ = KERNELS[name]
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        number = NUMBERS.get(argument, TABLES.get(argument, ""))
        if constants.get(f"{argument}_each"):
            number = "*fp32"
        if argument in ("gradient", "logits", "gradients"):
            number = f"*{stored}"
        counts = argument in ("count", "parts", "width", "channels", "inner") or argument.startswith("stride")
        signature[argument] = number or ("i32" if counts or argument.endswith("_taps") else "*fp32")
        if signature[argument].startswith("*") or argument in ("count", "inner"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    assert len(compiled.asm["cubin"]) > 1000
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_a_gpu(name: str, capability: int, stored: str) -> None:
    assert ".target sm_" + str(capability) in ptx(name, capability, stored)


@pytest.mark.parametrize("name", [name for name, (_, _, moved) in KERNELS.items() if any(moved)])
def test_pixels_move_four_at_a_time(name: str) -> None:
    """A thread's share of a block is moved in vectors of four, each value of it once."""
    _, constants, (reads, writes) = KERNELS[name]
    vectors = constants["block"] // (128 * 4)  # of one image, per thread of 4 warps
    code = ptx(name, 80)
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == reads * vectors
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == writes * vectors


@pytest.mark.parametrize("name", ["linf", "apgd", "random start", "momentum, step", "l2, step"])
def test_no_product_is_added_without_rounding(name: str) -> None:
    """A fused multiply-add would give other bits than the specification."""
    assert "fma." not in ptx(name, 80)


def test_division_is_exact_where_the_specification_divides() -> None:
    for name in ("normalisation", "momentum, step", "dlr"):
        assert "div.rn.f32" in ptx(name, 80)
        assert "div.full.f32" not in ptx(name, 80)
