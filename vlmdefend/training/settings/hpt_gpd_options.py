"""HPT-GPD as a method of ``vlmdefend train``: options of ``train`` become those of ``distill``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.registry import parse_spec
from vlmdefend.training.settings.distill_settings import DistillSettings
from vlmdefend.training.settings.option_types import option
from vlmdefend.training.settings.train_settings import TrainSettings

HPT_GPD = "hpt-gpd"
NAMED = ("proxy", "target", "proxy_weights")  # of distill; train has --proxy, --model, --proxy-weights


def distill_options(given: Mapping[str, Any], proxy: str | None, proxy_weights: Path | None) -> dict[str, Any]:
    """Returns the options of ``distill`` that stand for ``train --method hpt-gpd --proxy P --model T ...``.

    Args:
        given: the options of ``train`` that were given; options that ``train`` does not have are written after the
            method, ``hpt-gpd:pull=0.5:epochs_a=1``.
        proxy: the model to learn from; proxy_weights: a local weights file for it.

    Raises:
        UserError: no proxy, or an option that ``distill`` does not have.
    """
    _, written = parse_spec(str(given["method"]))
    own = [name for name in DistillSettings.model_fields if name not in (*TrainSettings.model_fields, *NAMED)]
    if proxy is None:
        raise UserError("--method hpt-gpd: learns from another model; give it as --proxy, for example tiny-vit.")
    for name in written:
        if name not in own:
            if name in TrainSettings.model_fields:
                raise UserError(f"--method {given['method']}: give {name} as --{option(name)} instead.")
            raise did_you_mean("option of method hpt-gpd", name, own)
    shared = {name: value for name, value in given.items() if name not in ("method", "model")}
    for name, value in shared.items():
        if name not in DistillSettings.model_fields:
            raise UserError(f"--{option(name)} {value}: hpt-gpd has no such option; leave it out.")
    chosen = {"proxy": proxy, "target": given["model"], "proxy_weights": proxy_weights, **shared, **written}
    return {name: value for name, value in chosen.items() if value is not None}
