from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdefend.data import load_dataset
from vlmdefend.data.base import BadImage
from vlmdefend.data.shards import read_shard
from vlmdefend.errors import UserError

Layout = Callable[..., Path]
Encode = Callable[..., bytes]
Members = list[tuple[str, bytes]]


def members(encode: Encode, first: int, count: int) -> Members:
    return [
        m
        for i in range(first, first + count)
        for m in ((f"s{i:03d}.png", encode(i)), (f"s{i:03d}.cls", b"%d" % (i % 2)))
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_shards_are_read_in_order_with_names_and_templates(layout: Layout, encode: Encode, suffix: str) -> None:
    shards = {i: members(encode, 2 * i, 2) for i in range(11)}  # 10.tar comes after 9.tar
    images = load_dataset(f"wds:{layout(shards, suffix=suffix)}")
    assert images.ids == tuple(f"s{i:03d}" for i in range(22))
    assert images.labels == (0, 1) * 11
    assert images.class_names == ("cat", "dog")
    assert images.templates == ("a drawing of a {c}.",)
    expected = encode(21)
    from PIL import Image

    assert images.read(21).tobytes() == Image.open(io.BytesIO(expected)).tobytes()


def test_a_shard_written_by_the_webdataset_package_is_read(tmp_path: Path, encode: Encode) -> None:
    import webdataset

    (tmp_path / "test").mkdir()
    with webdataset.TarWriter(str(tmp_path / "test" / "0.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"deep/s{i}", "webp": encode(i, file_format="WEBP", lossless=True), "cls": i % 2})
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    images = load_dataset(f"wds:{tmp_path}")
    assert images.ids == ("deep/s0", "deep/s1", "deep/s2")
    assert images.labels == (0, 1, 0)
    assert images.read(2).size == (6, 5)


def test_a_single_tar_finds_its_names_beside_it_or_one_folder_up(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 2), 1: members(encode, 2, 2)})
    assert load_dataset(f"wds:{folder / 'test' / '1.tar'}").ids == ("s002", "s003")


def test_keys_that_start_anew_in_each_shard_get_the_shards_name(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 1), 1: members(encode, 0, 1)})
    assert load_dataset(f"wds:{folder}").ids == ("0.tar/s000", "1.tar/s000")


def test_val_serves_as_test_and_a_missing_split_lists_the_others(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 2)}, split="val")
    assert len(load_dataset(f"wds:{folder}")) == 2
    with pytest.raises(UserError, match=r"no split 'train' .*it has val"):
        load_dataset(f"wds:{folder}", "train")


def test_a_caption_without_a_label_is_training_material_and_left_out(layout: Layout, encode: Encode) -> None:
    extra = [("other.png", encode(9)), ("other.txt", b"a kiwi bird"), ("notes.json", b"{}")]
    folder = layout({0: members(encode, 0, 2) + extra})
    assert load_dataset(f"wds:{folder}").ids == ("s000", "s001")
    assert [s.caption() for s in read_shard(folder / "test" / "0.tar")] == [None, None, "a kiwi bird", None]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("s9.png", b"x")], r"0\.tar/s9 has a picture but no label"),
        ([("s9.cls", b"0")], r"0\.tar/s9 has a label but no picture"),
        ([("s9.png", b"x"), ("s9.cls", b"cat")], r"0\.tar/s9\.cls holds 'cat'"),
        ([("s9.png", b"x"), ("s9.cls", b"-1")], r"0\.tar/s9\.cls holds '-1'"),
        ([("s9.png", b"x"), ("s9.cls", b"2")], r"0\.tar/s9\.cls is label 2, but classnames\.txt has 2 names"),
        ([("s000.png", b"x")], r"holds 's000\.png' twice"),
    ],
    ids=["no label", "no picture", "a word", "negative", "no name", "twice"],
)
def test_a_sample_that_does_not_fit_is_refused_by_shard_and_key(
    layout: Layout, encode: Encode, extra: Members, message: str
) -> None:
    folder = layout({0: members(encode, 0, 2) + extra})
    with pytest.raises(UserError, match=message):
        load_dataset(f"wds:{folder}")


def test_a_label_may_end_in_a_newline(layout: Layout, encode: Encode) -> None:
    folder = layout({0: [("a.jpg", encode()), ("a.cls", b" 1\n")]})
    assert load_dataset(f"wds:{folder}").labels == (1,)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_cut_off_anywhere_is_refused_by_its_name(layout: Layout, encode: Encode, suffix: str) -> None:
    folder = layout({0: members(encode, 0, 4)}, suffix=suffix)
    shard = folder / "test" / f"0{suffix}"
    whole = shard.read_bytes()
    used = len(whole) if suffix == ".tar.gz" else 8 * 1024  # eight members of a header and a block
    for length in range(0, used, 512 if suffix == ".tar" else 97):
        for cut in (length, length + 100):
            shard.write_bytes(whole[: min(cut, used - 1)])
            with pytest.raises(UserError, match=rf"shard \S*0{suffix}: truncated or not a tar file"):
                load_dataset(f"wds:{folder}")


def test_a_damaged_header_does_not_silently_end_the_shard(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 4)})
    shard = folder / "test" / "0.tar"
    content = bytearray(shard.read_bytes())
    content[4096:4100] = b"\xff\xff\xff\xff"
    shard.write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a tar file"):
        load_dataset(f"wds:{folder}")


def test_members_never_become_paths_and_links_are_not_followed(
    tmp_path: Path, layout: Layout, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout({0: [("../../../evil/a.png", encode()), ("../../../evil/a.cls", b"0"), ("._b.png", b"x")]})
    with tarfile.open(folder / "test" / "0.tar", "a") as tar:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    images = load_dataset(f"wds:{folder}")
    assert images.ids == ("../../../evil/a",)
    assert images.read(0).size == (6, 5)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_picture_is_named_by_shard_and_member_when_read(layout: Layout) -> None:
    images = load_dataset(f"wds:{layout({0: [('a.webp', b'nonsense'), ('a.cls', b'0')]})}")
    with pytest.raises(BadImage, match=r"^0\.tar/a\.webp: not an image"):
        images.read(0)


def test_a_missing_shard_or_class_list_is_reported(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 1), 1: members(encode, 1, 1)})
    (folder / "test" / "0.tar").unlink()
    with pytest.raises(UserError, match=r"counts 2 shards, but 0\.tar is missing"):
        load_dataset(f"wds:{folder}")
    (folder / "test" / "nshards.txt").unlink()
    assert load_dataset(f"wds:{folder}").ids == ("s001",)
    (folder / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"no names in \S*classnames\.txt; write one class name a line"):
        load_dataset(f"wds:{folder}")


def test_a_shard_count_that_is_not_a_number_is_reported(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 1)})
    (folder / "test" / "nshards.txt").write_text("many")
    with pytest.raises(UserError, match=r"nshards\.txt: 'many' is not a number"):
        load_dataset(f"wds:{folder}")


def test_retrieval_sets_are_refused(layout: Layout, encode: Encode) -> None:
    folder = layout({0: members(encode, 0, 1)})
    (folder / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(UserError, match="is a retrieval set"):
        load_dataset(f"wds:{folder}")


def test_shards_without_any_label_are_no_classification_set(layout: Layout, encode: Encode) -> None:
    with pytest.raises(UserError, match=r"no sample in .* has a label"):
        load_dataset(f"wds:{layout({0: [('a.png', encode()), ('a.txt', b'a cat')]})}")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder or file"):
        load_dataset(f"wds:{tmp_path / 'nowhere'}")
