"""`python -m detr_nb.check` on sound and broken sets."""
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from detr_nb import train
from detr_nb.annotations import DataError, DataWarning
from detr_nb.batching import make_loader
from detr_nb.check import _draw_report, check_coco, check_split, main, quick_check
from detr_nb.coco import CocoDataset, read_image
from detr_nb.config import Config, read_command_line
from detr_nb.looks import look_at_image
from detr_nb.score import open_split

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


def labels_of(figure, monkeypatch) -> list[tuple[str, object]]:
    "Every text that is drawn in a figure, with the rectangle that it takes in pixels."
    canvas, drawn, draw = FigureCanvasAgg(figure), {}, Text.draw

    def note(text: Text, renderer) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn[id(text)] = text.get_text(), text.get_window_extent(renderer)

    canvas.draw()  # lays it out
    monkeypatch.setattr(Text, "draw", note)
    canvas.draw()
    return list(drawn.values())


@pytest.mark.parametrize("num_classes", [1, 3, 20, 80])
def test_no_label_of_the_picture_is_cut_off_or_over_another(tmp_path, monkeypatch, num_classes):
    contents = make_set(tmp_path)
    names = [f"{'a name that goes on and on ' * (k % 3)}class {k}" for k in range(num_classes)]
    for content in contents.values():
        content["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
        for number, entry in enumerate(content["annotations"]):
            entry["category_id"] = 1 + number % num_classes
        for image in content["images"]:  # files of long names, and not one of them of the size listed
            old = tmp_path / ("train2017" if image["id"] < 100 else "val2017") / image["file_name"]
            image |= {"file_name": f"{'photograph_of_a_street_' * 4}{old.name}", "width": 41}
            old.rename(old.with_name(image["file_name"]))
    write_set(tmp_path, contents)
    splits = [check_split(tmp_path, split, 100, False, 2) for split in ("train", "val")]
    figure = _draw_report(splits)
    labels, edge = labels_of(figure, monkeypatch), figure.bbox
    assert sum("of another size" in text.replace("\n", " ") for text, _ in labels) == 8
    assert all(f"class {k}" in " ".join(text for text, _ in labels) for k in range(min(num_classes, 19)))
    for place, (text, box) in enumerate(labels):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= edge.x1 and box.y1 <= edge.y1, f"cut off: {text}"
        assert not [other for other, at in labels[:place] if box.overlaps(at)], f"over another: {text}"


def test_the_worst_pictures_are_shown_first(tmp_path, capsys):
    contents = make_set(tmp_path)
    contents["train"]["annotations"][11]["image_id"] = 1
    write_set(tmp_path, contents)
    picture().save(tmp_path / "val2017" / "103.jpg", exif=exif(3))
    picture(size=(20, 15)).save(tmp_path / "val2017" / "102.jpg")
    (tmp_path / "train2017" / "4.jpg").write_bytes(b"x")
    splits = [check_split(tmp_path, split, 3, False, 2) for split in ("train", "val")]
    figure = _draw_report(splits)
    sheet = [ax.get_title() for ax in figure.findobj(Axes) if ax.get_title() and not ax.get_xlabel()]
    assert [title.splitlines()[:2] for title in sheet] == [
        ["train", "4.jpg"], ["val", "102.jpg"], ["train", "1.jpg"], ["val", "103.jpg"]]
    assert [len(ax.images) for ax in figure.findobj(Axes) if ax.get_title() in sheet] == [0, 1, 1, 1]  # one is none


# ---------------------------------------------------------------- panoptic sets


def make_panoptic(root: Path) -> dict[str, dict]:
    "Two splits of two images, each of a sky (stuff) and a cat (thing); returns the content of both files."
    contents = {}
    for split, base in (("train", 1), ("val", 101)):
        (root / f"panoptic_{split}2017").mkdir(parents=True)
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for image_id in (base, base + 1):
            picture(image_id).save(root / f"{split}2017" / f"{image_id}.jpg")
            ids = np.full((30, 40), 300)
            ids[10:20, 5:15] = 70_000
            Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(
                root / f"panoptic_{split}2017" / f"{image_id}.png")
            images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 40, "height": 30})
            segments = [{"id": 300, "category_id": 2, "area": 1100, "bbox": [0, 0, 40, 30], "iscrowd": 0},
                        {"id": 70_000, "category_id": 1, "area": 100, "bbox": [5, 10, 10, 10], "iscrowd": 0}]
            annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
        contents[split] = {"images": images, "annotations": annotations, "categories": [
            {"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]}
    write_panoptic(root, contents)
    return contents


def write_panoptic(root: Path, contents: dict[str, dict]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    for split, content in contents.items():
        (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))


def test_a_sound_panoptic_set_is_safe(tmp_path, capsys):
    make_panoptic(tmp_path)
    status, report = check(tmp_path, capsys, panoptic=True)
    assert status == 0 and not any(word in report for word in ("STOP", "warning", "note "))
    rows = [" ".join(line.split()) for line in report.splitlines()]
    assert "train 2 4 0 2 2.0" in rows and any(row.startswith("sky 2 #") for row in rows)


def repaint(path: Path, old: int, new: int) -> None:
    pixels = np.asarray(Image.open(path)).copy()
    before, after = ([number % 256, number // 256 % 256, number // 65536] for number in (old, new))
    pixels[(pixels == before).all(-1)] = after
    Image.fromarray(pixels).save(path)


def segment(contents: dict, **change) -> None:
    contents["train"]["annotations"][1]["segments_info"][1].update(change)


PANOPTIC = {  # what is changed, is it safe, what is said
    "an id that is not listed": (lambda png, c: repaint(png, 300, 301), 0, "with ids that the file does not list"),
    "a segment that is not there": (lambda png, c: repaint(png, 70_000, 300), 0, "without pixels of segments"),
    "another area": (lambda png, c: segment(c, area=99), 0, "with segments of another area than listed"),
    "another size": (lambda png, c: Image.open(png).resize((20, 15)).save(png), 1, "is 20x15 (width x height)"),
    "no id of the list": (lambda png, c: Image.new("RGB", (40, 30), (9, 9, 9)).save(png), 1, "has no pixel of the 2"),
    "no picture": (lambda png, c: png.write_bytes(b"x"), 1, "cannot decode image"),
    "not there": (lambda png, c: png.unlink(), 1, "1 of 2 segment maps that it lists are not in"),
    "image missing": (lambda png, c: (png.parent.parent / "train2017" / "2.jpg").unlink(), 1, "2.jpg"),
}


@pytest.mark.parametrize("fault", PANOPTIC)
def test_what_maps_and_lists_disagree_about_is_named(tmp_path, capsys, fault):
    contents = make_panoptic(tmp_path)
    change, expected, words = PANOPTIC[fault]
    change(tmp_path / "panoptic_train2017" / "2.png", contents)
    write_panoptic(tmp_path, contents)
    status, report = check(tmp_path, capsys, panoptic=True)
    said = [line for line in report.splitlines() if line.startswith(("STOP", "warning"))]
    assert status == expected and any(words in line and "train: " in line for line in said), said
    assert fault in ("not there", "image missing") or "1 of 2 segment maps" in report and "2.png" in report


def test_the_images_of_a_panoptic_set_may_lie_elsewhere(tmp_path, capsys):
    make_panoptic(tmp_path / "maps")
    (tmp_path / "photos").mkdir()
    for split in ("train", "val"):
        (tmp_path / "maps" / f"{split}2017").rename(tmp_path / "photos" / f"{split}2017")
    status, report = check(tmp_path / "maps", capsys, panoptic=True)
    assert status == 1 and "--coco_path" in report
    assert check(tmp_path / "maps", capsys, panoptic=True, coco_path=tmp_path / "photos")[0] == 0


# ---------------------------------------------------------------- the flags that its messages name


def test_the_command_takes_every_flag_that_its_messages_name(tmp_path, capsys):
    make_set(tmp_path / "set")
    (tmp_path / "set" / "annotations").rename(tmp_path / "set" / "labels")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "set"), "--picture", str(tmp_path / "p.png")])
    named = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert named == {"train_annotations", "train_images", "val_annotations", "val_images", "val_share"}
    flags = [word for split in ("train", "val") for word in (
        f"--{split}_annotations", f"{tmp_path}/set/labels/instances_{split}2017.json",
        f"--{split}_images", f"{tmp_path}/set/{split}2017")]
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "set"), "--picture", str(tmp_path / "p.png"), *flags])
    assert ended.value.code == 0 and "safe to train on" in capsys.readouterr().out


def test_a_set_without_a_validation_is_checked_with_its_share(tmp_path, capsys):
    make_set(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    assert check(tmp_path, capsys)[0] == 1
    status, report = check(tmp_path, capsys, val_share=0.2)
    assert status == 0 and "val " not in report


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


# ---------------------------------------------------------------- --val_share and --skip_broken


def settings(root: Path, *more: str) -> Config:
    return read_command_line(["--coco_path", str(root), *more])[0]


def scenes(root: Path, count: int = 30, alike: int = 6) -> Path:
    "Training images in CVAT's layout, no validation; the last `alike` are nearly the first ones."
    folder, images = root / "images" / "default", []
    folder.mkdir(parents=True)
    for number in range(count):
        view = picture(number % (count - alike), size=(8, 6)).resize((40, 30), Image.Resampling.BICUBIC)
        view = view if number < count - alike else view.point(lambda level: int(0.9 * level))
        view.save(folder / f"{number}.jpg", quality=92 if number < count - alike else 70)
        images.append({"id": number + 1, "file_name": f"{number}.jpg", "width": 40, "height": 30})
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 10, 20]} for n in range(1, count + 1)]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(
        {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}))
    return root


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_share_is_kept_for_validation_the_same_ones_each_time_and_what_is_alike_on_one_side(tmp_path, share):
    def parts(*more: str) -> list[list[int]]:
        config = settings(scenes_at, "--val_share", str(share), *more)
        return [open_split(config, split).image_ids.tolist() for split in ("train", "val")]

    scenes_at = scenes(tmp_path)
    train_ids, val_ids = parts()
    assert sorted(train_ids + val_ids) == list(range(1, 31)) and abs(len(val_ids) - share * 30) <= 2
    assert parts("--seed", "7", "--num_workers", "0") == [train_ids, val_ids]
    assert all((number in val_ids) == (number + 24 in val_ids) for number in range(1, 7))  # the pairs
    with pytest.raises(DataError, match="--val_share 0.001 .* leaves nothing for val"):
        open_split(settings(scenes_at, "--val_share", "0.001"), "val")


def test_without_the_share_the_message_names_it(tmp_path):
    with pytest.raises(DataError, match="no annotation file for the split 'val' .*--val_share"):
        open_split(settings(scenes(tmp_path)), "val")


@pytest.mark.parametrize("split, base", [("train", 1), ("val", 101)])
def test_images_cut_short_are_left_out_counted_and_named(tmp_path, split, base):
    make_set(tmp_path)
    for number in (base, base + 2):
        path = tmp_path / f"{split}2017" / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:-99])
    said = rf"2 of 4 images cannot be read: {base}\.jpg, {base + 2}\.jpg; they are left out"
    with pytest.warns(DataWarning, match=said):
        dataset = open_split(settings(tmp_path, "--skip_broken"), split)
    assert dataset.image_ids.tolist() == [base + 1, base + 3] and len(dataset.coco_api().imgs) == 2
    assert [dataset[place].image_id for place in range(2)] == [base + 1, base + 3]


def test_without_the_flag_a_validation_image_cut_short_ends_the_run_before_its_first_epoch(tmp_path, caplog):
    make_set(tmp_path / "set")
    path = tmp_path / "set" / "val2017" / "103.jpg"
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(SystemExit, match=r"1 of 4 images cannot be read: 103\.jpg.*--skip_broken"):
        train.main(["--coco_path", str(tmp_path / "set"), "--output_dir", str(tmp_path / "run"), "--device", "cpu",
                    "--report_to", "none", "--num_workers", "0"])
    assert not (tmp_path / "run" / "log.txt").exists() and not list(tmp_path.glob("run/*.pth"))


def test_without_the_flag_a_training_image_cut_short_is_named_by_the_first_epoch(tmp_path):
    make_set(tmp_path)
    path = tmp_path / "train2017" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-99])
    dataset = open_split(settings(tmp_path), "train")
    assert len(dataset) == 4
    with pytest.raises(DataError, match=r"3\.jpg .*cut short"):
        list(make_loader(dataset, batch_size=2, num_workers=0))
