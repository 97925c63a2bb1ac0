"""The processes of one run, as ``torchrun`` and ``accelerate launch`` start them, and what they compute together.

Gradients are summed here, not by DistributedDataParallel: a process that runs out of memory may then halve its
micro-batch by itself while the others wait in one place, a process may have no image at all, nothing is wrapped around
the model that is attacked, and two processes give the bits of one that accumulates two halves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]
AUTOCAST: dict[Precision, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FROM_ACCELERATE: dict[str, Precision] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
BUCKET_BYTES = 64 * 2**20


class Processes:
    """This process and the others of the run: rank, device, precision, sums over all.

    Args:
        device: of a single process; several are placed by accelerate. None: the GPU if there is one.
        precision: of the training forward; None: as ``accelerate launch --mixed_precision`` gives it, else float32.

    Raises:
        UserError: accelerate is not installed, or float16 without a GPU.
    """

    def __init__(self, device: str | None = None, precision: Precision | None = None) -> None:
        try:
            from accelerate import Accelerator
        except ImportError:
            raise UserError("training needs the package accelerate; `pip install accelerate`.") from None
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        self.accelerator: Any = Accelerator(cpu=on_cpu)
        self.rank, self.count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.is_main = bool(self.accelerator.is_main_process)
        self.device = self.accelerator.device if self.count > 1 else _one_device(device)
        self.precision = precision or FROM_ACCELERATE.get(str(self.accelerator.mixed_precision), "float32")
        if self.precision == "float16" and self.device.type != "cuda":
            raise UserError("--precision float16: needs a GPU; use bfloat16 or float32 on a CPU.")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context with the precision of the training forward."""
        dtype = AUTOCAST[self.precision]
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            yield

    def share(self, index: list[int]) -> list[int]:
        """Returns this process's part of a global batch: neighbours, sizes differing by at most one."""
        size, more = divmod(len(index), self.count)
        first = self.rank * size + min(self.rank, more)
        return index[first : first + size + (self.rank < more)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, in place; a missing one counts as zero."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES:
                self._sum(bucket)
                bucket = []
        if bucket:
            self._sum(bucket)

    def sum_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Adds up numbers by name over all processes; a process may lack some."""
        if self.count == 1:
            return numbers
        from accelerate.utils import gather_object

        total: dict[str, float] = {}
        for part in gather_object([numbers]):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def _sum(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        summed = self.accelerator.reduce(flat, reduction="sum")
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _one_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: torch cannot use it here; use cpu, or cuda with a GPU.") from None
    return device


@contextmanager
def deterministic() -> Iterator[None]:
    """Context with deterministic kernels and no TF32; the former settings are restored."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # slow, and nothing here reads it
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[3]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out, so that a smaller batch may help."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text
