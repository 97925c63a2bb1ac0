"""Each row on a fabricated copy with the true layout (file names, folder names, lists) and a picture a class.

What is not true to life: CIFAR, STL-10, SVHN and Flowers-102 are checked by torchvision against MD5 sums, which a
fabricated copy cannot have, so that check is switched off here; PCAM needs h5py, for which a surrogate is put.
Readable names, labels, ids and splits are what is tested.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.data.class_names import CALTECH101, COUNTRY211, EUROSAT, imagenet_names
from vlmdefend.data.sources.torchvision_sets import TABLE
from vlmdefend.errors import UserError

Put = Callable[..., Path]
ROWS = {row.name: row for row in TABLE}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ImageSet]:
    """Open a set under the temporary directory and decode its first and last picture."""

    def load(name: str, split: str = "test") -> ImageSet:
        images = load_dataset(name, split, root=tmp_path)
        assert images.name == name
        assert len(images.class_names) == ROWS[name].classes
        assert {images.read(i).mode for i in (0, len(images) - 1)} == {"RGB"}
        return images

    return load


Opened = Callable[..., ImageSet]


@pytest.mark.parametrize("name", list(ROWS))
def test_missing_files_name_the_folder_and_the_line_that_gets_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(name, root=tmp_path)
    message, row = str(caught.value), ROWS[name]
    assert message.startswith(f"{name} is expected in {tmp_path}/")
    assert f"$VLMDEFEND_DATA to the folder that holds {row.expects}" in message
    if not row.fetch:
        assert f"torchvision.datasets.{row.dataset}('{tmp_path}" in message
        assert "download=True" in message
    assert list(tmp_path.iterdir()) == []  # looking makes no folder


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_names_a_class_of_torchvision_or_reads_the_layout_itself(row: Any) -> None:
    assert row.build is not None or hasattr(torchvision.datasets, row.dataset)
    assert "test" in row.splits


def test_the_root_is_the_environments_unless_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLMDEFEND_DATA", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=f"expected in {tmp_path}/mine/dtd/dtd"):
        load_dataset("dtd")
    monkeypatch.delenv("VLMDEFEND_DATA")
    with pytest.raises(UserError, match=r"\.cache/vlmdefend/data/dtd/dtd"):
        load_dataset("dtd")


def test_an_unknown_split_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split of cifar10 'tset'; did you mean 'test'"):
        load_dataset("cifar10", "tset", root=tmp_path)
    with pytest.raises(UserError, match=r"no official split: every image is in test"):
        load_dataset("eurosat", "train", root=tmp_path)


def cifar(put: Put, folder: str, batches: list[str], meta: str, key: str, label_key: str, names: list[str]) -> None:
    for batch in batches:
        data = np.arange(len(names), dtype=np.uint8)[:, None].repeat(3072, 1)
        put(f"{folder}/{batch}", pickle.dumps({"data": data, label_key: list(range(len(names)))}))
    put(f"{folder}/{meta}", pickle.dumps({key: names}))


@pytest.fixture
def no_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fabricated files pass torchvision's checksums."""
    for module in ("cifar", "stl10", "svhn", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


@pytest.mark.usefixtures("no_md5")
def test_cifar10_and_cifar100(put: Put, opened: Opened) -> None:
    ten = ["airplane", "automobile", *(f"class_{i}" for i in range(8))]
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    cifar(put, "cifar-10-batches-py", batches, "batches.meta", "label_names", "labels", ten)
    images = opened("cifar10")
    assert images.ids[:2] == ("test/000000", "test/000001")
    assert images.labels == tuple(range(10))
    assert images.read(7).getpixel((0, 0)) == (7, 7, 7)
    assert len(opened("cifar10", "train")) == 50
    hundred = ["aquarium_fish", *(f"class_{i}" for i in range(99))]
    cifar(put, "cifar-100-python", ["train", "test"], "meta", "fine_label_names", "fine_labels", hundred)
    assert opened("cifar100").class_names[0] == "aquarium fish"


def test_a_copy_that_fails_torchvisions_checksum_is_refused(put: Put, opened: Opened) -> None:
    put("cifar-10-batches-py/test_batch", b"half a download")
    with pytest.raises(UserError, match=r"torchvision cannot read \S+ \(Dataset not found or corrupted"):
        opened("cifar10")


@pytest.mark.usefixtures("no_md5")
def test_stl10(put: Put, opened: Opened) -> None:
    for part in ("train", "test"):
        put(f"stl10_binary/{part}_X.bin", np.arange(10, dtype=np.uint8).repeat(3 * 96 * 96).tobytes())
        put(f"stl10_binary/{part}_y.bin", np.arange(1, 11, dtype=np.uint8).tobytes())
    put("stl10_binary/unlabeled_X.bin", b"")
    put("stl10_binary/class_names.txt", "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    images = opened("stl10")
    assert images.labels == tuple(range(10))
    assert images.class_names[7] == "monkey"


@pytest.mark.usefixtures("no_md5")
def test_svhn(tmp_path: Path, opened: Opened) -> None:
    from scipy.io import savemat

    (tmp_path / "svhn").mkdir()
    pixels = np.zeros((32, 32, 3, 3), dtype=np.uint8)
    savemat(tmp_path / "svhn" / "test_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9]])})
    images = opened("svhn")
    assert [images.class_names[label] for label in images.labels] == ["one", "zero", "nine"]


@pytest.mark.usefixtures("no_md5")
def test_flowers102(put: Put, tmp_path: Path, opened: Opened) -> None:
    from scipy.io import savemat

    for i in (1, 2, 3):
        put(f"flowers-102/jpg/image_{i:05d}.jpg")
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": np.array([77, 1, 102])})
    savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": [[2, 3]], "valid": [[1, 3]], "tstid": [[3, 1]]})
    images = opened("flowers102")
    assert images.ids == ("flowers-102/jpg/image_00001.jpg", "flowers-102/jpg/image_00003.jpg")
    assert [images.class_names[label] for label in images.labels] == ["passion flower", "blackberry lily"]


def test_sun397_is_sorted_whatever_order_the_file_system_lists(put: Put, opened: Opened) -> None:
    names = ["/a/abbey", "/a/apse/indoor", *(f"/p/place_{i:03d}" for i in range(395))]
    for name in reversed(names):
        put(f"SUN397{name}/sun_aaa.jpg")
    put("SUN397/ClassName.txt", "\n".join(names) + "\n")
    images = opened("sun397")
    assert images.class_names[:3] == ("abbey", "apse indoor", "place 000")
    assert images.ids[:2] == ("SUN397/a/abbey/sun_aaa.jpg", "SUN397/a/apse/indoor/sun_aaa.jpg")
    assert images.labels == tuple(range(397))


def food(put: Put, first: str) -> list[str]:
    names = ["apple_pie", *(f"dish_{i:03d}" for i in range(100))]
    for name in names:
        put(f"food-101/images/{name}/1.jpg")
    lists = {name: [f"{name}/1"] for name in names}
    lists["apple_pie"] = [first]
    put("food-101/meta/test.json", json.dumps(lists))
    return names


def test_food101(put: Put, opened: Opened) -> None:
    food(put, "apple_pie/1")
    images = opened("food101")
    assert images.class_names[:2] == ("apple pie", "dish 000")
    assert images.ids[0] == "food-101/images/apple_pie/1.jpg"


def test_a_list_of_files_that_points_outside_the_set_is_refused(put: Put, opened: Opened) -> None:
    food(put, "../../../outside")
    with pytest.raises(UserError, match="points outside the set"):
        opened("food101")


def test_oxford_pets(put: Put, opened: Opened) -> None:
    breeds = ["Abyssinian", "american_bulldog", *(f"breed_{i:02d}" for i in range(35))]
    for breed in breeds:
        put(f"oxford-iiit-pet/images/{breed}_1.jpg")
    lines = "".join(f"{breed}_1 {i} 1 1\n" for i, breed in enumerate(breeds, 1))
    put("oxford-iiit-pet/annotations/test.txt", lines)
    put("oxford-iiit-pet/annotations/trainval.txt", lines)
    assert opened("oxford-pets").class_names[:2] == ("Abyssinian", "American Bulldog")
    assert len(opened("oxford-pets", "train")) == 37


def test_dtd(put: Put, opened: Opened) -> None:
    names = ["banded", "polka-dotted", *(f"texture_{i:02d}" for i in range(45))]
    for name in names:
        put(f"dtd/dtd/images/{name}/{name}_0001.jpg")
    for split in ("train", "val", "test"):
        put(f"dtd/dtd/labels/{split}1.txt", "".join(f"{name}/{name}_0001.jpg\n" for name in names))
    images = opened("dtd")
    assert images.class_names[1] == "polka-dotted"
    assert images.labels == tuple(range(47))
    assert len(opened("dtd", "val")) == 47


def test_eurosat(put: Put, opened: Opened) -> None:
    for name in EUROSAT:
        put(f"eurosat/2750/{name}/{name}_1.jpg")
    images = opened("eurosat")
    assert images.class_names == tuple(EUROSAT.values())
    assert images.ids[-1] == "eurosat/2750/SeaLake/SeaLake_1.jpg"
    assert images.class_names[images.labels[-1]] == "lake or sea"


def test_fgvc_aircraft(put: Put, opened: Opened) -> None:
    names = ["707-320", "F-16A/B", *(f"variant {i:02d}" for i in range(98))]
    data = "fgvc-aircraft-2013b/data"
    put(f"{data}/variants.txt", "\n".join(names))
    for split in ("train", "val", "trainval", "test"):
        put(f"{data}/images_variant_{split}.txt", "".join(f"{i:07d} {name}\n" for i, name in enumerate(names)))
    for i in range(100):
        put(f"{data}/images/{i:07d}.jpg")
    assert opened("fgvc-aircraft").class_names[1] == "F-16A/B"
    assert opened("fgvc-aircraft", "trainval").labels == tuple(range(100))


def test_caltech101_leaves_the_background_out(put: Put, opened: Opened) -> None:
    folders = [*CALTECH101, "BACKGROUND_Google", *(f"thing_{i:02d}" for i in range(101 - len(CALTECH101)))]
    for folder in folders:
        put(f"caltech101/101_ObjectCategories/{folder}/image_0001.jpg")
    images = opened("caltech101")
    assert "off-center face" in images.class_names
    assert "thing 00" in images.class_names
    assert not any("ackground" in name for name in images.class_names)
    by_id = {name: images.class_names[label] for name, label in zip(images.ids, images.labels, strict=True)}
    assert by_id["caltech101/101_ObjectCategories/yin_yang/image_0001.jpg"] == "yin and yang symbol"


def test_caltech256(put: Put, opened: Opened) -> None:
    folders = ["001.ak47", "002.american-flag", *(f"{i:03d}.thing-101" for i in range(3, 257)), "257.clutter"]
    for folder in folders:
        put(f"caltech256/256_ObjectCategories/{folder}/{folder[:3]}_0001.jpg")
    images = opened("caltech256")
    assert (*images.class_names[:3], images.class_names[-1]) == ("ak47", "american flag", "thing", "clutter")


def test_stanford_cars(put: Put, tmp_path: Path, opened: Opened) -> None:
    from scipy.io import savemat

    names = np.array(["AM General Hummer SUV 2000", *(f"Car {i} 2012" for i in range(195))], dtype=object)
    put("stanford_cars/cars_test/00001.jpg")
    put("stanford_cars/cars_test/00002.jpg")
    (tmp_path / "stanford_cars" / "devkit").mkdir()
    savemat(tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": names})
    rows = np.array([("00001.jpg", 196), ("00002.jpg", 1)], dtype=[("fname", object), ("class", object)])
    savemat(tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": rows})
    images = opened("stanford-cars")
    assert images.labels == (195, 0)
    assert images.class_names[0] == "AM General Hummer SUV 2000"


def test_pcam_with_a_fake_h5py(put: Put, monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    stored = {
        "x": np.full((3, 96, 96, 3), 9, dtype=np.uint8),
        "y": np.array([1, 0, 1], dtype=np.uint8).reshape(3, 1, 1, 1),
    }

    class File:
        def __init__(self, path: Path) -> None:
            assert path.exists()

        def __enter__(self) -> dict[str, Any]:
            return stored

        def __exit__(self, *error: object) -> None:
            return None

    surrogate = ModuleType("h5py")
    surrogate.File = File  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "h5py", surrogate)
    for part in ("x", "y"):
        put(f"pcam/camelyonpatch_level_2_split_test_{part}.h5", b"")
    images = opened("pcam")
    assert images.labels == (1, 0, 1)
    assert images.class_names[1] == "lymph node containing metastatic tumor tissue"


def test_pcam_without_h5py_gives_the_pip_line(put: Put, monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    put("pcam/camelyonpatch_level_2_split_test_x.h5", b"")
    with pytest.raises(UserError, match="pip install h5py"):
        opened("pcam")


def test_country211(put: Put, opened: Opened) -> None:
    for code in COUNTRY211:
        put(f"country211/test/{code}/1.jpg")
    images = opened("country211")
    assert images.class_names == tuple(COUNTRY211.values())
    assert images.ids[0] == "country211/test/AD/1.jpg"


def test_gtsrb(put: Put, opened: Opened) -> None:
    put("gtsrb/GTSRB/Final_Test/Images/00000.ppm")
    put("gtsrb/GTSRB/Final_Test/Images/00001.ppm")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    put("gtsrb/GT-final_test.csv", header + "00000.ppm;6;5;0;0;5;4;14\n00001.ppm;6;5;0;0;5;4;42\n")
    images = opened("gtsrb")
    assert images.labels == (14, 42)
    assert images.class_names[14] == "stop"


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist-full", "MNIST")])
def test_the_full_idx_sets(put: Put, opened: Opened, name: str, folder: str) -> None:
    pixels, labels = np.arange(10, dtype=np.uint8).repeat(784).tobytes(), bytes(range(10))
    for part in ("train", "t10k"):
        put(f"{folder}/raw/{part}-images-idx3-ubyte", struct.pack(">iiii", 2051, 10, 28, 28) + pixels)
        put(f"{folder}/raw/{part}-labels-idx1-ubyte", struct.pack(">ii", 2049, 10) + labels)
    images = opened(name)
    assert images.labels == tuple(range(10))
    assert images.read(4).getpixel((0, 0)) == (4, 4, 4)
    assert images.class_names[9] == {"fashion-mnist": "Ankle boot", "mnist-full": "9"}[name]


def tiny(put: Put) -> list[str]:
    wnids = ["n02124075", "n99999999", *list(imagenet_names())[:198]]  # not sorted, as in the archive
    put("tiny-imagenet-200/wnids.txt", "\n".join(wnids))
    put("tiny-imagenet-200/words.txt", "n99999999\tpop bottle, soda bottle\nn02124075\tEgyptian cat\n")
    return wnids


def test_tiny_imagenet_as_distributed(put: Put, opened: Opened) -> None:
    wnids = tiny(put)
    put("tiny-imagenet-200/val/images/val_0.JPEG")
    put("tiny-imagenet-200/val/images/val_1.JPEG")
    lines = f"val_1.JPEG\t{wnids[1]}\t0\t0\t9\t9\nval_0.JPEG\t{wnids[0]}\t0\t0\t9\t9\n"
    put("tiny-imagenet-200/val/val_annotations.txt", lines)
    for wnid in wnids:
        put(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_0.JPEG")
    images = opened("tiny-imagenet")
    assert [images.class_names[label] for label in images.labels] == ["Egyptian Mau", "pop bottle"]
    assert images.labels == (198, 199)  # by sorted WordNet id
    assert images.ids[0] == "tiny-imagenet-200/val/images/val_0.JPEG"
    train = opened("tiny-imagenet", "train")
    assert train.class_names == images.class_names
    assert train.labels == tuple(range(200))


def test_tiny_imagenet_with_val_sorted_into_class_folders(put: Put, opened: Opened) -> None:
    wnids = tiny(put)
    put(f"tiny-imagenet-200/val/{wnids[0]}/val_0.JPEG")
    assert opened("tiny-imagenet").labels == (198,)


def test_tiny_imagenet_without_an_annotation_names_the_image(put: Put, opened: Opened) -> None:
    tiny(put)
    put("tiny-imagenet-200/val/images/val_0.JPEG")
    put("tiny-imagenet-200/val/val_annotations.txt", "val_9.JPEG\tn02124075\t0\t0\t9\t9\n")
    with pytest.raises(UserError, match=r"val_0\.JPEG: val_annotations\.txt gives it no class"):
        opened("tiny-imagenet")


@pytest.mark.parametrize(("name", "folder"), [("imagenet", "imagenet/val"), ("imagenet-sketch", "sketch")])
def test_imagenet_folders_keep_the_labels_of_all_thousand_classes(
    put: Put, opened: Opened, name: str, folder: str
) -> None:
    put(f"{folder}/n01443537/a.JPEG")
    put(f"{folder}/n15075141/b.JPEG")
    images = opened(name)
    assert images.labels == (1, 999)
    assert images.class_names[999] == "toilet paper"
    assert len(images.templates) == 80


def test_imagenet_v2_folders_are_labels_and_not_sorted_as_text(put: Put, opened: Opened) -> None:
    for label in (2, 10, 100):
        put(f"imagenetv2-matched-frequency-format-val/{label}/a.jpeg")
    images = opened("imagenet-v2")
    assert {name.split("/")[1]: label for name, label in zip(images.ids, images.labels, strict=True)} == {
        "2": 2,
        "10": 10,
        "100": 100,
    }


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_imagenet_a_and_r_have_the_classes_that_have_a_folder(put: Put, opened: Opened, name: str) -> None:
    part = list(imagenet_names().items())[::5]
    for wnid, _ in part:
        put(f"{name}/{wnid}/a.jpg")
    put(f"{name}/README.txt", "")
    images = opened(name)
    assert images.class_names == tuple(readable for _, readable in part)
    assert images.labels == tuple(range(200))


def test_a_copy_with_classes_missing_is_refused_with_both_counts(put: Put, opened: Opened) -> None:
    put("imagenet-a/n01443537/a.jpg")
    with pytest.raises(UserError, match=r"has 1 classes, the set has 200; this copy is not whole"):
        opened("imagenet-a")


def test_a_folder_that_is_no_class_of_imagenet_is_named(put: Put, opened: Opened) -> None:
    put("imagenet-a/cats/a.jpg")
    with pytest.raises(UserError, match=r"imagenet-a/cats: is no class of this set"):
        opened("imagenet-a")


def test_files_are_decoded_as_torchvision_does_without_turning_them(put: Put, opened: Opened, tmp_path: Path) -> None:
    for name in EUROSAT:
        put(f"eurosat/2750/{name}/{name}_1.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "eurosat" / "2750" / "AnnualCrop" / "AnnualCrop_1.jpg"
    Image.new("RGB", (9, 4), (50, 60, 70)).save(turned, exif=exif)
    theirs = torchvision.datasets.EuroSAT(str(tmp_path))
    assert opened("eurosat").read(0).tobytes() == theirs[0][0].tobytes()
    assert opened("eurosat").read(0).size == (9, 4)
