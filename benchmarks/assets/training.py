"""Train the embedded models `tiny-vit` and `tiny-rn` from scratch, as CLIP is trained, on one CPU thread.

Two open_clip models of different architecture, small enough that an attack on a CPU takes seconds.
No adversarial training and no noise: they are meant to be broken.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import CLIP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.assets.captions import Captions
from benchmarks.assets.pixels import SETS, SIZE, ImageSet, augment, load_training_set

log = logging.getLogger("make_assets")
SEED = 0
BATCH = {"fashion": 160, "mnist": 32, "uci-digits": 14, "emoji": 50}
EACH_STYLE = BATCH["emoji"] // sum(name.startswith("emoji") for name in SETS)
CONTEXT = 24
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-vit": {
        "model": {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT},
        "steps": 4800,
        "rate": 1e-3,
    },
    "tiny-rn": {
        "model": {"embed_dim": 64, "vision_cfg": RESNET, "text_cfg": TEXT},
        "steps": 6000,
        "rate": 2e-3,
    },
}
PREPROCESS = {
    "size": [SIZE, SIZE],
    "mode": "RGB",
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def train_and_save(name: str, assets: Path, folder: Path, packages: Path | None, stop: int | None) -> None:
    """Train model `name` on the training splits under `assets` and write it to `folder`."""
    torch.set_num_threads(1)  # more threads change the order of sums, and with it the last bits
    torch.use_deterministic_algorithms(True)
    sets = [load_training_set(assets, each, packages) for each in SETS]
    log.info("%s: training on %s", name, {k: len(s.labels) for k, s in zip(SETS, sets, strict=True)})
    torch.manual_seed(SEED)
    model = CLIP(**MODELS[name]["model"])
    captions = Captions(sets, CONTEXT, SEED)
    train(model, captions, sets, MODELS[name]["rate"], MODELS[name]["steps"], stop)
    captions.restore_vocabulary(model)
    record = {
        "images": {each: len(images.labels) for each, images in zip(SETS, sets, strict=True)},
        "steps": min(MODELS[name]["steps"], stop or MODELS[name]["steps"]),
        "batch": sum(BATCH.values()),
        "rate": MODELS[name]["rate"],
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
    save_model(model, MODELS[name]["model"], record, folder)


def train(model: CLIP, captions: Captions, sets: list[ImageSet], rate: float, steps: int, stop: int | None) -> None:
    """Contrastive training with AdamW and one cosine cycle of `steps`, cut off after `stop`."""
    captions.shrink_vocabulary(model)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=rate, betas=(0.9, 0.98), eps=1e-6)
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    model.train()
    began, total = time.monotonic(), 0.0
    for step in range(min(steps, stop or steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        pixels, rows = draw_batch(sets, generator)
        tokens, positive = captions.draw(rows)
        images = (augment(pixels, generator) - mean) / deviation
        loss = contrastive_loss(model, images, tokens, positive)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        total += loss.item()
        if (step + 1) % 100 == 0:
            scale, seconds = model.logit_scale.exp().item(), time.monotonic() - began
            log.info("step %d loss %.4f scale %.1f %.0f s", step + 1, total / 100, scale, seconds)
            total = 0.0


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 5 % warm-up, then half a cosine."""
    warm_up = 0.05 * steps
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only: not for norms, biases, positions, tokens and the logit scale."""
    kept = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and "embedding" not in name for name, p in kept]
    return [
        {"params": [p for (_, p), d in zip(kept, decays, strict=True) if d], "weight_decay": 0.05},
        {"params": [p for (_, p), d in zip(kept, decays, strict=True) if not d], "weight_decay": 0.0},
    ]


def draw_batch(sets: list[ImageSet], generator: torch.Generator) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images (B, 3, 32, 32) in [0, 1] drawn with replacement, and their places as (set, row)."""
    rows: list[tuple[int, int]] = []
    for index, name in enumerate(SETS):
        count = BATCH.get(name, EACH_STYLE)
        drawn = torch.randint(len(sets[index].labels), (count,), generator=generator)
        rows += [(index, row) for row in drawn.tolist()]
    pixels = torch.stack([sets[index].pixels[row] for index, row in rows])
    return pixels.float() / 255, rows


def contrastive_loss(model: CLIP, images: Tensor, tokens: Tensor, positive: Tensor) -> Tensor:
    """CLIP's symmetric loss where an image has several captions and a caption several images.

    Args:
        model: the model.
        images: (B, 3, 32, 32), normalised.
        tokens: (T, context) the distinct captions of the batch.
        positive: (B, T) 1 where caption belongs to image; the target is uniform over the positives.
    """
    image_features = model.encode_image(images, normalize=True)
    text_features = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, T)
    to_text = nn.functional.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    to_image = nn.functional.cross_entropy(logits.T, (positive / positive.sum(0)).T)
    return (to_text + to_image) / 2


def save_model(model: CLIP, config: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
    """open_clip's folder format, the weights rounded to float16's values and compressed with LZMA.

    The file stays float32, so that plain open_clip loads it; the rounded-off bits are zeros, and
    zeros cost nothing once compressed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    weights = {
        name: value.half().float().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
    data = save(weights, metadata={"training": json.dumps(record)})  # one key: their order is not kept
    packed = lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)
    (folder / "open_clip_model.safetensors.xz").write_bytes(packed)
    log.info("%s: %.2f MB", folder.name, len(packed) / 1e6)
