from __future__ import annotations

import pytest

from vlmdefend.data.class_names import CALTECH101, COUNTRY211, EUROSAT, FLOWERS102, GTSRB, imagenet_names
from vlmdefend.data.open import listed_datasets
from vlmdefend.data.prompts import TEMPLATES, templates_for


def test_every_template_has_exactly_a_place_for_the_class_name() -> None:
    for name in (*TEMPLATES, "imagenet", "unknown"):
        for template in templates_for(name):
            assert template.count("{") == template.count("{c}") == 1, (name, template)


def test_every_set_with_templates_is_listed() -> None:
    assert set(TEMPLATES) <= {line.name for line in listed_datasets()}


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("oxford-pets", 1, "a photo of a {c}, a type of pet."),
        ("food101", 1, "a photo of {c}, a type of food."),
        ("cifar10", 18, "a photo of a {c}."),
        ("dtd", 8, "a photo of a {c} texture."),
        ("caltech101", 34, "a photo of a {c}."),
        ("imagenet", 80, "a bad photo of a {c}."),
        ("caltech256", 1, "a photo of a {c}."),
    ],
)
def test_templates_are_those_clip_published(name: str, count: int, first: str) -> None:
    templates = templates_for(name)
    assert len(templates) == len(set(templates)) == count
    assert templates[0] == first


def test_typed_lists_have_one_name_a_class() -> None:
    counts = {"flowers": 102, "gtsrb": 43, "country": 211, "eurosat": 10}
    lists = {"flowers": FLOWERS102, "gtsrb": GTSRB, "country": COUNTRY211.values(), "eurosat": EUROSAT.values()}
    for name, names in lists.items():
        assert len(set(names)) == counts[name]
        assert all(n.strip() == n and n for n in names)
    assert list(COUNTRY211) == sorted(COUNTRY211)
    assert (COUNTRY211["DE"], COUNTRY211["ZW"], FLOWERS102[101]) == ("Germany", "Zimbabwe", "blackberry lily")
    assert CALTECH101["Faces"] == "off-center face"


def test_wordnet_ids_meet_the_right_imagenet_names() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names)
    known = {
        "n01440764": "tench",
        "n02012849": "crane bird",
        "n03126707": "construction crane",
        "n15075141": "toilet paper",
    }
    assert {wnid: names[wnid] for wnid in known} == known
