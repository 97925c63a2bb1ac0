"""The device chooses the implementation, and one variable overrides it."""

from __future__ import annotations

import pytest
import torch

from vlmdefend.errors import UserError
from vlmdefend.kernels import dispatch
from vlmdefend.kernels.linf import linf_step_

CPU = torch.zeros(2, 3)


class OnGpu:
    """What dispatch asks of a CUDA tensor."""

    is_cuda, dtype = True, torch.float32

    def get_device(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.mark.parametrize("asked", ["", "reference"])
def test_the_cpu_takes_torch_without_the_operators_overhead(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, asked)
    assert not dispatch.uses_triton(CPU)
    assert not dispatch.through_op(CPU)


def test_a_gpu_takes_triton_where_it_is_installed_and_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_capable", lambda device: True)
    assert dispatch.uses_triton(OnGpu())  # type: ignore[arg-type]
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert not dispatch.uses_triton(OnGpu())  # type: ignore[arg-type]
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(dispatch, "_capable", lambda device: False)
    assert not dispatch.uses_triton(OnGpu())  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert not dispatch.uses_triton(OnGpu())  # type: ignore[arg-type]


def test_float64_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_capable", lambda device: True)
    monkeypatch.setattr(OnGpu, "dtype", torch.float64)
    assert not dispatch.uses_triton(OnGpu())  # type: ignore[arg-type]


def test_another_word_is_refused_with_the_two_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(UserError, match="VLMDEFEND_KERNELS='cuda': write reference or triton"):
        linf_step_(CPU.clone(), CPU.clone(), CPU, 0.1, 0.1)


def test_triton_on_the_cpu_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    with pytest.raises(UserError, match="the tensors are on the cpu"):
        linf_step_(CPU.clone(), CPU.clone(), CPU, 0.1, 0.1)
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(UserError, match="triton is not installed"):
        linf_step_(CPU.clone(), CPU.clone(), CPU, 0.1, 0.1)
