"""Turns verdict rows into a data frame, CSV or Parquet: one row per verdict and seed, accuracies as 0..1."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS
from vlmdefend.reporting.verdicts.row import Proportion, VerdictRow

if TYPE_CHECKING:
    import pandas

_TYPES = {"text": "string", "whole": "Int64", "real": "Float64", "truth": "boolean"}


def frame(lines: Sequence[VerdictRow]) -> pandas.DataFrame:
    """Returns a data frame with one row per verdict row; values that were not measured are missing.

    ``adaptive`` (and, without a defense, ``transfer``) repeats ``whitebox`` where the attackers are the same;
    ``same_as_whitebox`` names those columns.
    """
    import pandas

    rows = [_row(line) for line in lines]
    columns = {}
    for name, kind in _columns().items():
        columns[name] = pandas.Series([row[name] for row in rows], dtype=_TYPES[kind])
    return pandas.DataFrame(columns)


def csv(lines: Sequence[VerdictRow]) -> str:
    """Returns the data frame as CSV text."""
    text: str = frame(lines).to_csv(index=False, lineterminator="\n")
    return text


def parquet(lines: Sequence[VerdictRow]) -> bytes:
    """Returns the data frame as the bytes of a Parquet file.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow, which is not installed: pip install 'vlmdefend[report]', or choose --format csv."
        ) from None
    buffer = io.BytesIO()
    frame(lines).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _columns() -> dict[str, str]:
    """Returns the columns in order, each with its kind (a key of ``_TYPES``)."""
    text = ("protocol", "protocol_hash", "model", "weights_hash", "defense", "defense_config", "paradigm")
    columns = dict.fromkeys(text, "text") | {"stochastic": "truth"}
    columns |= dict.fromkeys(("dataset", "split", "ids_hash", "prompts_hash", "norm"), "text")
    columns |= {"eps": "real", "seed": "whole", "n": "whole", "skipped": "whole"}
    for share in ("clean", *ATTACKERS, "worst"):
        columns |= {share: "real", f"{share}_low": "real", f"{share}_high": "real", f"{share}_count": "whole"}
    columns |= {"same_as_whitebox": "text"} | {f"{attacker}_attacks": "text" for attacker in ATTACKERS}
    columns |= {"certified": "text", "abstained": "real"}
    columns |= dict.fromkeys(("flags", "reasons", "notes", "errors", "devices", "batch_sizes"), "text")
    columns |= dict.fromkeys(_costs(), "real")
    return columns


def _costs() -> list[str]:
    from vlmdefend.reporting.verdicts.cost import PerImage

    return [name for name in PerImage.__dataclass_fields__ if name != "device"]


def _row(line: VerdictRow) -> dict[str, Any]:
    """Returns the values of one verdict row by column."""
    shares: dict[str, Proportion | None] = {"clean": line.clean, "worst": line.worst}
    for attacker in ATTACKERS:
        shares[attacker] = line.robust.get("whitebox" if attacker in line.same_as_whitebox else attacker)
    row: dict[str, Any] = {
        **asdict(line.pipeline),
        "paradigm": line.paradigm,
        "stochastic": line.stochastic,
        "norm": line.norm,
        "eps": line.eps,
        "seed": line.seeds[0],
        "n": line.n,
        "skipped": line.skipped,
        "same_as_whitebox": " ".join(line.same_as_whitebox),
        "flags": " ".join(line.flags),
        "reasons": json.dumps([reason.text for reason in line.reasons], ensure_ascii=False),
        "certified": json.dumps(dict(line.certified)) if line.certified else None,
        "abstained": line.abstained if line.clean else None,
        "notes": json.dumps(line.notes, ensure_ascii=False),
        "errors": json.dumps(line.errors, ensure_ascii=False),
        "devices": " ".join(line.devices),
        "batch_sizes": " ".join(map(str, line.batch_sizes)),
        **{f"{attacker}_attacks": ", ".join(line.attacks.get(attacker, ())) for attacker in ATTACKERS},
        **{name: getattr(line.cost, name) for name in _costs()},
    }
    for name, share in shares.items():
        low, high = (share.interval if share else None) or (None, None)
        row |= {
            name: share.value if share else None,
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_count": share.counts[0] if share else None,
        }
    return row
