"""Opens an image set by its name, whatever its source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmdefend.data.base import ImageSet, ListedDataset, Source, check_limit
from vlmdefend.data.sources import SOURCES
from vlmdefend.errors import UnknownName, UserError, did_you_mean


def listed_datasets() -> list[ListedDataset]:
    """Returns every fixed name and every form such as ``folder:PATH``, source by source; imports no torch."""
    return [line for source in SOURCES for line in source().listed()]


def load_dataset(
    name: str,
    split: str = "test",
    *,
    limit: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> ImageSet:
    """Opens the image set called ``name``.

    Args:
        name: a fixed name (``fashion``, ``cifar10``; case and ``_`` for ``-`` do not matter), or a prefix and a
            path (``folder:PATH``, ``wds:PATH``).
        split: ``test`` or ``train``, or another split the set has.
        limit: keep this many images, a class-balanced choice fixed by ``seed``.
        seed: of that choice only.
        root: where downloaded sets lie; by default ``$VLMDEFEND_DATA``, else ``~/.cache/vlmdefend/data``.
        classes: class names instead of the set's own, one a class in the order of the labels.
        templates: prompts instead of the set's own, with ``{c}`` (or ``{}``) for the class name.

    Raises:
        UnknownName: with the nearest names.
        UserError: what is missing or does not fit, and what to do next.
    """
    check_limit(limit)
    source, full_name = _find(name)
    try:
        images = source.open(full_name, split, None if root is None else Path(root).expanduser())
    except OSError as error:
        reason = f"{error.filename or full_name} cannot be read ({error.strerror or error})"
        raise UserError(f"dataset {full_name}: {reason}; check the path and its permissions.") from None
    if classes is not None:
        images = replace(images, class_names=_checked_classes(images, classes))
    if templates is not None:
        images = replace(images, templates=_checked_templates(templates))
    return images.subset(limit, seed)


def _find(name: str) -> tuple[Source, str]:
    """Returns the source that opens ``name``, and the name as that source spells it."""
    sources = [source() for source in SOURCES]
    fixed = {line.name: source for source in sources for line in source.listed()}
    spelled = name.strip().lower().replace("_", "-")
    prefix, colon, rest = name.partition(":")
    for source in sources:
        if colon and source.prefix == prefix.lower():
            if not rest:
                raise UserError(f"dataset {name!r} lacks its path; write {source.listed()[0].name}.")
            return source, f"{source.prefix}:{rest}"
    if spelled in fixed and not fixed[spelled].prefix:
        return fixed[spelled], spelled
    family = [known for known in fixed if known.startswith(f"{spelled}:")]
    if family:
        raise UnknownName(f"dataset {name!r} is several sets; choose one of {', '.join(family)}.")
    if Path(name).expanduser().is_dir():
        raise UnknownName(f"unknown dataset {name!r}; to read that folder write folder:{name} or wds:{name}.")
    raise did_you_mean("dataset", name, list(fixed))


def _checked_classes(images: ImageSet, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the user's class names in place of the set's; refuses another number of names."""
    if len(classes) != len(images.class_names):
        raise UserError(
            f"dataset {images.name} has {len(images.class_names)} classes, but {len(classes)} class names were given; "
            f"give one a class, in the order of {', '.join(images.class_names[:3])} ..."
        )
    return tuple(classes)


def _checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates; refuses one without a place for the class."""
    if isinstance(templates, str) or not templates:
        raise UserError(f"prompt templates {templates!r}: give a list of at least one, such as 'a photo of a {{c}}.'")
    checked = tuple(template.replace("{}", "{c}") for template in templates)
    for template in checked:
        if "{c}" not in template or re.search(r"[{}]", template.replace("{c}", "")):
            raise UserError(
                f"prompt template {template!r}: write {{c}} where the class name goes, and no other braces."
            )
    return checked
