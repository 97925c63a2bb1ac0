"""The five emoji sets: the same concepts drawn by four vendors, and once more as black line art.

A concept is in one split in every style, so that a model trained on one style's training split has
seen none of the test concepts, in whatever style it meets them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from benchmarks.assets.packages import FLUENT, GOOGLE, OPENMOJI, TWITTER, AssetError, npm_archive, read_archive
from benchmarks.assets.shards import Sample

# Subcategories of Unicode with at least 12 members, and the word that a caption has for them.
CLASSES = {
    "animal-mammal": "mammal",
    "transport-ground": "land vehicle",
    "clothing": "garment",
    "sky & weather": "weather sign",
    "food-prepared": "meal",
    "tool": "tool",
    "place-building": "building",
    "sport": "sports item",
    "animal-bird": "bird",
    "drink": "drink",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "animal-marine": "sea animal",
    "plant-other": "plant",
    "animal-bug": "bug",
    "food-sweet": "dessert",
    "face-smiling": "smiling face",
    "transport-air": "aircraft",
    "plant-flower": "flower",
    "musical-instrument": "musical instrument",
}
TEMPLATES = ["an emoji of a {c}.", "an icon of a {c}.", "a drawing of a {c}."]
LEFT_OUT = {"Flags", "Symbols", "Component"}
SIZE = 32
QUALITY = 75
TEST_SHARE = 0.3

Splits: TypeAlias = dict[str, list[Sample]]


@dataclass(frozen=True)
class Concept:
    """What an emoji shows: code points without variation selectors, name, class and split."""

    key: str
    image: str
    name: str
    label: int | None
    split: str


def emoji_sets(packages: Path) -> dict[str, tuple[list[str], list[str], Splits]]:
    """{set name: (class names, templates, samples by split)} of the five styles."""
    google = read_archive(npm_archive(packages, GOOGLE), lambda p: p == "emoji.json" or "google/64/" in p)
    openmoji = read_archive(
        npm_archive(packages, OPENMOJI),
        lambda p: p.startswith(("color/svg/", "black/svg/", "data/openmoji.json")),
    )
    twitter = read_archive(npm_archive(packages, TWITTER), lambda p: "twitter/64/" in p)
    fluent = read_archive(npm_archive(packages, FLUENT), lambda p: p.startswith("assets/"))
    concepts = read_concepts(google["emoji.json"], openmoji["data/openmoji.json"])
    styles = {
        "emoji-google": by_code_points(google, "img/google/64/"),
        "emoji-twitter": by_code_points(twitter, "img/twitter/64/"),
        "emoji-fluent": by_code_points(fluent, "assets/"),
        "emoji-openmoji": by_code_points(openmoji, "color/svg/"),
        "emoji-sketch": by_code_points(openmoji, "black/svg/"),
    }
    return {
        name: (list(CLASSES.values()), TEMPLATES, draw(concepts, images, line_art=name == "emoji-sketch"))
        for name, images in styles.items()
    }


def read_concepts(emoji_json: bytes, openmoji_json: bytes) -> list[Concept]:
    """All concepts but flags, symbols and components; names are OpenMoji's, which are plain English."""
    names = {bare(entry["hexcode"]): entry["annotation"] for entry in json.loads(openmoji_json)}
    entries = [entry for entry in json.loads(emoji_json) if entry["category"] not in LEFT_OUT]
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in entries:
        subcategory = entry["subcategory"]
        groups[subcategory if subcategory in CLASSES else ""].append(entry)
    return [
        Concept(
            key=bare(entry["unified"]),
            image=entry["image"],
            name=names[bare(entry["unified"])],
            label=list(CLASSES).index(group) if group else None,
            split=split,
        )
        for group, members in groups.items()
        for entry, split in assign_splits(members)
    ]


def assign_splits(members: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], str]]:
    """Each concept of a class with its split, 30 % for test, chosen by a hash of its code points."""
    ordered = sorted(members, key=lambda entry: hashlib.sha256(bare(entry["unified"]).encode()).hexdigest())
    test = round(TEST_SHARE * len(ordered))
    for rank, entry in enumerate(ordered):
        yield entry, "test" if rank < test else "train"


def bare(code_points: str) -> str:
    """Code points in lower case without variation selectors, on which the vendors do not agree."""
    return "-".join(point for point in code_points.lower().split("-") if point != "fe0f")


def by_code_points(archive: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """{bare code points: image file} of one folder of an archive."""
    return {bare(Path(path).stem): data for path, data in archive.items() if path.startswith(folder)}


def draw(concepts: list[Concept], images: dict[str, bytes], line_art: bool) -> Splits:
    """The samples of one style; a concept that its vendor has not drawn is left out."""
    splits: Splits = {"train": [], "test": []}
    for concept in concepts:
        if concept.key in images:
            picture = on_white(images[concept.key]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            data = line_art_webp(picture) if line_art else colour_webp(picture)
            splits[concept.split].append(Sample(concept.key, data, "webp", concept.label, concept.name))
    return splits


def on_white(data: bytes) -> Image.Image:
    """An image file (PNG, WebP or SVG) over a white background, as RGB."""
    if data.lstrip().startswith((b"<svg", b"<?xml")):
        data = rasterise(data.decode())
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(image)
    return background.convert("RGB")


def rasterise(svg: str) -> bytes:
    """An SVG as PNG of 128x128; no system font is used, which would differ between machines."""
    try:
        import resvg_py
    except ImportError as error:
        raise AssetError("OpenMoji's drawings are rendered with resvg: pip install resvg-py") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, skip_system_fonts=True))


def colour_webp(image: Image.Image) -> bytes:
    """An image as lossy WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def line_art_webp(image: Image.Image) -> bytes:
    """16 levels of grey, then without loss: smaller than lossy WebP, and free of its ringing."""
    grey = image.convert("L").point(lambda value: round(value / 17) * 17)
    buffer = io.BytesIO()
    grey.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()
