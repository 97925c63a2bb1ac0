"""An adversarially trained tiny-vit: what attacks are measured on where the undefended model only falls."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed.subjects import pixels_of
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.evaluation.grid.protocol import get_protocol
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.models import load_model
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.clip.vision_language import VisionLanguageModel

EPS, ATTACK_STEPS, STEPS, BATCH, RATE = 8 / 255, 3, 1500, 64, 3e-4
CACHE = Path("~/.cache/vlmdefend/bench-robust-vit").expanduser()


def robust_model() -> VisionLanguageModel:
    """Plain adversarial training on `fashion` (Madry et al. 2018), about five minutes; kept in the user's cache."""
    if not (CACHE / "open_clip_config.json").exists():
        save_folder(_train(), CACHE, {"made_by": "benchmarks/quality/robust_model.py"})
    return load_model(f"local-dir:{CACHE}", device="cpu")


def _train() -> VisionLanguageModel:
    model = load_model("tiny-vit", device="cpu")
    images = load_dataset("fashion", "train", limit=None)
    batch, _ = load_batch(images, range(len(images)), pixels_of(model), skip_bad=False)
    text = model.text_features(images.class_names, tuple(get_protocol("unified").templates))
    classifier = model.zero_shot(images.class_names, tuple(get_protocol("unified").templates))
    tower = list(model.clip.visual.parameters())
    optimizer = torch.optim.AdamW(tower, lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    rng = torch.Generator().manual_seed(0)
    assert text is not None
    for step in range(STEPS):
        chosen = torch.randint(len(batch.images), (BATCH,), generator=rng)
        clean, labels = batch.images[chosen], batch.labels[chosen]
        x = (clean + (torch.rand(clean.shape, generator=rng) * 2 - 1) * EPS).clamp_(0, 1)
        for _ in range(ATTACK_STEPS):
            pixels = x.detach().requires_grad_(True)
            loss = F.cross_entropy(classifier(pixels).logits, labels, reduction="sum")
            linf_step_(x, torch.autograd.grad(loss, pixels)[0], clean, EPS / 2, EPS)
        for parameter in tower:
            parameter.requires_grad_(True)
        loss = F.cross_entropy(classifier(x).logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in tower:
            parameter.requires_grad_(False)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"adversarial training, step {step} of {STEPS}: loss {loss.item():.3f}", flush=True)
    return model


if __name__ == "__main__":
    robust_model()
