"""Reads run folders into results; writes nothing, so a read-only disk is fine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.store.run_folder import read_record, read_rows

PATTERN = "cells/*/record.json"


def load_runs(folders: Iterable[str | Path]) -> list[Result]:
    """Returns every finished or failed cell of these run folders, in a stable order.

    The same cell with the same rows in two folders is returned once; a cell that failed in one folder and is done in
    another counts as done. A cell with different rows in two folders is returned twice, and the verdict has a note on
    it.

    Raises:
        UserError: no such folder, no record in it, a record that is cut off, of a newer schema, or in conflict with
            its rows.
    """
    results = [_load(file) for folder in folders for file in _record_files(Path(folder).expanduser())]
    done = [r for r in results if r.record.status == "done"]
    finished = {r.record.key for r in done}
    failed = {r.record.key: r for r in results if r.record.status == "error" and r.record.key not in finished}
    outcomes: dict[str, list[Result]] = {}
    for result in done:
        same_cell = outcomes.setdefault(result.record.key, [])
        if all(result.rows != r.rows for r in same_cell):
            same_cell.append(result)
    return [*(result for same_cell in outcomes.values() for result in same_cell), *failed.values()]


def half_done_cells(folder: str | Path) -> list[Path]:
    """Returns the folders of the cells in a run folder that were started and not finished, sorted."""
    begun = (file.parent for file in Path(folder).expanduser().glob("cells/*/partial.jsonl"))
    return sorted(cell for cell in begun if not (cell / "record.json").exists())


def unfinished(folders: Iterable[str | Path]) -> int:
    """Returns the number of cells in these folders that were started and not finished."""
    return sum(len(half_done_cells(folder)) for folder in folders)


def only(
    results: Sequence[Result],
    *,
    models: Sequence[str] = (),
    defenses: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> list[Result]:
    """Returns the results of these models, defenses and datasets; an empty choice keeps all.

    Raises:
        UnknownName: for a name that no record has.
    """
    kept = list(results)
    for kind, wanted in (("model", models), ("defense", defenses), ("dataset", datasets)):
        known = sorted({getattr(r.record.cell, kind) for r in results})
        for name in wanted:
            if name not in known:
                here = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
                raise did_you_mean(kind, name, known, hint=f"The records have: {here}.")
        kept = [r for r in kept if not wanted or getattr(r.record.cell, kind) in wanted]
    if not kept:
        raise UserError("no record has this model, defense and dataset together; leave one of the filters out.")
    return kept


def _record_files(folder: Path) -> list[Path]:
    """Returns the record files of a run folder, sorted; an error names a likely folder if there are none."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give the --out folder of `vlmdefend evaluate`.")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the --out folder of `vlmdefend evaluate`, which holds cells/.")
    files = sorted(folder.glob(PATTERN))
    if files:
        return files
    if begun := unfinished([folder]):
        what = "the only cell is" if begun == 1 else f"all {begun} cells are"
        raise UserError(f"{folder}: {what} half done; run the same `vlmdefend evaluate` command again to finish.")
    inside = sorted({str(file.parents[2]) for file in folder.glob(f"*/{PATTERN}")})
    advice = (
        f"did you mean {' '.join(inside[:5])}?" if inside else "give the --out folder of a `vlmdefend evaluate` run."
    )
    raise UserError(f"{folder}: holds no record (looked for {PATTERN}); {advice}")


def _load(file: Path) -> Result:
    """Returns a record and its rows, checked against each other."""
    record = read_record(file)
    if record.status == "error":
        return Result(record, ())
    rows_file = file.with_name("rows.jsonl")
    rows = read_rows(rows_file)
    again = f"delete the folder {file.parent} and run the same command again."
    if len(rows) != record.n:
        raise UserError(f"{rows_file}: holds {len(rows)} images where its record says {record.n}; {again}")
    if len({row.id for row in rows}) != len(rows):
        raise UserError(f"{rows_file}: holds an image twice; {again}")
    counted = (sum(row.clean_correct for row in rows), sum(row.robust for row in rows))
    if counted != (record.clean_correct, record.robust):
        raise UserError(
            f"{rows_file}: {counted[0]} images are right and {counted[1]} robust, where its record says "
            f"{record.clean_correct} and {record.robust}; {again}"
        )
    return Result(record, rows)
