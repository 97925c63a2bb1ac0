"""Which of its two implementations a kernel runs: torch (the specification) or Triton.

CUDA tensors take Triton where it is installed, everything else takes torch; ``VLMDEFEND_KERNELS=reference`` or
``triton`` in the environment overrides. Triton itself is imported by the first kernel that runs on it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from vlmdefend.errors import UserError

VARIABLE = "VLMDEFEND_KERNELS"
# float64 stays with torch: the kernels compute in float32
STORED = (torch.float32, torch.bfloat16)


def uses_triton(tensor: Tensor) -> bool:
    """Whether a kernel that changes or reads ``tensor`` runs on Triton.

    Raises:
        UserError: ``VLMDEFEND_KERNELS`` is neither ``reference`` nor ``triton``; or it is ``triton``, and Triton is not
            installed or the tensor is not on a GPU.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", "triton"):
        raise UserError(
            f"{VARIABLE}={wanted!r}: write reference or triton, or leave it unset to let the device decide."
        )
    if wanted == "reference" or (not wanted and not tensor.is_cuda):
        return False
    if wanted and not _installed():
        raise UserError(f"{VARIABLE}=triton, but triton is not installed; `pip install triton` or leave it unset.")
    if wanted and not (tensor.is_cuda or _interpreted()):
        raise UserError(
            f"{VARIABLE}=triton, but the tensors are on the {tensor.device.type}; run on a CUDA device, leave it "
            "unset, or set TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter."
        )
    return tensor.dtype in STORED and (_interpreted() or (_installed() and _capable(tensor.get_device())))


def through_op(tensor: Tensor) -> bool:
    """Whether a call must go through its ``torch.ops.vlmdefend`` operator rather than straight to torch.

    The operator hides what torch.compile and fake tensors cannot look into. For a plain CPU tensor it would only add
    its overhead, some tens of microseconds per call.
    """
    return torch.compiler.is_compiling() or type(tensor) not in _PLAIN or uses_triton(tensor)


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capable(device: int) -> bool:
    """Triton compiles for compute capability 7.0 and up; ROCm reports no lower one."""
    return torch.cuda.get_device_capability(device) >= (7, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()
