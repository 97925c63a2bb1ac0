"""Tiny random models of each open_clip class, as folders in open_clip's format."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: no test waits for a network

import open_clip
import pytest
import torch
from safetensors.torch import save

torch.set_num_threads(1)

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    "rn": {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT, "quick_gelu": True},
    "siglip": {  # a text tower of its own and a bias on the logits
        "embed_dim": 32,
        "vision_cfg": VIT,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "coca": {
        "embed_dim": 32,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}


def write_folder(folder: Path, kind: str, *, compressed: bool = False) -> Path:
    """A random model of ``kind`` in ``folder``; its BatchNorm statistics are not the initial ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIGS[kind], "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = clip.state_dict()
        for name in state:
            if name.endswith("running_mean"):
                state[name].uniform_(-0.1, 0.1)
            elif name.endswith(("running_var", "bn3.weight")):  # the latter starts at zero
                state[name].uniform_(0.5, 1.5)
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"})
    if compressed:
        (folder / "open_clip_model.safetensors.xz").write_bytes(lzma.compress(content, preset=0))
    else:
        (folder / "open_clip_model.safetensors").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a folder that no test changes."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_folder(root / kind, kind) for kind in CONFIGS}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def is_one_sentence(error: BaseException) -> bool:
    message = str(error)
    return "\n" not in message and "Traceback" not in message and message.endswith((".", "?")) and len(message) < 900
