"""A kill at any byte loses at most the shard that was running."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.evaluation.conftest import Notes, bench, cell
from vlmdefend.errors import Busy, StorageError, UserError
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.store.records import Checks, Cost, ImageRow
from vlmdefend.evaluation.store.run_folder import Store, StoredShard, read_record, read_rows, write_atomically

ROW = ImageRow(
    id="zürich\u2028\n.png",
    label=0,
    clean_prediction=0,
    clean_margin=-0.1,
    adversarial_prediction=1,
    adversarial_margin=1 / 3,
    distance=1e-7,
    steps=3,
)


def shard(number: int) -> StoredShard:
    return StoredShard(number, [ROW, ROW], [], Cost(clean_images=2, clean_seconds=0.1), Checks(forwards_differ=True))


def test_a_partial_file_cut_at_any_byte_of_its_last_line_keeps_the_shards_before_it(tmp_path: Path) -> None:
    with Store(tmp_path).writing(cell()) as writer:
        file = writer.folder / "partial.jsonl"
        for number in range(3):
            writer.add(shard(number))
        content = file.read_bytes()
        last = content[:-1].rindex(b"\n") + 1
        for cut in range(last, len(content)):
            file.write_bytes(content[:cut])
            assert writer.finished_shards() == [shard(0), shard(1)], f"cut at byte {cut}"
            assert file.read_bytes() == content[:last], "what was cut is gone, so that the next shard starts a line"
        file.write_bytes(content)
        assert writer.finished_shards() == [shard(0), shard(1), shard(2)]


def test_a_cell_resumed_from_a_cut_at_any_byte_has_identical_rows(
    tmp_path: Path, progress: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tmp_path / "whole", batch_size=2, shard_size=4) as (evaluator, writer):
        finish = writer.finish
        monkeypatch.setattr(writer, "finish", lambda *args: None)
        record, _ = evaluator.run(writer, progress)
        partial = (writer.folder / "partial.jsonl").read_bytes()
        finish(record, [row for s in writer.finished_shards() for row in s.rows])
        expected = (writer.folder / "rows.jsonl").read_bytes()
    lines = partial.splitlines(keepends=True)
    assert len(lines) == 4
    before = b"".join(lines[:2])
    known: dict[int, StoredShard] = {}
    compute = CellEvaluator._shard

    def once(evaluator: CellEvaluator, number: int, index: list[int]) -> StoredShard:
        if number not in known:
            known[number] = compute(evaluator, number, index)
        return known[number]

    monkeypatch.setattr(CellEvaluator, "_shard", once)  # computed once, resumed for every byte
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the disk's own buffers are not what is cut here
    folder = tmp_path / "resumed"
    for cut in range(len(lines[2]) + 1):
        with bench(folder, batch_size=2, shard_size=4) as (evaluator, writer):
            (writer.folder / "partial.jsonl").write_bytes(before + lines[2][:cut])
            again, _ = evaluator.run(writer, progress)
            assert (writer.folder / "rows.jsonl").read_bytes() == expected, f"cut at byte {cut}"
            assert (again.checks, again.cost.attack_backwards) == (record.checks, record.cost.attack_backwards)
            (writer.folder / "record.json").unlink()


@pytest.mark.parametrize(
    "second",
    [b"{}\n", b"[1]\n", b"null\n", b"\n", b"\x00\xff\n", b'{"shard": 5}\n', b"0\n"],
)
def test_a_damaged_line_and_what_follows_it_is_computed_anew(second: bytes, tmp_path: Path) -> None:
    with Store(tmp_path).writing(cell()) as writer:
        writer.add(shard(0))
        file = writer.folder / "partial.jsonl"
        good = file.read_bytes()
        file.write_bytes(good + second + good)
        assert writer.finished_shards() == [shard(0)]
        assert file.read_bytes() == good


def test_shards_out_of_order_are_not_taken(tmp_path: Path) -> None:
    with Store(tmp_path).writing(cell()) as writer:
        for number in (0, 2):
            writer.add(shard(number))
        assert [s.number for s in writer.finished_shards()] == [0]


def test_a_kill_between_rows_and_record_finishes_without_computing(tmp_path: Path, progress: Notes) -> None:
    with bench(tmp_path) as (evaluator, writer):
        write = write_atomically
        with pytest.MonkeyPatch.context() as patch:

            def killed(file: Path, text: str) -> None:
                if file.name == "record.json":
                    raise KeyboardInterrupt
                write(file, text)

            patch.setattr("vlmdefend.evaluation.store.run_folder.write_atomically", killed)
            with pytest.raises(KeyboardInterrupt):
                evaluator.run(writer, progress)
        rows = (writer.folder / "rows.jsonl").read_bytes()
    with bench(tmp_path) as (evaluator, writer):
        evaluator._shard = lambda *args: pytest.fail("computed again")
        evaluator.run(writer, progress)
        assert (writer.folder / "rows.jsonl").read_bytes() == rows
        assert sorted(p.name for p in writer.folder.iterdir()) == ["lock", "record.json", "rows.jsonl"]


def test_a_cell_has_one_writer_and_the_lock_goes_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.writing(cell()):
        with pytest.raises(Busy, match="another process is writing this cell"), Store(tmp_path).writing(cell()):
            pass
        with store.writing(cell(seed=1)):
            pass
    with store.writing(cell()):
        pass


def test_a_failed_cell_keeps_its_shards(tmp_path: Path) -> None:
    with Store(tmp_path).writing(cell()) as writer:
        writer.add(shard(0))
        writer.fail("a reason")
        assert writer.finished_shards() == [shard(0)]
    record = Store(tmp_path).record(cell())
    assert record is not None
    assert (record.status, record.error) == ("error", "a reason")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    write_atomically(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert file.read_text() == "old"


def test_a_shard_that_cannot_be_flushed_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writing(cell()) as writer:
        writer.add(shard(0))
        good = (writer.folder / "partial.jsonl").read_bytes()

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left to write; finished cells are kept"):
            writer.add(shard(1))
        assert (writer.folder / "partial.jsonl").read_bytes() == good


def test_a_shard_whose_file_cannot_be_made_is_a_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writing(cell()) as writer:

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(StorageError, match="no space left"):
            writer.add(shard(0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a whole record"),
        ('{"schema_version": 1, "key": "ab', "is not a whole record"),
        ("[]", "is not a valid record"),
        ("{}", "is not a valid record"),
        ('{"schema_version": 2}', "has record schema 2, this vlmdefend reads up to 1; upgrade"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_sentence_with_its_file(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=reason) as raised:
        read_record(tmp_path / "record.json")
    assert str(tmp_path / "record.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_that_cannot_be_read_are_one_sentence_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(file)
    file.write_text(ROW.model_dump_json() + "\n" + ROW.model_dump_json()[:30])
    with pytest.raises(UserError, match="holds a line that is not a row") as raised:
        read_rows(file)
    assert str(file) in str(raised.value)


def test_a_name_with_line_breaks_stays_one_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW.model_dump_json() + "\n" + ROW.model_dump_json() + "\n", encoding="utf-8")
    assert read_rows(file) == [ROW, ROW]


def test_a_result_that_is_no_number_is_never_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        ImageRow(**{**ROW.model_dump(), "clean_margin": float("nan")})
