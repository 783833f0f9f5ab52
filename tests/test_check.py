"""`python -m detr_nb.check` on sound and broken sets."""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_nb.check import check_coco, check_split, quick_check
from detr_nb.coco import CocoDataset, read_image
from detr_nb.looks import look_at_image

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),  # torchvision 0.29
]


# ---------------------------------------------------------------- checking


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def make_set(root: Path) -> dict[str, dict]:
    "Two splits of four images with three objects of two classes each; returns the content of both files."
    contents = {}
    for split, base in (("train", 1), ("val", 101)):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        images = [{"id": base + i, "file_name": f"{base + i}.jpg", "width": 40, "height": 30} for i in range(4)]
        annotations = [{"id": n + 1, "image_id": base + n // 3, "category_id": 5 + n % 2, "bbox": [1 + n, 2, 10, 20],
                        "area": 150, "iscrowd": 0} for n in range(12)]
        contents[split] = {"images": images, "annotations": annotations,
                           "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]}
        for i, image in enumerate(images):
            picture(base + i).save(folder / image["file_name"], quality=92)
    write_set(root, contents)
    return contents


def write_set(root: Path, contents: dict[str, dict]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    for split, content in contents.items():
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def check(root: Path, capsys, **more) -> tuple[int, str]:
    "The status and the report."
    status = check_coco(root, picture=root / "check.png", **more)
    return status, capsys.readouterr().out


def test_a_sound_set_is_safe(tmp_path, capsys):
    make_set(tmp_path)
    status, report = check(tmp_path, capsys)
    assert status == 0 and report.endswith(": safe to train on\n")
    assert not any(word in report for word in ("STOP", "warning", "note "))
    with Image.open(tmp_path / "check.png") as drawn:
        assert drawn.size[0] > 1000
    rows = [" ".join(line.split()) for line in report.splitlines()]
    assert "train 4 12 0 2 3.0" in rows and "cat 6 ######################## 6 ########################" in rows
    assert any(row.startswith("2 to 3 4 #") for row in rows) and any(row.startswith("8 to 15 12 #") for row in rows)
    assert "8 images in" in report and "per thousand" in report


def exif(orientation: int) -> Image.Exif:
    note = Image.Exif()
    note[0x0112] = orientation
    return note


def image_fault(change: Callable[[Path], None], *words: str, decode: bool = False):
    "A fault of the image train2017/2.jpg."
    return lambda root, contents: change(root / "train2017" / "2.jpg"), words, decode


def file_fault(change: Callable[[dict], None], *words: str):
    "A fault of one of the files."
    def apply(root, contents):
        change(contents)
        write_set(root, contents)

    return apply, words, False


def spoil_middle(path: Path) -> None:
    "Zeros in the coded pixels, so that the JPEG's blocks come to nothing; both ends stay."
    data = path.read_bytes()
    path.write_bytes(data[:700] + b"\xff\xc4" * 40 + data[780:])


def first(contents: dict, place: int) -> dict:
    "An annotation of the training file."
    return contents["train"]["annotations"][place]


STOPS = {
    "image missing": image_fault(Path.unlink, "train: 1 of 4 images missing: 2.jpg (image id 2)"),
    "image is a page": image_fault(lambda path: path.write_text("<html>"), "1 of 4 images unreadable: 2.jpg"),
    "image empty": image_fault(lambda path: path.write_bytes(b""), "1 of 4 images unreadable: 2.jpg"),
    "image cut short": image_fault(lambda path: path.write_bytes(path.read_bytes()[:-99]),
                                   "1 of 4 images cut short or damaged: 2.jpg (image id 2)"),
    "image with zeros for its end": image_fault(
        lambda path: path.write_bytes(path.read_bytes()[:-400] + bytes(400)), "cut short or damaged: 2.jpg"),
    "image damaged in the middle": image_fault(spoil_middle, "cut short or damaged: 2.jpg", decode=True),
    "image resized": image_fault(lambda path: picture(size=(20, 15)).save(path), "of another size than listed: 2.jpg"),
    "image turned": image_fault(lambda path: picture(size=(30, 40)).save(path, exif=exif(3)), "another size", "2.jpg"),
    "annotation id doubled": file_fault(lambda c: first(c, 3).update(id=1), "train: ", "repeat an id", ": 1."),
    "categories differ": file_fault(lambda c: c["val"]["categories"][1].update(name="wolf"),
                                    "both: train and val list different categories", "wolf", "dog"),
    "file without annotations": file_fault(lambda c: c["val"].update(annotations=[]), "val: ", "has no annotations"),
    "image of no list": file_fault(lambda c: c["val"]["annotations"][4].update(image_id=77), "image_ids 77", "ids 5"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STOPS)
def test_a_fault_that_would_stop_or_spoil_a_training_is_named_and_not_safe(tmp_path, capsys, fault):
    contents = make_set(tmp_path)
    change, words, decode = STOPS[fault]
    change(tmp_path, contents)
    status, report = check(tmp_path, capsys, decode=decode)
    lines = [line for line in report.splitlines() if line.startswith("STOP")]
    assert status == 1 and len(lines) == 1 and report.endswith("not safe to train on, see STOP above (1)\n")
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize("orientation", [0, 9, 65537])
def test_an_orientation_that_is_none_is_not_spoken_of(tmp_path, capsys, orientation):
    make_set(tmp_path)
    note = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01" + orientation.to_bytes(4, "big") + bytes(4)
    picture().save(tmp_path / "train2017" / "2.jpg", exif=note)
    status, report = check(tmp_path, capsys)
    assert status == 0 and "EXIF" not in report and "warning" not in report


WARNINGS = {
    "turned by EXIF": image_fault(lambda path: picture().save(path, exif=exif(3)),
                                  "train: 1 of 4 images with an EXIF rotation", "2.jpg (image id 2)"),
    "annotation id 0": file_fault(lambda c: first(c, 0).update(id=0), "annotation id 0"),
    "box without width": file_fault(lambda c: first(c, 2).update(bbox=[1, 1, 0, 5]), "annotation ids 3"),
    "box outside": file_fault(lambda c: first(c, 2).update(bbox=[99, 1, 9, 5]), "outside the image", "ids 3"),
    "box over the edge": file_fault(lambda c: first(c, 2).update(bbox=[30, 1, 20, 5]), "clipped 1", "ids 3"),
    "class in one split": file_fault(lambda c: [a.update(category_id=5) for a in c["val"]["annotations"]],
                                     "val: 1 of 2 classes have no object: dog", "both: ", "in train only: dog"),
    "no image with objects but one": file_fault(lambda c: [a.update(image_id=2) for a in c["train"]["annotations"]],
                                                "train: 3 of 4 images have no object (image ids 1, 3, 4)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WARNINGS)
def test_what_one_should_look_at_is_a_warning_and_safe(tmp_path, capsys, fault):
    contents = make_set(tmp_path)
    change, words, decode = WARNINGS[fault]
    change(tmp_path, contents)
    status, report = check(tmp_path, capsys)
    said = "\n".join(line for line in report.splitlines() if line.startswith("warning"))
    assert status == 0 and "STOP" not in report and report.endswith(": safe to train on\n")
    assert all(word in said for word in words), said


def test_pictures_that_are_in_both_splits_are_found(tmp_path, capsys):
    make_set(tmp_path)
    view = picture(size=(8, 6)).resize((400, 300), Image.Resampling.BICUBIC)
    for name, quality in (("train2017/2.jpg", 92), ("val2017/103.jpg", 40)):  # not the same bytes, nor the same pixels
        view.resize((40, 30)).save(tmp_path / name, quality=quality)
    status, report = check(tmp_path, capsys)
    assert status == 1
    assert "1 of 4 images of val are the same or nearly the same as one of train: 103.jpg is 2.jpg" in report


def test_more_objects_than_queries_and_empty_images(tmp_path, capsys):
    contents = make_set(tmp_path)
    contents["train"]["annotations"][11]["image_id"] = 1
    contents["val"]["annotations"] = contents["val"]["annotations"][:9]
    write_set(tmp_path, contents)
    status, report = check(tmp_path, capsys, num_queries=3)
    assert status == 0 and "warning  train: 1 of 4 images have more objects than the model has queries" in report
    assert "up to 4 (image ids 1): what is beyond 3 teaches nothing" in report
    assert "note     val: 1 of 4 images have no object (image ids 104)" in report


def test_all_faults_of_a_split_are_told_together(tmp_path, capsys):
    contents = make_set(tmp_path)
    for name in ("train2017/1.jpg", "val2017/102.jpg"):
        (tmp_path / name).unlink()
    (tmp_path / "train2017" / "3.jpg").write_bytes(b"x")
    contents["train"]["annotations"][3]["id"] = 1  # the file is refused; its images are looked at all the same
    write_set(tmp_path, contents)
    status, report = check(tmp_path, capsys)
    assert status == 1 and report.count("STOP   ") == 4
    assert all(name in report for name in ("1.jpg", "3.jpg", "102.jpg"))


def test_a_folder_without_a_set(tmp_path, capsys):
    status, report = check(tmp_path, capsys)
    assert status == 1 and report.count("no annotation file for the split") == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_cut_file_is_found_whatever_its_kind(tmp_path, kind):
    path = tmp_path / "image"
    picture().save(path, kind)
    whole = path.read_bytes()
    assert look_at_image(path)[:3] == look_at_image(path, decode=True)[:3] == ("", (30, 40), 1)
    pixels = read_image(path)
    for length in range(0, len(whole) - 4, 97):
        path.write_bytes(whole[:length])  # a PNG may lack its last bytes and still have all pixels
        assert look_at_image(path).problem or (kind != "JPEG" and torch.equal(read_image(path), pixels))


def test_bytes_behind_the_end_are_no_fault(tmp_path):
    picture().save(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(bytes(500))
    assert look_at_image(tmp_path / "a.jpg").problem == ""


def test_threads_do_not_change_the_findings(tmp_path):
    make_set(tmp_path)
    (tmp_path / "train2017" / "4.jpg").unlink()
    (tmp_path / "train2017" / "2.jpg").unlink()
    one, many = (check_split(tmp_path, "train", 100, False, threads).findings for threads in (1, 8))
    assert one == many and "2 of 4 images missing: 2.jpg (image id 2), 4.jpg (image id 4)" in one[0].text


# ---------------------------------------------------------------- the launcher's part


def test_the_quick_check_warns_of_what_the_index_tells(tmp_path):
    contents = make_set(tmp_path)
    contents["train"]["categories"].append({"id": 7, "name": "kite"})
    write_set(tmp_path, contents)
    data = CocoDataset(tmp_path / "train2017", tmp_path / "annotations" / "instances_train2017.json")
    said = quick_check(data, num_queries=2)
    assert len(said) == 2 and all(line.startswith(f"{data.annotations}: ") and "\n" not in line for line in said)
    assert "4 of 4 images have more objects" in said[0] and "1 of 3 classes have no object: kite" in said[1]
    assert len(quick_check(data, num_queries=3)) == 1
    some = data.subset([0, 0, 3])
    assert some.class_counts.tolist() == [2 + 2 + 1, 1 + 1 + 2, 0] == np.bincount(
        np.concatenate([some[i].labels for i in range(3)]), minlength=3).tolist()


# ---------------------------------------------------------------- the command


def test_python_m_detr_nb_check(tmp_path):
    make_set(tmp_path / "set")
    (tmp_path / "set" / "val2017" / "102.jpg").unlink()
    command = [sys.executable, "-m", "detr_nb.check", f"{tmp_path}/set", "--picture", f"{tmp_path}/p.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "102.jpg" in done.stdout and (tmp_path / "p.png").is_file(), done.stderr
