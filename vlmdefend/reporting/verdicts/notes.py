"""Notes on how the cells of a verdict row were combined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmdefend.evaluation.statistics.diagnostics import Result, attack_label, is_attacked
from vlmdefend.evaluation.statistics.rejection import rejection_text


def notes(results: Sequence[Result], ids: set[str]) -> Iterable[str]:
    """Yields one sentence per peculiarity of the cells; ``ids`` are the images that all of them have."""
    sizes = sorted({len(r.rows) for r in results})
    if any(len(r.rows) != len(ids) for r in results):
        span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        yield f"its cells cover different images ({span}); the numbers are over the {len(ids)} that all of them have"
    if skipped := max(len(r.record.skipped) for r in results):
        yield f"{skipped} unreadable image{'s' if skipped > 1 else ''} left out"
    for learned in sorted({r.record.learned_prompt for r in results} - {""}):
        yield f"the prompts are {learned} and the class name, not the protocol's templates"
    for name, word in (("batch_size", "batch sizes"), ("device", "devices")):
        values = sorted({getattr(r.record.cell, name) for r in results})
        if len(values) > 1:
            yield f"cells of several {word} ({', '.join(map(str, values))}) all count"
    for result in results:
        text = rejection_text(result.rows) if is_attacked(result.record.cell) else ""
        prompts = result.record.attacked_prompts[:1]
        for note in filter(None, (text, *(f"its prompts became {prompt!r} and the like" for prompt in prompts))):
            yield f"{result.record.cell.attacker} {attack_label(result.record.cell)}: {note}"
    keys = [r.record.key for r in results]
    if again := len(keys) - len(set(keys)):
        yield f"{again} of its cells came out differently when computed again; every outcome counts"
    predictions: dict[str, set[int]] = {}
    for result in results:
        for row in result.rows:
            predictions.setdefault(row.id, set()).add(row.clean_prediction)
    if differ := sum(len(seen) > 1 for seen in predictions.values()):
        yield f"clean predictions of {differ} images differ between its cells; clean counts those always right"
