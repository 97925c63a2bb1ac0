"""Gradient queries replayed as one CUDA graph, where every query does the same work on other numbers.

A forward and a backward are hundreds of launches; for a small model they cost more than what they launch. The step
that follows is one kernel, which reads the graph's gradient where it lies, so it is left outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import Loss
from vlmdefend.attacks.view import Gradient, View

# Buffers that hold a query's results after every call of the function beside them.
Capture = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], Callable[[], None]]]

WARM = 2  # queries that run as usual first: kernels compile and libraries open then, which a capture forbids
WORTH = 50  # full batches below which a capture is not tried: it empties the allocator's cache, which costs like many


def cuda_capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Records the kernels that ``work`` launches; the first replay computes its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on loading data
        results = work()
    return results, graph.replay


def replayable(view: View, images: Tensor, criterion: Criterion) -> bool:
    """Returns whether a query can be replayed: a full batch on a GPU, without random draws, reference outputs or
    detector.
    """
    plain = view.samples == 1 and not view.stochastic and criterion.reference is None and view.labels is None
    return plain and images.is_cuda and len(images) == view.width


class ReplayedGradient:
    """``view.gradient`` for one run of an attack: replayed as a CUDA graph where possible, computed as usual elsewhere.

    Args:
        loss: what is raised.
        batches: how many full batches the run will query at most.
        capture: records work and returns how to repeat it.
    """

    def __init__(self, loss: Loss, batches: int, capture: Capture = cuda_capture) -> None:
        self.loss = loss
        self._capture = capture
        self._wanted = batches >= WORTH
        self._warm = 0
        self._images, self._criterion = torch.empty(0), Criterion(torch.empty(0))
        self._results: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, view: View, images: Tensor, criterion: Criterion) -> Gradient:
        """Returns what :meth:`View.gradient` returns; the caller may overwrite the pixels' gradient until the next
        call.
        """
        if not self._wanted or not replayable(view, images, criterion):
            return view.gradient(images, criterion, self.loss)
        if self._warm < WARM:
            self._warm += 1
            return view.gradient(images, criterion, self.loss)
        if self._replay is None and not self._record(view, images, criterion):
            return view.gradient(images, criterion, self.loss)
        return self._repeat(view, images, criterion)

    def _record(self, view: View, images: Tensor, criterion: Criterion) -> bool:
        """Records the graph; returns False, for the rest of the run too, if the pipeline does what no graph can hold
        (synchronise with the CPU).
        """
        self._images = images.clone()
        self._criterion = Criterion(
            criterion.labels.clone(), None if criterion.targets is None else criterion.targets.clone()
        )
        inner = View(view.pipeline, view.rng, width=view.width, detector_weight=view.detector_weight)
        nothing = torch.zeros((), dtype=torch.int64, device=images.device)

        def work() -> tuple[Tensor, ...]:
            inner.queries.zero_gradients = nothing
            found = inner.gradient(self._images, self._criterion, self.loss)
            return *found, inner.queries.zero_gradients

        try:
            self._results, self._replay = self._capture(work)
        except RuntimeError:  # also out of memory: the graph keeps memory of its own
            self._wanted = False
        return self._wanted

    def _repeat(self, view: View, images: Tensor, criterion: Criterion) -> Gradient:
        assert self._replay is not None
        self._images.copy_(images)
        self._criterion.labels.copy_(criterion.labels)
        if self._criterion.targets is not None and criterion.targets is not None:
            self._criterion.targets.copy_(criterion.targets)
        self._replay()
        logits, loss, pixels, dead = self._results
        view._count(backwards=1)
        view.queries.gradient_values += pixels.numel()
        view.queries.zero_gradients = view.queries.zero_gradients.to(dead.device) + dead
        return Gradient(logits.clone(), loss.clone(), pixels)
