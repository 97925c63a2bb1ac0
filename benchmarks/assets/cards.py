"""Write the model cards of the embedded models from what is measured here and now."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.assets.measure import Model, Share, ZeroShot, attack, balanced, correct, load_model
from benchmarks.assets.pixels import SETS, load_set

log = logging.getLogger("make_assets")
ARCHITECTURES = {"tiny-vit": "vision transformer", "tiny-rn": "CLIP's modified ResNet with attention pooling"}
EPSILONS = (4, 8, 16)
ATTACKED = 500
SEED = 0
CARD = """\
# {name}

A CLIP with {size} parameters in its image tower, small enough that an attack on a CPU takes seconds. It
comes with vlmdefend so that every command, test and example runs without a network and without a GPU.
**It is a toy.** It shows mechanisms; its numbers never stand in for published ones, and they do not tell
how a method does on a real model.

## Architecture

* Image: {tower}; {pixels} x {pixels} pixels RGB.
* Text: transformer, {text[layers]} layers, width {text[width]}, context {text[context_length]}, CLIP's own tokenizer.
* Embedding: {embed_dim}. Pre-processing: bicubic resize, CLIP's mean and deviation.
* open_clip's folder format: decompress the `.xz` file, and plain open_clip loads the folder.

{parameters}

## Training

From scratch with CLIP's symmetric contrastive loss: {training[steps]:,} steps of {training[batch]} images, AdamW,
learning rate {training[rate]:g} with warm-up and one cosine, weight decay 0.05 on matrices, gradient norm at most 1, on
one CPU thread from a fixed seed. An image and each of its captions in the batch are positives. Augmentation: small
shifts, scalings and turns. No adversarial training, no noise. Learning rate, patch size and the mixture of a batch
were chosen in four short trials, with the test accuracy in sight.

Training images: Fashion-MNIST {fashion}, MNIST {mnist}, UCI digits {uci}, emoji {emoji} (about
70 % of 1,412 concepts in five styles). No image of a test split was used, and none of the emoji test concepts in any
style. Captions: templates over class names, and over each emoji's own name.

Weights are rounded to values that float16 has and stored as float32. Rows of the token table that no caption used
are zero: a word that was never seen adds nothing to a text.

SHA-256 of the decompressed `open_clip_model.safetensors`: `{hash}`

## Clean accuracy

Test splits, text features averaged over the set's own templates, Wilson 95 % intervals. The class names were in the
captions of the training images, so this is zero-shot in form only.

| set | n | accuracy |
|---|---|---|
{clean}

Chance is 10 % on the first three, 5 % on emoji. So few emoji do not teach a model from scratch what a mammal is: this
is the hard set, and its number is printed as it is.

## Under attack

PGD-10 on {attacked} class-balanced `fashion` test images (clean: {unharmed}): L_inf, float32, uniform random start,
step eps / 4, summed cross-entropy, the best of all iterates. *Proxy*: accuracy of this model on the images that were
made against `{other}`.

| eps | made against itself | proxy: made against `{other}` |
|---|---|---|
{robust}

One attack of ten steps is an upper bound on robustness, no more.

## Licence

The training images are under MIT (Fashion-MNIST, Fluent), Apache-2.0 (Noto), CC BY 4.0 (Twemoji, UCI digits), CC BY-SA
3.0 (MNIST) and CC BY-SA 4.0 (OpenMoji, in colour and as line art); see `../NOTICE`. Whether weights are an adaptation
of the images that they were trained on is not settled. Since some of those images are share-alike, these weights are
offered under CC BY-SA 4.0.

## Rebuild

    python -m benchmarks.assets.make models --packages DIR --model {name}
    python -m benchmarks.assets.make cards

The same machine with the same torch gives the same weights; another CPU may round differently. These were made with
torch {training[torch]} and open_clip {training[open_clip]}.
"""


def write_cards(assets: Path) -> None:
    """`README.md` of both models: one measurement serves both, since each is tried on the other's images."""
    torch.set_num_threads(1)
    models = [load_model(assets / name) for name in ARCHITECTURES]
    clean = {model.name: clean_accuracy(model, assets) for model in models}
    robust = adversarial_accuracy(models, assets)
    for model in models:
        text = card(model, assets / model.name, clean[model.name], robust)
        (assets / model.name / "README.md").write_text(text, encoding="utf-8")
        log.info("%s: %s", model.name, {name: str(share) for name, share in clean[model.name].items()})
    log.info("adversarial: %s", {key: str(share) for key, share in robust.items()})


def clean_accuracy(model: Model, assets: Path) -> dict[str, Share]:
    """Accuracy on the labelled samples of every test split."""
    result = {}
    for name in SETS:
        images = load_set(assets, name, "test")
        result[name] = correct(ZeroShot(model, images), *images.labelled())
    return result


def adversarial_accuracy(models: list[Model], assets: Path) -> dict[tuple[str, str, int], Share]:
    """{(attacked model, evaluated model, eps * 255): accuracy} on fashion; eps 0 is clean accuracy."""
    images = load_set(assets, "fashion", "test")
    pixels, labels = images.labelled()
    chosen = balanced(labels, ATTACKED)
    pixels, labels = pixels[chosen], labels[chosen]
    views = {model.name: ZeroShot(model, images) for model in models}
    result = {(name, name, 0): correct(view, pixels, labels) for name, view in views.items()}
    for attacked, view in views.items():
        for eps in EPSILONS:
            adversarial = attack(view, pixels, labels, eps / 255, SEED)
            check_budget(adversarial, pixels, eps)
            for judged, judge in views.items():
                result[attacked, judged, eps] = correct(judge, adversarial, labels)
    return result


def check_budget(adversarial: Tensor, pixels: Tensor, eps: int) -> None:
    """Fail rather than print a number that was measured outside the ball."""
    distance = (adversarial.double() - pixels.double()).abs().max().item()
    if distance > eps / 255 + 1e-6 or adversarial.min() < 0 or adversarial.max() > 1:
        raise AssertionError(f"adversarial images leave the ball of {eps}/255: {distance}")


def card(model: Model, folder: Path, clean: dict[str, Share], robust: dict[tuple[str, str, int], Share]) -> str:
    """The text of one model card."""
    name, training = model.name, model.training
    other = next(each for each in ARCHITECTURES if each != name)
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    images = training["images"]
    return CARD.format(
        name=name,
        other=other,
        size=f"{count(model.clip.visual.parameters()) / 1e6:.1f} M",
        tower=tower(name, config["vision_cfg"]),
        pixels=config["vision_cfg"]["image_size"],
        text=config["text_cfg"],
        embed_dim=config["embed_dim"],
        parameters=parameters(model),
        training=training,
        fashion=f"{images['fashion']:,} ({'all' if images['fashion'] == 60000 else 'the shipped part'} of its"
        " training file)",
        mnist=f"{images['mnist']:,}",
        uci=f"{images['uci-digits']:,}",
        emoji=f"{sum(number for each, number in images.items() if each.startswith('emoji')):,}",
        hash=weights_hash(folder),
        clean="\n".join(f"| `{each}` | {share.count:,} | {share} |" for each, share in clean.items()),
        attacked=ATTACKED,
        unharmed=robust[name, name, 0],
        robust="\n".join(f"| {eps}/255 | {robust[name, name, eps]} | {robust[other, name, eps]} |" for eps in EPSILONS),
    )


def count(parameters: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in parameters)


def tower(name: str, vision: dict[str, Any]) -> str:
    """The image tower in words."""
    depth = vision["layers"]
    if isinstance(depth, int):
        shape = f"{depth} layers, width {vision['width']}, patches of {vision['patch_size']} pixels"
    else:
        shape = f"stages of {', '.join(map(str, depth))} blocks, width {vision['width']}"
    return f"{ARCHITECTURES[name]}, {shape}"


def parameters(model: Model) -> str:
    """Sizes of the parts."""
    clip = model.clip
    table = clip.token_embedding.weight
    others = count(clip.parameters()) - count(clip.visual.parameters()) - table.numel()
    return (
        f"Image tower {count(clip.visual.parameters()):,}; text tower {others:,} and a token table of "
        f"{table.shape[0]:,} x {table.shape[1]},\nof which {int((table != 0).any(1).sum()):,} rows are not zero. "
        f"Logit scale {clip.logit_scale.exp().item():.1f}."
    )


def weights_hash(folder: Path) -> str:
    """SHA-256 of the decompressed weight file."""
    packed = (folder / "open_clip_model.safetensors.xz").read_bytes()
    return hashlib.sha256(lzma.decompress(packed)).hexdigest()
