"""Batches of two domains: the order of their images, and the labels that each batch carries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training.adaptation.domains import write_domains
from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.training.adaptation.data import DomainImages, image_id, same_classes, unlabelled
from vlmdefend.training.loop.data import TrainingImages, batches


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingImages, TrainingImages]:
    root: Path = write_domains(tmp_path_factory.mktemp("domains"), train=4, test=1)
    light, dark = (load_dataset(f"folder:{root / name}", "train") for name in ("light", "dark"))
    return TrainingImages(light, PixelTransform(28)), TrainingImages(
        unlabelled(dark).select(range(7)), PixelTransform(28)
    )


def test_the_target_comes_alike_with_and_without_a_source(domains) -> None:
    source, target = domains
    both, alone = DomainImages(source, target, 20).order(0, "x"), DomainImages(None, target, 20).order(0, "x")
    assert [place.target for place in both] == [place.target for place in alone]
    assert all(place.source is None for place in alone)


def test_a_smaller_set_comes_again_in_another_order_under_another_id(domains) -> None:
    source, target = domains
    images = DomainImages(source, target, 21)
    order = images.order(0, "x")
    assert len(order) == len(images) == 21
    rounds = [[p.target.at for p in order[first : first + 7]] for first in (0, 7, 14)]
    assert all(sorted(turn) == list(range(7)) for turn in rounds)
    assert rounds[0] != rounds[1]
    ids = [name for part in images.stream(batches(order, 7)) for name in part.ids]
    assert len(set(ids)) == len(ids) == 42
    targets = Counter(image_id(name) for name in ids if name.startswith("target/"))
    assert targets == dict.fromkeys(target.images.ids, 3)


def test_a_batch_is_labelled_source_then_unknown_target(domains) -> None:
    source, target = domains
    images = DomainImages(source, target, 6)
    places = images.order(3, "x")
    batch = images.batch(places)
    assert batch.images.shape == (12, 3, 28, 28)
    assert batch.labels[6:].tolist() == [-1] * 6
    assert batch.labels[:6].tolist() == [source.images.labels[p.source.at] for p in places]
    assert torch.equal(batch.images[6:], target.batch([p.target.at for p in places]).images)


def test_orders_differ_by_epoch_and_seed_and_domain(domains) -> None:
    source, _ = domains
    images = DomainImages(source, source, 12)
    found = {tuple(p.source.at for p in images.order(*which)) for which in ((0, "a/0"), (0, "a/1"), (1, "a/0"))}
    found.add(tuple(p.target.at for p in images.order(0, "a/0")))
    assert len(found) == 4


def test_what_is_chosen_of_unlabelled_images_does_not_depend_on_their_classes(domains) -> None:
    from dataclasses import replace

    found = domains[0].images
    other = replace(found, labels=tuple((label + 1) % 3 for label in found.labels))
    assert found.subset(5).ids != unlabelled(found).subset(5).ids  # the one is balanced by class
    assert unlabelled(found).subset(5).ids == unlabelled(other).subset(5).ids


def test_classes_in_another_order_are_brought_into_the_sources(domains) -> None:
    from dataclasses import replace

    found = domains[0].images
    turned = replace(found, class_names=("square", "bar", "cross"))
    same = same_classes(found, turned)
    assert same.class_names == found.class_names
    names = [turned.class_names[label] for label in turned.labels]
    assert [same.class_names[label] for label in same.labels] == names


def test_no_domain_is_no_epoch() -> None:
    with pytest.raises(UserError, match="one domain at least"):
        DomainImages(None, None, 4)


LAYOUTS = {  # as the sets are distributed: domains, and what lies between a domain and its classes
    "Office-31": (("amazon", "webcam"), "images", ("back_pack", "bike", "mug")),
    "Office-Home": (("Art", "Real World"), "", ("Alarm_Clock", "Bed", "TV")),
    "VisDA-2017": (("train", "validation"), "", ("aeroplane", "car", "train")),
    "DomainNet": (("clipart", "quickdraw"), "", ("The_Eiffel_Tower", "airplane", "t-shirt")),
    "PACS": (("art_painting", "photo"), "", ("dog", "elephant", "guitar")),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_adaptation_sets_open_as_two_domains_of_the_same_classes(tmp_path: Path, layout: str) -> None:
    from PIL import Image

    from vlmdefend.training.adaptation.sets import open_sets
    from vlmdefend.training.settings.adaptation_settings import make_urda_settings

    domains, between, classes = LAYOUTS[layout]
    for domain in domains:
        for label, name in enumerate(classes):
            folder = tmp_path / domain / between / name
            folder.mkdir(parents=True)
            for i in range(15):
                Image.new("RGB", (10, 10), (80 * label, 5 * i, 0)).save(folder / f"{i}.jpg")
        if layout == "DomainNet":
            for split, chosen in (("train", range(12)), ("test", range(12, 15))):
                lines = [f"{domain}/{name}/{i}.jpg {k}" for k, name in enumerate(classes) for i in chosen]
                (tmp_path / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    given = {"source": f"domain:{tmp_path / domains[0]}", "target": f"domain:{tmp_path / domains[1]}"}
    sets = open_sets(make_urda_settings({**given, "out": tmp_path / "out", "backbone": "tiny-cnn"}))
    assert len(sets.source.class_names) == 3
    assert set(sets.target.labels) == {0}  # all alike: unknown
    assert set(sets.tested.labels) == {0, 1, 2}
    assert not set(sets.target.ids) & set(sets.tested.ids)
    assert not set(sets.source.ids) & set(sets.source_tested.ids)
    assert len(sets.target) + len(sets.tested) == 45
    red = [sets.tested.read(i).getpixel((0, 0))[0] for i in range(len(sets.tested))]
    assert all(abs(value - 80 * label) < 8 for value, label in zip(red, sets.tested.labels, strict=True))
