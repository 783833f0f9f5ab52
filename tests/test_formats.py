"Folders in Pascal VOC's and YOLO's formats, turned into COCO's layout."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_nb.annotations import DataError, DataWarning
from detr_nb.coco import open_coco
from detr_nb.distributed import UserError
from detr_nb.formats import find_parts, read_folder, write_coco

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision 0.29
BOX, NAMES = [15, 9, 25, 21], ("cat", "dog")  # xyxy, pixels of a picture of 40 x 30


@pytest.fixture
def supervision():
    "The tests that read need the package; what is told without it is tested without it."
    return pytest.importorskip("supervision")


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def yolo_label(path: Path, *labels: int) -> None:
    write_text(path, "".join(f"{label} 0.5 0.5 0.25 0.4\n" for label in labels))


def voc_label(path: Path, *names: str) -> None:
    box = "<bndbox><xmin>16</xmin><ymin>10</ymin><xmax>25</xmax><ymax>21</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name><difficult>0</difficult>{box}</object>" for name in names)
    write_text(path, f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>")


def converted(root: Path, target: Path) -> dict[str, dict[str, list]]:
    "By split and image the names and boxes that the converted set gives."
    counts, found = write_coco(root, target), {}
    for split, count in counts.items():
        data = open_coco(target, split)
        assert len(data) == count and data.categories.names == NAMES
        for row in range(count):
            sample = data[row]
            names = [data.categories.names[label] for label in sample.labels]
            found.setdefault(split, {})[data.index.images.names.item(row).decode()] = list(
                zip(names, sample.boxes.tolist()))
    return found


@pytest.mark.parametrize("inner", [False, True])  # images/train and labels/train, or train/images and train/labels
def test_yolo_gives_the_boxes_and_classes_that_were_written(tmp_path, supervision, inner):
    root = tmp_path / "yolo"
    for split, stem, labels in (("train", "a", [1, 0]), ("train", "b", []), ("valid", "c", [0])):
        parts = [("images", split), ("labels", split)] if inner else [(split, "images"), (split, "labels")]
        picture(root.joinpath(*parts[0], f"{stem}.png"))
        if labels:
            yolo_label(root.joinpath(*parts[1], f"{stem}.txt"), *labels)
    write_text(root / "data.yaml", "nc: 2\nnames: ['cat', 'dog']\n")
    assert converted(root, tmp_path / "coco") == {
        "train": {"a.png": [("dog", BOX), ("cat", BOX)], "b.png": []}, "val": {"c.png": [("cat", BOX)]}}


@pytest.mark.parametrize("listed", [False, True])  # all pictures together and lists, or a folder for each split
def test_voc_gives_the_boxes_and_classes_that_were_written(tmp_path, supervision, listed):
    root = tmp_path / "voc"
    for split, stem, names in (("train", "a", ["dog", "dog"]), ("val", "c", ["cat"])):  # each lacks a class
        picture(root / ("JPEGImages" if listed else split) / f"{stem}.png")
        voc_label(root / ("Annotations" if listed else split) / f"{stem}.xml", *names)
        if listed:
            write_text(root / "ImageSets" / "Main" / f"{split}.txt", f"{stem}\n")
            write_text(root / "ImageSets" / "Main" / f"cat_{split}.txt", f"{stem} -1\n")
    assert converted(root, tmp_path / "coco") == {
        "train": {"a.png": [("dog", BOX), ("dog", BOX)]}, "val": {"c.png": [("cat", BOX)]}}


def test_a_set_without_splits_is_training(tmp_path, supervision):
    picture(tmp_path / "set" / "images" / "a.png")
    yolo_label(tmp_path / "set" / "labels" / "a.txt", 0, 1)
    write_text(tmp_path / "set" / "coco.yaml", "names:\n  0: cat\n  1: dog\n")
    assert list(converted(tmp_path / "set", tmp_path / "coco")) == ["train"]


def test_label_studio_names_the_classes_in_a_file_of_their_own(tmp_path, supervision):
    picture(tmp_path / "set" / "images" / "a.png")
    yolo_label(tmp_path / "set" / "labels" / "a.txt", 0, 1)
    write_text(tmp_path / "set" / "notes.json", "{}")
    write_text(tmp_path / "set" / "classes.txt", "cat\ndog\n")
    assert list(converted(tmp_path / "set", tmp_path / "coco")) == ["train"]
    assert not list((tmp_path / "set").rglob("*.yaml"))


def test_pictures_are_copied_byte_for_byte_and_the_source_is_left_alone(tmp_path, supervision):
    source = picture(tmp_path / "set" / "JPEGImages" / "a.jpg")
    voc_label(tmp_path / "set" / "Annotations" / "a.xml", "cat", "dog")
    before = sorted(tmp_path.rglob("*"))
    write_coco(tmp_path / "set", tmp_path / "coco")
    assert (tmp_path / "coco" / "train" / "a.jpg").read_bytes() == source.read_bytes()
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "coco" not in [path, *path.parents]] == before


def test_labels_without_a_picture_are_counted(tmp_path, supervision):
    picture(tmp_path / "images" / "a.png")
    for stem in ("a", "lost", "gone"):
        yolo_label(tmp_path / "labels" / f"{stem}.txt", 0)
    write_text(tmp_path / "labels" / "classes.txt", "cat")
    write_text(tmp_path / "data.yaml", "names: [cat]")
    with pytest.warns(DataWarning, match=r"2 files of labels have no image in .*: gone\.txt, lost\.txt"):
        read_folder(tmp_path)


@pytest.mark.parametrize("ending, text", [("txt", "0 0.5 0.5"), ("txt", "7 0.5 0.5 0.2 0.2"), ("xml", "<annotation>")])
def test_labels_that_are_broken_end_in_one_message(tmp_path, supervision, ending, text):
    picture(tmp_path / "images" / "a.png")
    write_text(tmp_path / ("labels" if ending == "txt" else "annotations") / f"a.{ending}", text)
    write_text(tmp_path / "data.yaml", "names: [cat]")
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "export the set again" in str(caught.value)


def test_a_folder_in_neither_format_says_what_was_looked_for(tmp_path):
    picture(tmp_path / "images" / "a.png")
    yolo_label(tmp_path / "labels" / "a.txt", 0)  # but no data.yaml
    with pytest.raises(DataError, match=r"neither in YOLO's format \(data\.yaml or classes"):
        read_folder(tmp_path)


def test_a_target_that_holds_a_set_is_left_alone(tmp_path):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="holds a set already"):
        write_coco(tmp_path / "set", tmp_path / "coco")
    with pytest.raises(DataError, match="no such folder"):
        write_coco(tmp_path / "gone", tmp_path / "new")


def test_without_the_package_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    picture(tmp_path / "images" / "a.png")
    yolo_label(tmp_path / "labels" / "a.txt", 0)
    write_text(tmp_path / "data.yaml", "names: [cat]")
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install .detr_nb\[formats\]"):
        read_folder(tmp_path)


def test_the_command(tmp_path, supervision):
    root = tmp_path / "set"
    picture(root / "JPEGImages" / "a.png")
    voc_label(root / "Annotations" / "a.xml", "cat", "dog")
    command = [sys.executable, "-m", "detr_nb.formats", str(root), str(tmp_path / "coco")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "images: 1 for train\n", done.stderr
    content = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    assert [entry["bbox"] for entry in content["annotations"]] == [[15, 9, 10, 12]] * 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "holds a set already" in again.stderr and "Traceback" not in again.stderr


def test_a_folder_within_a_split_is_found_whatever_its_case_and_year(tmp_path):
    for name in ("Train2017", "Validation"):
        picture(tmp_path / "images" / name / "a.png")
        yolo_label(tmp_path / "labels" / name / "a.txt", 0)
    found = find_parts(tmp_path, ".txt")
    assert found == {"train": (tmp_path / "images" / "Train2017", tmp_path / "labels" / "Train2017"),
                     "val": (tmp_path / "images" / "Validation", tmp_path / "labels" / "Validation")}
    assert find_parts(tmp_path, ".xml") == {}
