from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub import constants, utils
from open_clip.transformer import QuickGELU

from vlmdefend.errors import UnknownName, UserError
from vlmdefend.models import load_model, names
from vlmdefend.models.clip import build
from vlmdefend.models.names import check_name, listed_models, model_names
from vlmdefend.models.weights.checkpoint import CONFIG, WEIGHTS
from vlmdefend.models.weights.fetch import DownloadError

from .conftest import CONFIGS, PREPROCESS, is_one_sentence, write_folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever imported the hub's client first, no test here waits for a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub seems reachable."""

    class Session:
        def head(self, url: str, timeout: float) -> None: ...

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)


def test_weights_that_cannot_be_had_are_one_sentence_within_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError) as raised:
        load_model("ViT-B/32", cache_dir=tmp_path)
    assert time.monotonic() - start < 5
    message = str(raised.value)
    assert is_one_sentence(raised.value)
    command = f"open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai', cache_dir='{tmp_path}')"
    for part in (str(tmp_path), command, "--weights FILE", "tiny-vit", "tiny-rn"):
        assert part in message


def test_the_default_cache_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match=str(tmp_path / "cache")):
        load_model("RN50:yfcc15m")


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached_is_queried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(timeout)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("tried to download"))
    with pytest.raises(DownloadError, match="no connection to the hub"):
        load_model("RN50", cache_dir=tmp_path)
    assert asked == [5]


def cached_repository(cache: Path, repo: str, folder: Path, weights: str = WEIGHTS) -> None:
    """``folder`` in the layout of the hub's cache."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abcd")
    shutil.copy(folder / CONFIG, snapshot / CONFIG)
    if weights.endswith(".bin"):
        torch.save(open_clip.factory.load_state_dict(str(folder / WEIGHTS)), snapshot / weights)
    else:
        shutil.copy(folder / WEIGHTS, snapshot / weights)


@pytest.mark.parametrize("weights", [WEIGHTS, "open_clip_pytorch_model.bin"])
def test_a_cached_repository_is_read_without_a_network(folders: dict[str, Path], tmp_path: Path, weights: str) -> None:
    cached_repository(tmp_path, "org/robust", folders["vit"], weights)
    model = load_model("hf-hub:org/robust", cache_dir=tmp_path, device="cpu")
    assert model.name == "hf-hub:org/robust"
    assert model.weights_hash == load_model(f"local-dir:{folders['vit']}", device="cpu").weights_hash


@pytest.fixture
def tiny_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The architectures of RN50 and ViT-B-32 shrunk, and their OpenAI weights in a cache."""
    for kind, name, repo in (
        ("rn", "RN50", "timm/resnet50_clip.openai"),
        ("vit", "ViT-B-32", "timm/vit_base_patch32_clip_224.openai"),
    ):
        for architecture, quick in ((name, False), (f"{name}-quickgelu", True)):
            config = {**CONFIGS[kind], "quick_gelu": quick}
            monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)
        cached_repository(tmp_path / "cache", repo, write_folder(tmp_path / kind, kind))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-32:openai", "ViT-B/32:openai", "ViT-B-32-quickgelu:openai"])
def test_openai_weights_come_with_quickgelu_and_no_remark(
    tiny_architectures: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    random, handlers = torch.get_rng_state(), list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(name, cache_dir=tiny_architectures, device="cpu")
    assert any(isinstance(m, QuickGELU) for m in model.clip.visual.modules())
    assert model.mean == open_clip.OPENAI_DATASET_MEAN
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == 0


def test_a_bare_openai_name_is_openais_model(tiny_architectures: Path) -> None:
    assert load_model("RN50", cache_dir=tiny_architectures, device="cpu").name == "RN50"


def test_an_architecture_with_local_weights_needs_no_tag(tiny_architectures: Path, tmp_path: Path) -> None:
    model = load_model("ViT-B-32", weights=tmp_path / "vit" / WEIGHTS, device="cpu")
    assert model.name == "ViT-B-32+open_clip_model"
    assert not any(isinstance(m, QuickGELU) for m in model.clip.modules())


@pytest.mark.parametrize("name", names.OPENAI)
def test_every_openai_name_is_an_architecture_with_openai_weights(name: str) -> None:
    blueprint = names._blueprint(name, has_weights=False, cache_dir=None)
    assert blueprint.config["model_cfg"]["quick_gelu"] is True
    assert "openai" in build.tags(names.OPENAI[name])
    with pytest.raises(DownloadError, match="-quickgelu', pretrained='openai'"):
        blueprint.weights()


def test_every_pair_of_open_clip_is_a_name_with_the_activation_it_was_trained_with() -> None:
    for architecture, tag in open_clip.list_pretrained():
        blueprint = names._blueprint(f"{architecture}:{tag}", has_weights=False, cache_dir=None)
        listed = open_clip.get_pretrained_cfg(architecture, tag)
        if listed.get("quick_gelu"):
            assert blueprint.config["model_cfg"]["quick_gelu"] is True
        assert blueprint.config["preprocess_cfg"]["mean"] == listed["mean"]


def test_an_architecture_alone_is_refused_with_its_tags() -> None:
    with pytest.raises(UserError, match=r"'ViT-B-16' is an architecture without weights.*laion2b_s34b_b88k.*--weights"):
        load_model("ViT-B-16")
    with pytest.raises(UserError, match=r"'coca_base' .*; give a local file with --weights"):
        load_model("coca_base")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-b/32", "did you mean 'ViT-B/32'"),
        ("tiny_vit", "did you mean 'tiny-vit'"),
        ("ViT-B-32:laion2b_s34b", "unknown tag of ViT-B-32 .*did you mean 'laion2b_s34b_b79k'"),
        ("resnet18", "unknown model"),
    ],
)
def test_unknown_names_say_what_is_near(name: str, words: str) -> None:
    with pytest.raises(UnknownName, match=words):
        load_model(name)
    with pytest.raises(UnknownName, match=words):
        check_name(name)


def test_a_folder_without_its_prefix_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"local-dir:{tmp_path}"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        load_model(f"local-dir:{tmp_path}/nowhere")


def test_check_name_finds_what_is_wrong_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "assemble", lambda *a, **k: pytest.fail("loaded"))
    check_name("ViT-B/32")
    check_name("hf-hub:org/name")
    check_name(f"local-dir:{folders['vit']}")
    check_name("ViT-B-32", weights=folders["vit"] / WEIGHTS)
    for name, weights in (("ViT-B/32", tmp_path / "no.pt"), ("ViT-B-32", None), (f"local-dir:{tmp_path}", None)):
        with pytest.raises(UserError):
            check_name(name, weights=weights)
    shutil.copy(folders["vit"] / CONFIG, tmp_path)
    with pytest.raises(UserError, match="has no weights"):
        check_name(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_embedded_models_are_compressed_folders(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / f"tiny-{kind}", kind, compressed=True)
    monkeypatch.setattr(names, "ASSETS", tmp_path)
    model = load_model(f"tiny-{kind}", device="cpu")
    assert (model.name, model.image_size) == (f"tiny-{kind}", 32)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", names.EMBEDDED)
def test_the_embedded_pair_loads(name: str) -> None:
    model = load_model(name, device="cpu")
    classifier = model.zero_shot(["cat", "dog"], ["a {c}"])
    assert classifier(torch.rand(2, 3, model.image_size, model.image_size)).logits.isfinite().all()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("found", [WEIGHTS, "open_clip_pytorch_model.bin"])
def test_downloads_take_the_first_file_that_exists(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    asked = []

    def download(repo: str, name: str, cache_dir: Any) -> str:
        asked.append(name)
        if name not in (CONFIG, found):
            raise utils.EntryNotFoundError("no such file")
        cache = tmp_path / "models--org--new"
        if not cache.exists():
            cached_repository(tmp_path, repo, folders["vit"], found)
        return str(cache / "snapshots" / "0123abcd" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = load_model("hf-hub:org/new", cache_dir=tmp_path, device="cpu")
    assert model.weights_hash == load_model(f"local-dir:{folders['vit']}", device="cpu").weights_hash
    assert asked == [CONFIG]  # the weights of this snapshot came with it


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (utils.EntryNotFoundError("404"), "org/new has no open_clip_config.json"),
        (utils.LocalEntryNotFoundError("lost"), "the connection broke"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("first line\n\nsecond"), "ValueError: first line"),
    ],
)
def test_a_failed_download_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DownloadError, match=words) as raised:
        load_model("hf-hub:org/new", cache_dir=tmp_path)
    assert is_one_sentence(raised.value)


def test_a_repository_name_without_an_owner_is_refused() -> None:
    with pytest.raises(UserError, match="hf-hub:ORG/NAME"):
        load_model("hf-hub:name")


def test_listing_and_completing_names_imports_no_torch() -> None:
    code = (
        "import sys; from vlmdefend.models.names import listed_models, model_names; "
        "listed_models(); print(len(model_names())); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_names_are_unique_and_listed() -> None:
    assert len(set(model_names())) == len(model_names())
    assert {"tiny-vit", "tiny-rn", "ViT-B/32", "RN50", "ViT-B-32"} <= set(model_names())
    short, long = listed_models(), listed_models(every_pair=True)
    assert [m.where for m in short[:2]] == ["embedded", "embedded"]
    assert "ViT-B-32:laion2b_s34b_b79k" in {m.name for m in long}
    assert len(long) > 100 > len(short)


def test_a_configuration_is_written_as_open_clip_reads_it(folders: dict[str, Path]) -> None:
    config = json.loads((folders["vit"] / CONFIG).read_text())
    assert config == {"model_cfg": CONFIGS["vit"], "preprocess_cfg": PREPROCESS}
