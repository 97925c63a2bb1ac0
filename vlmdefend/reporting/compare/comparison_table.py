"""Formats comparisons as a table for a terminal or a pull request, or as JSON for a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from textwrap import fill

from tabulate import tabulate

from vlmdefend.reporting.compare.compare import Comparison, PairedCounts
from vlmdefend.reporting.tables.groups import percent, plain
from vlmdefend.reporting.tables.markdown import escape
from vlmdefend.reporting.tables.terminal import NARROWEST
from vlmdefend.reporting.verdicts.attack_names import differing
from vlmdefend.types import format_eps


def verdict(comparison: Comparison, tolerance: float, alpha: float) -> str:
    """Returns ``REGRESSION``, ``DOUBTFUL`` (a new reason to doubt the number), or ``ok``."""
    if comparison.regressions(tolerance, alpha):
        return "REGRESSION"
    return "DOUBTFUL" if comparison.doubts else "ok"


def as_text(comparisons: Sequence[Comparison], tolerance: float, alpha: float) -> str:
    """Returns one table per data set and pair of models, 80 columns where names are short (-/+: lost and won)."""
    return "\n".join(
        f"{plain(title)}\n{tabulate(rows, headers='keys', tablefmt='plain', disable_numparse=True)}\n"
        + "".join(f"{fill(plain(sentence), NARROWEST)}\n" for sentence in sentences)
        for title, rows, sentences in _tables(comparisons, tolerance, alpha)
    )


def as_markdown(comparisons: Sequence[Comparison], tolerance: float, alpha: float) -> str:
    """Returns the tables in GitHub's Markdown."""
    parts = []
    for title, rows, sentences in _tables(comparisons, tolerance, alpha):
        safe = [{name: escape(cell) for name, cell in row.items()} for row in rows]
        table = tabulate(safe, headers="keys", tablefmt="pipe", disable_numparse=True)
        notes = "".join(f"- {escape(sentence)}\n" for sentence in sentences)
        parts.append(f"### {escape(title)}\n\n{table}\n" + (f"\n{notes}" if notes else ""))
    return "\n".join(parts)


def as_json(comparisons: Sequence[Comparison], tolerance: float, alpha: float) -> str:
    """Returns a list of objects: the setting, both measures with their counts, the verdict."""
    return json.dumps(
        [
            {
                **comparison.setting._asdict(),
                "model": list(comparison.models),
                **{name: vars(paired) for name, paired in comparison.measures.items()},
                "doubts": comparison.doubts,
                "regressions": comparison.regressions(tolerance, alpha),
                "verdict": verdict(comparison, tolerance, alpha),
            }
            for comparison in comparisons
        ],
        indent=2,
    )


def _tables(
    comparisons: Sequence[Comparison], tolerance: float, alpha: float
) -> list[tuple[str, list[dict[str, str]], list[str]]]:
    """Returns title, rows and sentences of each table."""
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        setting = comparison.setting
        about = (*comparison.models, setting.dataset, setting.split, setting.protocol, setting.norm)
        place = (*about, setting.ids_hash, setting.images_hash, setting.prompts_hash, setting.protocol_hash)
        groups.setdefault(place, []).append(comparison)
    tables = []
    for (old, new, dataset, split, protocol, norm, *hashes), same in groups.items():
        models = old if old == new else f"{old} → {new}"
        title = f"{models} on {dataset} ({split}, n = {same[0].clean.n}) · {norm} · protocol {protocol}"
        if sum(place[:6] == (old, new, dataset, split, protocol, norm) for place in groups) > 1:
            title += f" · images, prompts and settings #{' #'.join(word[:6] for word in hashes if word)}"
        names = _names(same)
        rows = [_row(names[c.setting], c, tolerance, alpha) for c in same]
        sentences = [line for c in same for line in _sentences(names[c.setting], c, tolerance, alpha)]
        tables.append((title, rows, sentences))
    return tables


def _names(comparisons: Sequence[Comparison]) -> dict[tuple[object, ...], str]:
    """Returns the name of each setting: its defense, the options that differ from others, and the seed if several."""
    configs = {c.setting: json.loads(c.setting.defense_config) for c in comparisons}
    seeds = len({c.setting.seed for c in comparisons}) > 1
    names: dict[tuple[object, ...], str] = {}
    for setting, config in configs.items():
        alike = [other for s, other in configs.items() if s.defense == setting.defense]
        seed = [f"seed {setting.seed}"] if seeds else []
        names[setting] = " ".join([setting.defense, *differing(config, alike), *seed])
    return names


def _row(name: str, comparison: Comparison, tolerance: float, alpha: float) -> dict[str, str]:
    """Returns the table row of a comparison, by column header."""
    clean, worst = comparison.clean, comparison.worst
    return {
        "defense": name,
        "eps": format_eps(comparison.setting.eps) if worst else "-",
        "clean": _change(clean),
        "-/+": f"{clean.lost}/{clean.won}",
        "worst": _change(worst) if worst else "-",
        " -/+": f"{worst.lost}/{worst.won}" if worst else "-",
        "": verdict(comparison, tolerance, alpha),
    }


def _sentences(name: str, comparison: Comparison, tolerance: float, alpha: float) -> list[str]:
    """Returns one sentence per regression and per new doubt of a comparison."""
    where = f"{name} {format_eps(comparison.setting.eps)}" if comparison.worst else name
    measures = comparison.measures
    fell = [
        f"REGRESSION {where}: {measure} {_change(measures[measure])} %, {measures[measure].lost} images lost and "
        f"{measures[measure].won} won of {measures[measure].n}, p {_p_text(measures[measure].p)}"
        for measure in comparison.regressions(tolerance, alpha)
    ]
    return [*fell, *(f"DOUBTFUL {where}: new is {doubt}" for doubt in comparison.doubts)]


def _change(paired: PairedCounts) -> str:
    return f"{percent(paired.before / paired.n)} → {percent(paired.after / paired.n)}"


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
