"""Gradient queries replayed as one CUDA graph, where every query is the same work on other numbers.

A forward and a backward are hundreds of launches; for a small model they cost more than what they launch. The step
that follows is one kernel, which reads the graph's gradient where it lies, so it is left outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Goal
from vlmdefend.attacks.losses import Loss
from vlmdefend.attacks.view import Gradient, View

# Buffers that hold a query's results after every call of the function beside them.
Capture = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], Callable[[], None]]]

WARM = 2  # queries that run as usual first: kernels compile and libraries open then, which a capture forbids
WORTH = 50  # full batches below which a capture is not tried: it empties the allocator's cache, which costs like many


def cuda_capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Record what ``work`` launches; the first replay computes its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on loading data
        results = work()
    return results, graph.replay


def replayable(view: View, images: Tensor, goal: Goal) -> bool:
    """A full batch on a GPU, and a query that draws nothing, compares with nothing and ranks by no detector."""
    plain = view.samples == 1 and not view.stochastic and goal.reference is None and view.labels is None
    return plain and images.is_cuda and len(images) == view.width


class ReplayedGradient:
    """``view.gradient`` for one run of an attack: replayed where that can be done, and as usual where it cannot.

    Args:
        loss: what is raised.
        batches: how many full batches the run will ask for at most.
        capture: records work and says how to repeat it.
    """

    def __init__(self, loss: Loss, batches: int, capture: Capture = cuda_capture) -> None:
        self.loss = loss
        self._capture = capture
        self._wanted = batches >= WORTH
        self._warm = 0
        self._images, self._goal = torch.empty(0), Goal(torch.empty(0))
        self._results: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, view: View, images: Tensor, goal: Goal) -> Gradient:
        """As :meth:`View.gradient`; the pixels' gradient is the caller's to overwrite until the next call."""
        if not self._wanted or not replayable(view, images, goal):
            return view.gradient(images, goal, self.loss)
        if self._warm < WARM:
            self._warm += 1
            return view.gradient(images, goal, self.loss)
        if self._replay is None and not self._record(view, images, goal):
            return view.gradient(images, goal, self.loss)
        return self._repeat(view, images, goal)

    def _record(self, view: View, images: Tensor, goal: Goal) -> bool:
        """False, for the rest of the run too, if the pipeline does what no graph can hold, such as ask the CPU."""
        self._images = images.clone()
        self._goal = Goal(goal.labels.clone(), None if goal.targets is None else goal.targets.clone())
        inner = View(view.pipeline, view.rng, width=view.width, detector_weight=view.detector_weight)
        nothing = torch.zeros((), dtype=torch.int64, device=images.device)

        def work() -> tuple[Tensor, ...]:
            inner.ledger.zero_gradients = nothing
            found = inner.gradient(self._images, self._goal, self.loss)
            return *found, inner.ledger.zero_gradients

        try:
            self._results, self._replay = self._capture(work)
        except RuntimeError:  # also out of memory: the graph keeps memory of its own
            self._wanted = False
        return self._wanted

    def _repeat(self, view: View, images: Tensor, goal: Goal) -> Gradient:
        assert self._replay is not None
        self._images.copy_(images)
        self._goal.labels.copy_(goal.labels)
        if self._goal.targets is not None and goal.targets is not None:
            self._goal.targets.copy_(goal.targets)
        self._replay()
        logits, loss, pixels, dead = self._results
        view._count(backwards=1)
        view.ledger.gradient_values += pixels.numel()
        view.ledger.zero_gradients = view.ledger.zero_gradients.to(dead.device) + dead
        return Gradient(logits.clone(), loss.clone(), pixels)
