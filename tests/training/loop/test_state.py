"""The files of a run: whole or not there, and never mixed up with another run's."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmdefend.errors import Busy, StorageError, UserError
from vlmdefend.training.loop.folder import RunFolder
from vlmdefend.training.loop.log import Log, check_tracker
from vlmdefend.training.loop.state_file import load_state, optimizer_tensors, restore_optimizer, save_state, write_whole


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    groups = {"weights": {"a/b": torch.arange(3.0), "scalar": torch.tensor(2.5)}, "empty": {}}
    save_state(file, groups, {"position": [1, 2], "sums": {"loss": 0.1 + 0.2}})
    found, facts = load_state(file)
    assert found.keys() == groups.keys()
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in groups["weights"].items())
    assert facts == {"position": [1, 2], "sums": {"loss": 0.1 + 0.2}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b"not a state"])
def test_a_damaged_state_is_one_sentence(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "state.safetensors"
    save_state(file, {"weights": {"a": torch.zeros(4)}}, {})
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"is no whole training state .* delete it to start over"):
        load_state(file)


def test_a_full_disk_keeps_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    write_whole(file, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(kind: type[torch.optim.Optimizer]) -> None:
    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.Linear(3, 2)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return layer, kind(layer.parameters(), lr=0.1, **options)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer)
    tensors = {k: t.clone() for k, t in optimizer_tensors(optimizer, ["weight", "bias"]).items()}
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    step(layer, optimizer)

    again, restored = make()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(weights[name])
    restore_optimizer(restored, ["weight", "bias"], tensors)
    step(again, restored)
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.bias, layer.bias)


def test_the_log_forgets_steps_that_will_be_taken_again_and_lines_that_were_cut(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    with log.file.open("a") as stream:
        stream.write('{"step": 2, "los')
    assert [line["step"] for line in Log(tmp_path, 2).read()] == [1, 2]
    assert log.file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_second_process_waits_outside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.writing(), (folder.training / "lock").open("a+") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(Busy, match="another process trains into it"), folder.writing():
            pass
    with folder.writing():
        pass


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.writing():
        folder.check_settings({"eps": "8/255", "seed": 0})
        folder.check_settings({"eps": "8/255", "seed": 0})
        with pytest.raises(UserError, match="holds a run with seed = 0, now it is 1"):
            folder.check_settings({"eps": "8/255", "seed": 1})
    (folder.training / "settings.json").write_text(json.dumps({"eps": 1})[:-1])
    with pytest.raises(UserError, match="is not whole; delete"):
        folder.check_settings({"eps": 1})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        RunFolder(tmp_path / "out")


def test_no_tracker_needs_no_package() -> None:
    check_tracker(None)
