"""The environment of a record (versions, hardware), the device, and peak memory."""

from __future__ import annotations

import contextlib
import platform
import re
import resource
import sys
from pathlib import Path

import torch

from vlmdefend.version import __version__

CLEAR_REFS = Path("/proc/self/clear_refs")


def choose_device(name: str | None) -> torch.device:
    """Returns the device called ``name``; None: the GPU if there is one.

    Raises:
        UserError: a device that torch does not know or does not have.
    """
    from vlmdefend.errors import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: torch cannot use it here; use cpu, or cuda on a machine with a GPU."
        ) from None
    return device


def environment(device: torch.device) -> dict[str, str]:
    """Returns the versions and hardware of a record, as text."""
    import open_clip

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "vlmdefend": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "device": name,
        "threads": str(torch.get_num_threads()),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Resets the measured peak of memory, if the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")  # Linux: resets the process's peak resident size


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak of memory since the reset, in MB.

    CUDA: of the allocated tensors. CPU: of the process's resident memory (since its start, if the system cannot reset).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if CLEAR_REFS.exists():
        mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if mark:
            return int(mark[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
