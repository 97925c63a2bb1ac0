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
    """Returns versions and hardware, as text."""
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
    """Resets the peak of memory, where the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")  # Linux: the process's high-water mark starts anew


def peak_memory_mb(device: torch.device) -> float:
    """CUDA: the most that tensors took since the reset. CPU: the most the process had resident (ever, where the
    system cannot reset it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if CLEAR_REFS.exists():
        mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if mark:
            return int(mark[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
