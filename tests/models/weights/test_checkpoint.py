from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.models.conftest import is_one_sentence, write_folder
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip import folder as folder_module
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.weights.checkpoint import CONFIG, METADATA, WEIGHTS, read_weights

CLASSES, TEMPLATES = ["cat", "dog"], ["a photo of a {c}."]


class Runs:
    """A pickle of it creates the file ``proof`` when it is opened carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_a_saved_model_is_read_by_plain_open_clip_and_by_us(
    folders: dict[str, Path], images: Tensor, tmp_path: Path, kind: str
) -> None:
    model = load_model(f"local-dir:{folders[kind]}", device="cpu")
    folder = save_folder(model, tmp_path / "new" / "model", {"made_by": "test"})
    name = f"local-dir:{folder}"
    again = load_model(name, device="cpu")
    assert torch.equal(
        again.zero_shot(CLASSES, TEMPLATES)(images).logits, model.zero_shot(CLASSES, TEMPLATES)(images).logits
    )
    assert again.weights_hash == model.weights_hash
    assert (again.mean, again.std, again.preprocess_cfg) == (model.mean, model.std, model.preprocess_cfg)

    plain, _, preprocess = open_clip.create_model_and_transforms(name)
    assert preprocess.transforms[-1].mean == [0.5, 0.4, 0.3]
    texts = open_clip.get_tokenizer(name)(["a photo of a cat.", "a photo of a dog."])
    pixels = (images - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.no_grad():
        features = plain.eval().encode_image(pixels, normalize=True), plain.encode_text(texts, normalize=True)
        logits = plain.logit_scale.exp() * features[0] @ features[1].T
        logits = logits if plain.logit_bias is None else logits + plain.logit_bias
    torch.testing.assert_close(model.zero_shot(CLASSES, TEMPLATES)(images).logits, logits, rtol=1e-5, atol=1e-5)


def test_metadata_says_what_a_model_was_made_from(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(f"local-dir:{folders['vit']}", device="cpu")
    folder = save_folder(
        model, tmp_path / "model", {"base_model": "tiny-vit", "how": {"objective": "fare", "eps": 0.1}}
    )
    facts = json.loads((folder / METADATA).read_text())
    assert facts["base_model"] == "tiny-vit"
    assert facts["how"] == {"objective": "fare", "eps": 0.1}
    assert facts["weights_hash"] == model.weights_hash
    with safe_open(folder / WEIGHTS, "pt") as opened:
        header = opened.metadata()
    assert (header["base_model"], json.loads(header["how"])["eps"]) == ("tiny-vit", 0.1)
    assert set(header) == {"format", "vlmdefend", "base_model", "how", "weights_hash"}
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode


def test_a_new_folder_appears_whole_or_not_at_all(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        save_folder(load_model(f"local-dir:{folders['vit']}", device="cpu"), tmp_path / "model", {})
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_model_and_keeps_what_lies_beside_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    model = load_model(f"local-dir:{folders['vit']}", device="cpu")
    save_folder(model, target, {})
    (target / "log.txt").write_text("kept")
    model.clip.visual.proj.add_(1)
    save_folder(model, target, {})
    assert load_model(f"local-dir:{target}", device="cpu").weights_hash == model.weights_hash
    other = load_model(f"local-dir:{folders['rn']}", device="cpu")
    save_folder(other, target, {})
    assert load_model(f"local-dir:{target}", device="cpu").weights_hash == other.weights_hash
    assert sorted(f.name for f in target.iterdir()) == sorted(["log.txt", CONFIG, METADATA, WEIGHTS])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_a_kill_while_replacing_never_leaves_a_mixed_model(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, kind: str
) -> None:
    old = load_model(f"local-dir:{folders['vit']}", device="cpu")
    target = save_folder(old, tmp_path / "model", {})
    new = load_model(f"local-dir:{folders[kind]}", device="cpu")
    new.clip.logit_scale.add_(1)
    replace, done = Path.replace, []

    def killed(self: Path, to: Path) -> Path:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(to)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_folder(new, target, {})
    if (target / WEIGHTS).exists():
        assert load_model(f"local-dir:{target}", device="cpu").weights_hash in (old.weights_hash, new.weights_hash)
    else:
        assert kind == "rn"
        with pytest.raises(UserError, match="has no weights"):
            load_model(f"local-dir:{target}", device="cpu")


def test_a_folder_that_is_no_model_is_not_written_into(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    model = load_model(f"local-dir:{folders['vit']}", device="cpu")
    with pytest.raises(UserError, match="holds no model"):
        save_folder(model, tmp_path, {})
    with pytest.raises(UserError, match="is a file"):
        save_folder(model, tmp_path / "thesis.tex", {})
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def _truncated(file: Path) -> None:
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])


def _legacy_truncated(file: Path) -> None:
    torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-500])


BAD_FILES: dict[str, tuple[str, Any, str]] = {
    "missing": ("w.pt", lambda file: None, "no such file"),
    "folder": ("w", lambda file: file.mkdir(), "is a folder; .*local-dir:"),
    "empty": ("w.pt", lambda file: file.write_bytes(b""), "is empty"),
    "web page": ("w.pt", lambda file: file.write_text("\n<!DOCTYPE html><html>404</html>"), "is a web page"),
    "pointer": (
        "w.safetensors",
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git-lfs pointer",
    ),
    "truncated safetensors": ("w.safetensors", lambda file: file.write_bytes(b"\x40\0\0\0\0\0\0\0{}"), "cut short"),
    "not safetensors": ("w.safetensors", lambda file: file.write_bytes(b"hello" * 99), "not a safetensors file"),
    "truncated xz": ("w.safetensors.xz", lambda file: file.write_bytes(b"\xfd7zXZ\0abc"), "cut short"),
    "truncated zip": ("w.pt", _truncated, "cut short"),
    "truncated legacy pickle": ("w.pth", _legacy_truncated, "cut short"),
    "text": ("w.pt", lambda file: file.write_text("hello world " * 9), "not a file of weights"),
    "zeros": ("w.pt", lambda file: file.write_bytes(bytes(1000)), "not a file of weights"),
    "other objects": ("w.pt", lambda file: torch.save({"args": argparse.Namespace(a=1)}, file), "tensors alone"),
    "whole module": ("w.pt", lambda file: torch.save(torch.nn.Linear(1, 1), file), "tensors alone"),
    "no tensors": ("w.pt", lambda file: torch.save({"epoch": 3}, file), "holds no named tensors"),
    "a list": ("w.pt", lambda file: torch.save([torch.ones(1)], file), "holds no named tensors"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_weights_file_is_one_sentence(tmp_path: Path, case: str) -> None:
    name, write, words = BAD_FILES[case]
    write(tmp_path / name)
    with pytest.raises(UserError, match=words) as raised:
        read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert is_one_sentence(raised.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(UserError, match=r"TorchScript .*torch.save\(torch.jit.load\('.*ViT-B-32.pt'") as raised:
        read_weights(tmp_path / "ViT-B-32.pt")
    assert is_one_sentence(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, zipped: bool) -> None:
    proof, content = tmp_path / "proof", {"state_dict": Runs(tmp_path / "proof")}
    if zipped:
        torch.save(content, tmp_path / "w.pt")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="nothing else is opened"):
        read_weights(tmp_path / "w.pt")
    assert not proof.exists()


def test_a_folder_with_a_malicious_pickle_is_not_opened_carelessly(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit")
    (folder / WEIGHTS).unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs(tmp_path / "proof")}))
    with pytest.raises(UserError, match="nothing else is opened"):
        load_model(f"local-dir:{folder}", device="cpu")
    assert not (tmp_path / "proof").exists()


def test_a_folder_with_tensors_in_a_pickle_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit")
    torch.save(read_weights(folder / WEIGHTS), folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    expected = load_model(f"local-dir:{folders['vit']}", device="cpu").weights_hash
    assert load_model(f"local-dir:{folder}", device="cpu").weights_hash == expected


def _edit(config: Path, **model_cfg: Any) -> None:
    content = json.loads(config.read_text())
    content["model_cfg"].update(model_cfg)
    config.write_text(json.dumps(content))


BAD_FOLDERS: dict[str, tuple[Any, str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "truncated weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        f"{WEIGHTS} is cut short",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing"),
    "config that is not JSON": (lambda f: (f / CONFIG).write_text("{oops"), f"{CONFIG} is not readable JSON"),
    "config that is a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} does not describe a model"),
    "config without a text tower": (
        lambda f: (f / CONFIG).write_text('{"model_cfg": {"embed_dim": 1, "vision_cfg": {}}}'),
        "must hold embed_dim, vision_cfg and text_cfg",
    ),
    "config with an unknown option": (lambda f: _edit(f / CONFIG, depth=3), f"{CONFIG} cannot be built"),
    "config with an impossible value": (lambda f: _edit(f / CONFIG, vision_cfg={"layers": "x"}), "cannot be built"),
    "another width": (
        lambda f: _edit(f / CONFIG, embed_dim=48),
        r"does not fit the model: text_projection is \(32, 32\) where",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_model_folder_is_one_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    damage, words = BAD_FOLDERS[case]
    folder = write_folder(tmp_path / "model", "vit")
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        load_model(f"local-dir:{folder}", device="cpu")
    assert str(folder) in str(raised.value)
    assert is_one_sentence(raised.value)


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
def test_weights_replace_a_models_own(folders: dict[str, Path], tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save_file

    state = read_weights(folders["vit"] / WEIGHTS)
    state["visual.proj"] = state["visual.proj"] + 1
    file = tmp_path / f"robust.{ending}"
    if ending == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    model = load_model(f"local-dir:{folders['vit']}", weights=file, device="cpu")
    assert torch.equal(model.clip.visual.proj, state["visual.proj"])
    assert model.name == f"local-dir:{folders['vit']}+robust"


@pytest.mark.parametrize("key", ["state_dict", "vision_encoder_state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_nested_dictionaries_and_wrappers_prefixes_are_opened(tmp_path: Path, key: str, prefix: str) -> None:
    torch.save({key: {f"{prefix}a.weight": torch.ones(2)}, "epoch": 3, "name": "x"}, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt")) == ["a.weight"]


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_weights_of_an_image_tower_alone_keep_the_models_text_tower(
    folders: dict[str, Path], tmp_path: Path, images: Tensor, prefix: str, kind: str
) -> None:
    name = f"local-dir:{folders[kind]}"
    before = load_model(name, device="cpu")
    tower = {k: v + 0.01 if v.is_floating_point() else v for k, v in before.clip.visual.state_dict().items()}
    torch.save({"vision_encoder_state_dict": {prefix + k: v for k, v in tower.items()}}, tmp_path / "robust.pt")
    after = load_model(name, weights=tmp_path / "robust.pt", device="cpu")
    for key, value in after.clip.visual.state_dict().items():
        assert torch.equal(value, tower[key])
    assert torch.equal(after.text_features(CLASSES, TEMPLATES), before.text_features(CLASSES, TEMPLATES))


def test_an_image_tower_whose_text_tower_cannot_be_had_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit")
    (folder / WEIGHTS).unlink()
    tower = {k: v for k, v in read_weights(folders["vit"] / WEIGHTS).items() if k.startswith("visual.")}
    torch.save(tower, tmp_path / "robust.pt")
    with pytest.raises(UserError, match=r"robust.pt holds an image tower alone, and .* has no weights"):
        load_model(f"local-dir:{folder}", weights=tmp_path / "robust.pt", device="cpu")


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit the model") as raised:
        load_model(f"local-dir:{folders['vit']}", weights=folders["rn"] / WEIGHTS, device="cpu")
    assert str(folders["rn"] / WEIGHTS) in str(raised.value)
    assert is_one_sentence(raised.value)
