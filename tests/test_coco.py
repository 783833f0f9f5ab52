"""Damaged and unusual COCO files: every one loads as it should, or stops with a message that names the culprit."""
import io
import json
import math
import pickle
import warnings
from contextlib import redirect_stdout
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as run_length
from pycocotools.coco import COCO

from detr_nb.annotations import DataError, DataWarning, PackedBytes
from detr_nb.coco import CocoDataset, find_split, open_coco, read_image, read_index, runs_of
from detr_nb.seeding import sample_rng

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),  # torchvision 0.29
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools with NumPy 2
]


def exif_note(orientation: int) -> bytes:
    "EXIF data with nothing but an orientation, as a number of four bytes."
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01" + orientation.to_bytes(4, "big") + bytes(4)


def annotation(number: int, image: int, category: int, bbox: list, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": 12.5, "iscrowd": 0, **more}


def good() -> dict:
    "Three images of 40x30 (width x height), the last without objects; sparse ids in no order; one crowd."
    return {
        "images": [
            {"id": 7, "file_name": "seven.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "three.png", "width": 40, "height": 30},
            {"id": 900, "file_name": "none.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 2, "name": "cat"}],
        "annotations": [
            annotation(11, 3, 90, [1, 2, 10, 20], segmentation=[[1, 2, 11, 2, 11, 22]]),
            annotation(5, 7, 2, [0.25, 0, 12.5, 30], segmentation=[[0, 0, 12, 0, 12, 30, 0, 30]]),
            annotation(6, 7, 2, [5, 5, 20, 20], iscrowd=1, segmentation={"size": [30, 40], "counts": [100, 400, 700]}),
            annotation(8, 7, 90, [30, 20, 10, 10], segmentation=[[30, 20, 40, 20, 40, 30]]),
        ],
    }


def write(root: Path, content, name: str = "instances_train2017.json", split: str = "train") -> Path:
    "The content (or text, or bytes) in the standard layout, with an image file for every image of 40x30."
    for folder in (root / "annotations", root / f"{split}2017"):
        folder.mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(["seven.png", "three.png", "none.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{split}2017" / number)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "annotations" / name).write_bytes(data)
    return root


def load(root: Path, content, **more) -> CocoDataset:
    "The data set of the content, any warning being an error."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_coco(write(root, content), "train", **more)


def refuses(root: Path, content, *words: str, **more) -> None:
    "Assert that the content is refused in one line that has all the words."
    with pytest.raises(DataError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        open_coco(write(root, content), "train", **more)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ---------------------------------------------------------------- sound files


def test_a_sound_file_gives_its_boxes_and_labels(tmp_path):
    data = load(tmp_path, good())
    assert data.image_ids.tolist() == [7, 3, 900]
    assert data.sizes.tolist() == [[30, 40]] * 3
    assert data.categories.names == ("cat", "kite") and data.categories.ids == (2, 90)
    assert data.object_counts.tolist() == [2, 1, 0]
    first = data[0]
    assert first.image_id == 7 and first.original_size == (30, 40) and first.masks is None
    assert first.labels.tolist() == [0, 1]  # the crowd between them is no target
    assert first.boxes.tolist() == [[0.25, 0, 12.75, 30], [30, 20, 40, 30]]
    assert first.boxes.dtype == torch.float32 and first.labels.dtype == torch.int64
    assert data[1].labels.tolist() == [1]


def test_labels_outside_the_classes_have_no_id(tmp_path):
    categories = load(tmp_path, good()).categories
    assert categories.to_id(torch.tensor([[1, 0]])).tolist() == [[90, 2]]
    for label in (-1, 2):  # 2 is no-object
        with pytest.raises(IndexError, match="labels must be 0..1"):
            categories.to_id(torch.tensor([0, label]))


def test_an_image_without_objects_gives_empty_tensors(tmp_path):
    sample = load(tmp_path, good(), with_masks=True)[2]
    assert sample.boxes.shape == (0, 4) and sample.labels.shape == (0,) and sample.masks.shape == (0, 30, 40)


def test_indexing_is_a_sequence_s(tmp_path):
    data = load(tmp_path, good())
    assert data[-1].image_id == 900 and data[np.int64(1)].image_id == 3
    assert [sample.image_id for sample in data] == [7, 3, 900]  # iteration ends with IndexError
    with pytest.raises(IndexError):
        data[3]


def test_the_transform_gets_a_generator_of_seed_epoch_and_index(tmp_path):
    drawn = []
    data = load(tmp_path, good(), transform=lambda sample, rng: drawn.append(rng.random()) or sample, seed=5)
    data[4, 1], data[1], data[4, -2]
    assert drawn == [sample_rng(5, 4, 1).random(), sample_rng(5, 0, 1).random(), sample_rng(5, 4, 1).random()]


def test_a_subset_restricts_everything_and_copies_nothing(tmp_path):
    data = load(tmp_path, good())
    part = data.subset([1])
    assert len(part) == 1 and part[0].image_id == 3 and part.object_counts.tolist() == [1]
    assert part.index is data.index and len(data) == 3
    api = part.coco_api()
    assert list(api.imgs) == [3] and list(api.anns) == [11]
    assert part.subset(torch.tensor([0, 0])).coco_api().getImgIds() == [3]  # scored once


def test_evaluation_sees_the_file_s_numbers_crowds_included_and_prints_nothing(tmp_path, capsys):
    content = good()
    api = load(tmp_path, content).coco_api()
    assert capsys.readouterr().out == ""
    for wanted in content["annotations"]:
        assert {key: api.anns[wanted["id"]][key] for key in wanted if key != "segmentation"} == {
            key: value for key, value in wanted.items() if key != "segmentation"
        }


def test_the_evaluation_s_dictionaries_are_new_each_time(tmp_path):
    data = load(tmp_path, good(), with_masks=True)
    data.coco_api().anns[5].update(bbox=[0, 0, 1, 1], segmentation=None)
    assert data.coco_api().anns[5]["bbox"] == [0.25, 0, 12.5, 30]
    assert data.coco_api().anns[5]["segmentation"] == good()["annotations"][1]["segmentation"]


def test_masks_equal_pycocotools(tmp_path):
    content = good()
    code = run_length.encode(np.asfortranarray(np.random.default_rng(0).integers(0, 2, (30, 40)).astype(np.uint8)))
    content["annotations"][3]["segmentation"] = {"size": [30, 40], "counts": code["counts"].decode()}
    data = load(tmp_path, content, with_masks=True)
    with redirect_stdout(io.StringIO()):
        reference = COCO(str(data.annotations))
    masks = data[0].masks
    assert masks.dtype == torch.bool and masks.shape == (2, 30, 40)
    for mask, number in zip(masks, (5, 8)):
        assert np.array_equal(mask.numpy(), reference.annToMask(reference.anns[number]).astype(bool))


def test_area_comes_from_the_outline_then_from_the_box_and_iscrowd_is_no(tmp_path):
    content = good()
    for entry in content["annotations"][:2]:
        del entry["area"], entry["iscrowd"]
    del content["annotations"][1]["segmentation"]
    content["annotations"][3]["area"] = None
    content["annotations"][3]["segmentation"] = [[1, 2]]  # no outline that could be drawn
    api = load(tmp_path, content).coco_api()
    outline = run_length.merge(run_length.frPyObjects([[1, 2, 11, 2, 11, 22]], 30, 40))
    assert api.anns[11]["area"] == run_length.area(outline) and api.anns[11]["iscrowd"] == 0
    assert api.anns[5]["area"] == 12.5 * 30 and api.anns[8]["area"] == 100


def test_files_in_subfolders(tmp_path):
    content = good()
    write(tmp_path, content)
    (tmp_path / "train2017" / "day one" / "ü").mkdir(parents=True)
    (tmp_path / "train2017" / "three.png").rename(tmp_path / "train2017" / "day one" / "ü" / "3.png")
    content["images"][1]["file_name"] = "day one/ü/3.png"
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    assert open_coco(tmp_path, "train")[1].image_id == 3


def test_any_annotation_file_and_image_folder(tmp_path):
    write(tmp_path, good(), name="mine.json", split="holiday")
    data = CocoDataset(str(tmp_path / "holiday2017"), str(tmp_path / "annotations" / "mine.json"))
    assert data[0].image_id == 7


def test_a_byte_order_mark_is_no_damage(tmp_path):
    assert len(load(tmp_path, b"\xef\xbb\xbf" + json.dumps(good()).encode())) == 3


def test_text_that_looks_like_polygons_inside_a_name_is_left_alone(tmp_path):
    content = good()
    content["categories"][0]["name"] = name = 'x "segmentation": [1, 2] y'
    assert load(tmp_path, content).categories.names == ("cat", name)


def test_shared_columns_make_the_message_to_a_worker_small(tmp_path):
    content = good()
    small = len(ForkingPickler.dumps(load(tmp_path, content)))
    content["annotations"] += [annotation(100 + i, 3, 2, [1, 1, 5, 5]) for i in range(5000)]
    data = load(tmp_path, content)
    assert len(ForkingPickler.dumps(data)) < small + 200 < 5000
    assert pickle.loads(pickle.dumps(data))[1].labels.shape == (5001,)


# ---------------------------------------------------------------- skip and warn


@pytest.mark.parametrize(
    "bbox, reason",
    [
        ([5, 5, 0, 4], "without positive width and height"),
        ([5, 5, 4, -1], "without positive width and height"),
        ([math.nan, 5, 4, 4], "without a finite box"),
        ([5, 5, math.inf, 4], "without a finite box"),
        ([5, 5, None, 4], "without a finite box"),
        (None, "without a finite box"),
        ([], "without a finite box"),
        ([40, 5, 4, 4], "outside the image"),
        ([-9, 5, 9, 4], "outside the image"),
        ([5, 400, 9, 4], "outside the image"),
    ],
)
def test_a_box_that_cannot_be_learned_is_skipped_with_a_warning(tmp_path, bbox, reason):
    content = good()
    content["annotations"].append(annotation(77, 3, 2, bbox))
    with pytest.warns(DataWarning, match=rf"skipped 1 of 5 annotations .*{reason} \(annotation ids 77\)") as caught:
        data = open_coco(write(tmp_path, content), "train")
    assert len(caught) == 1 and str(data.annotations) in str(caught[0].message)
    assert data[1].labels.tolist() == [1] and 77 not in data.coco_api().anns
    assert data.coco_api().anns.keys() == {5, 6, 8, 11}


def test_an_annotation_without_the_field_bbox_is_skipped(tmp_path):
    content = good()
    del content["annotations"][0]["bbox"]
    with pytest.warns(DataWarning, match="annotation ids 11"):
        assert open_coco(write(tmp_path, content), "train").object_counts.tolist() == [2, 0, 0]


def test_a_box_over_the_edge_is_clipped_with_a_warning_and_less_than_a_pixel_without(tmp_path):
    content = good()
    content["annotations"][0]["bbox"] = [30, -5, 20, 20]
    content["annotations"][3]["bbox"] = [30, 20, 10.4, 10.9]
    with pytest.warns(DataWarning, match=r"clipped 1 of 4 boxes .* \(annotation ids 11\)"):
        data = open_coco(write(tmp_path, content), "train")
    assert data[1].boxes.tolist() == [[30, 0, 40, 15]]
    assert data[0].boxes[1].tolist() == [30, 20, 40, 30]
    assert data.coco_api().anns[11]["bbox"] == [30, -5, 20, 20]  # the evaluation is on the file's box


def test_boxes_written_as_corners_get_a_hint(tmp_path):
    content = good()
    for entry in content["annotations"]:
        entry["bbox"] = [20, 10, 38, 28]
    with pytest.warns(DataWarning, match="suggest corners"):
        open_coco(write(tmp_path, content), "train")


def test_an_image_listed_under_two_ids_is_kept_with_a_warning(tmp_path):
    content = good()
    content["images"].append({**content["images"][0], "id": 8})
    with pytest.warns(DataWarning, match="1 images share a file .* seven.png"):
        assert len(open_coco(write(tmp_path, content), "train")) == 4


@pytest.mark.parametrize(
    "outline",
    [
        None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 1, 5, 1, math.nan, 5]], "poly", {"counts": None},
        {"size": [30, 40], "counts": "5"}, {"size": [30, 40], "counts": [5, 5]}, {"size": [40, 30], "counts": [1200]},
    ],
)
def test_an_annotation_without_an_outline_is_skipped_when_masks_are_wanted(tmp_path, outline):
    content = good()
    content["annotations"][0]["segmentation"] = outline
    with pytest.warns(DataWarning, match=r"without a usable outline \(annotation ids 11\)"):
        data = open_coco(write(tmp_path, content), "train", with_masks=True)
    assert data[1].masks.shape == (0, 30, 40) and 11 not in data.coco_api().anns
    load(tmp_path, content)  # and without masks nobody minds


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, -2, -1, 7]])
def test_ids_with_a_zero_are_warned_of_and_shifted_in_the_evaluation_alone(tmp_path, ids):
    content = good()
    for number, entry in zip(ids, content["annotations"]):
        entry["id"] = number
    content["annotations"][1]["bbox"] = [5, 5, 0, 0]
    with pytest.warns(DataWarning) as caught:
        data = open_coco(write(tmp_path, content), "train")
    messages = [str(warning.message) for warning in caught]
    assert any("annotation id 0 is used (entry 0" in m and "all 4 annotations" in m for m in messages), messages
    assert any(f"(annotation ids {ids[1]})" in m for m in messages), messages  # the id that stands in the file
    api = data.coco_api()
    assert min(api.anns) >= 1 and len(api.anns) == 3
    assert sorted(a["bbox"] for a in api.anns.values()) == sorted(
        entry["bbox"] for entry in content["annotations"] if entry["bbox"][2])


def with_heading() -> dict:
    "The sound content with Roboflow's category 0 before the others."
    content = good()
    for entry in content["categories"]:
        entry["supercategory"] = "animals"
    content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    return content


def test_a_category_that_is_only_the_group_of_the_others_is_left_out_with_a_warning(tmp_path):
    with pytest.warns(DataWarning, match=r"left out category 0 \(animals\).*Classes: 2"):
        data = open_coco(write(tmp_path, with_heading()), "train")
    assert data.categories.names == ("cat", "kite") and data.categories.ids == (2, 90)


def test_a_group_that_an_annotation_uses_is_a_class(tmp_path):
    content = with_heading()
    content["annotations"][0]["category_id"] = 0
    data = load(tmp_path, content)
    assert data.categories.ids == (0, 2, 90) and data[1].labels.tolist() == [0]


@pytest.mark.parametrize("change", [
    lambda categories: categories[1].update(supercategory="other"),  # not the group of all
    lambda categories: categories[0].update(supercategory="animals"),  # a group of itself, as `person` in COCO
    lambda categories: categories[0].update(name="thing"),
    lambda categories: [entry.pop("supercategory") for entry in categories],
])
def test_an_unused_category_that_is_not_the_group_of_all_others_stays(tmp_path, change):
    content = with_heading()
    change(content["categories"])
    assert len(load(tmp_path, content).categories.ids) == 3


def test_a_class_of_the_group_s_own_name_stays(tmp_path):
    content = with_heading()
    content["categories"][1]["name"] = "animals"
    with pytest.warns(DataWarning, match="left out category 0"):
        assert open_coco(write(tmp_path, content), "train").categories.names == ("cat", "animals")


# ---------------------------------------------------------------- where the files are


def lay_out(root: Path, *files: str) -> Path:
    "Empty files, and folders where a name ends with a slash."
    for name in files:
        (root / name if name.endswith("/") else (root / name).parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).touch()
    return root


@pytest.mark.parametrize("split, files, annotations, images", [
    ("train", ["annotations/instances_train2017.json", "train2017/"], 0, "train2017"),
    ("val", ["annotations/instances_val2017.json", "val2017/"], 0, "val2017"),
    ("val", ["annotations/instances_val.json", "val/"], 0, "val"),
    ("val", ["annotations/instances_valid.json", "train/_annotations.coco.json", "images/valid/"], 0, "images/valid"),
    ("train", ["annotations/instances_train2014.json", "images/train2014/"], 0, "images/train2014"),
    ("train", ["train/_annotations.coco.json", "valid/_annotations.coco.json"], 0, "train"),
    ("val", ["train/_annotations.coco.json", "valid/_annotations.coco.json"], 1, "valid"),
    ("test", ["train/_annotations.coco.json", "test/_annotations.coco.json"], 1, "test"),
    ("train", ["annotations/instances_train2017.json", "train/_annotations.coco.json", "train2017/"], 0, "train2017"),
    ("val", ["annotations/instances_val2017.json", "val/_annotations.coco.json", "val2017/"], 0, "val2017"),
    ("train", ["annotations/instances_default.json", "images/default/"], 0, "images/default"),  # CVAT
    ("train", ["annotations/instances_default.json", "images/"], 0, "images"),
    ("train", ["annotations/instances_Train.json", "annotations/instances_Validation.json", "images/Train/"], 0,
     "images/Train"),
    ("val", ["annotations/instances_Train.json", "annotations/instances_Validation.json", "images/Validation/"], 1,
     "images/Validation"),
])  # fmt: skip
def test_a_layout_is_recognised(tmp_path, split, files, annotations, images):
    assert find_split(lay_out(tmp_path, *files), split) == (tmp_path / files[annotations], tmp_path / images)


@pytest.mark.parametrize("split, files, words", [
    ("train", [], ["no annotation file", "'train'", "instances_train2017.json", "train/_annotations.coco.json", "none",
                   "--train_annotations and --train_images"]),
    ("val", ["train/_annotations.coco.json"], ["no annotation file", "valid/_annotations.coco.json",
                                               "there: train/_annotations.coco.json", "--val_annotations"]),
    ("train", ["_annotations.coco.json"], ["no annotation file", "there: _annotations.coco.json"]),
    ("train", ["annotations/instances_train2014.json", "annotations/instances_train2019.json", "train2014/"],
     ["several", "instances_train2014.json, annotations/instances_train2019.json", "--train_annotations"]),
    ("val", ["val/_annotations.coco.json", "valid/_annotations.coco.json"], ["several", "there: val/_annotations"]),
    ("train", ["annotations/instances_train.json"], ["no folder of images", "instances_train.json", "images/train",
                                                     "--train_images"]),
    ("train", ["annotations/instances_trainer.json", "trainer/"], ["no annotation file"]),
    ("val", ["annotations/instances_default.json", "images/"], ["no annotation file", "_default", "--val_share"]),
])  # fmt: skip
def test_a_layout_that_is_unclear_is_refused_with_what_was_looked_for(tmp_path, split, files, words):
    with pytest.raises(DataError) as caught:
        find_split(lay_out(tmp_path, *files), split)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    assert all(word in message for word in words), message


# ---------------------------------------------------------------- what exporters leave out or write otherwise


def loosely(root: Path, content, **more) -> tuple[CocoDataset, list[str]]:
    "The data set of the content, and what it warns of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        data = open_coco(write(root, content), "train", **more)
    return data, [str(warning.message) for warning in caught if warning.category is DataWarning]


@pytest.mark.parametrize("lacking", [("width", "height"), ("height",), ("width",)])
def test_sizes_that_the_file_lacks_come_from_the_images_with_one_warning(tmp_path, lacking):
    content = good()
    for image in content["images"][1:]:
        for number, key in enumerate(lacking):
            image.update({key: None}) if image["id"] == 3 and number else image.pop(key)
    data, said = loosely(tmp_path, content, with_masks=True)
    assert len(said) == 1 and "2 of 3 images are listed without width and height" in said[0]
    whole, _ = loosely(tmp_path, good(), with_masks=True)
    assert torch.equal(data.sizes, whole.sizes)
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(data[i][:3], whole[i][:3]))


@pytest.mark.parametrize("orientation, turned", [(1, False), (3, False), (6, True), (8, True), (65537, False)])
def test_a_size_that_the_file_lacks_is_that_of_the_picture_as_people_see_it(tmp_path, orientation, turned):
    content = good()
    del content["images"][1]["width"]
    path = write(tmp_path, content) / "train2017" / "three.png"
    Image.new("RGB", (40, 30)).save(path, exif=exif_note(orientation))
    with warnings.catch_warnings(record=True):
        data = open_coco(tmp_path, "train")
    assert data.sizes[1].tolist() == ([40, 30] if turned else [30, 40])
    assert list(data[1].image.shape[1:]) == data.sizes[1].tolist()


def test_a_size_that_neither_the_file_nor_the_image_tells_is_refused(tmp_path):
    content = good()
    content["images"][2] |= {"height": None, "file_name": "gone.png"}
    refuses(tmp_path, content, "image 900 ", "height None", "gone.png")
    refuses(tmp_path, content | {"images": [*content["images"][:2], {"id": 900, "file_name": "."}]}, "image 900 ")
    with pytest.raises(DataError, match="image 900 .*height None"):
        read_index(tmp_path / "annotations" / "instances_train2017.json")


def with_text_ids(content: dict) -> dict:
    for section, key in (("images", "id"), ("annotations", "image_id")):
        for entry in content[section]:
            entry[key] = f"img-{entry[key]}"
    return content


def test_ids_of_images_that_are_text_on_both_sides_are_taken(tmp_path):
    data, whole = load(tmp_path, with_text_ids(good())), load(tmp_path, good())
    assert data.image_ids.tolist() == [1, 2, 3]
    assert torch.equal(data.index.objects.boxes, whole.index.objects.boxes)
    assert torch.equal(data.index.objects.offsets, whole.index.objects.offsets)
    assert sorted(a["image_id"] for a in data.coco_api().dataset["annotations"]) == [1, 1, 1, 2]


def test_ids_of_images_that_are_text_are_checked_like_numbers(tmp_path):
    content = with_text_ids(good())
    content["annotations"][2]["image_id"] = "img-8"
    refuses(tmp_path, content, "annotation ids 6", "image_ids img-8")
    content = with_text_ids(good())
    content["images"][2]["id"] = "img-7"
    refuses(tmp_path, content, "images repeat an id", ": img-7.")
    content = with_text_ids(good())
    content["annotations"][2]["image_id"] = 1  # text on one side is no number of ours
    refuses(tmp_path, content, "image 'img-7' (entry 0 of 'images')", "id 'img-7'")


# ---------------------------------------------------------------- stop: the file as a whole


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=r"no such folder: .*nowhere.* train2017/ and val2017/"):
        open_coco(tmp_path / "nowhere", "train")


def test_no_annotation_file_names_those_there(tmp_path):
    with pytest.raises(DataError, match=r"instances_val2017.json.*; there: annotations/instances_train2017.json"):
        open_coco(write(tmp_path, good()), "val")
    with pytest.raises(DataError, match=r"cannot read annotation file .*absent.json"):
        CocoDataset(tmp_path / "train2017", tmp_path / "absent.json")


def test_no_image_folder(tmp_path):
    with pytest.raises(DataError, match=r"no such folder of images: .*elsewhere"):
        CocoDataset(tmp_path / "elsewhere", write(tmp_path, good()) / "annotations" / "instances_train2017.json")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = json.dumps(good()).encode()
    for length in range(0, len(whole), 7):
        refuses(tmp_path, whole[:length], "instances_train2017.json", "cut short or not JSON", "again")


def test_the_position_of_a_syntax_error_is_the_file_s_own(tmp_path):
    whole = json.dumps(good()).encode()
    place = whole.index(b'"annotations"')
    refuses(tmp_path, whole[:place] + b"!" + whole[place:], f"(byte {place})")


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"\x89PNG\r\n", b"<html>404", b'{"a": "\xe9"}', b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path, text):
    refuses(tmp_path, text, "instances_train2017.json", "cut short or not JSON")


@pytest.mark.parametrize("content", [[], [{"image_id": 1}], 3, "x", None])
def test_what_is_not_an_object_is_refused(tmp_path, content):
    refuses(tmp_path, content, "instances_train2017.json", "not a COCO object")


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("entries", ["absent", [], None, {"1": {}}, "text", 7])
def test_a_list_that_is_missing_or_empty_is_refused(tmp_path, name, entries):
    content = {**good(), name: entries}
    if entries == "absent":
        del content[name]
    refuses(tmp_path, content, "instances_train2017.json", f"has no {name}")


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_an_entry_that_is_not_an_object_is_refused(tmp_path, name):
    content = good()
    content[name][1] = ["not", "an", "object"]
    refuses(tmp_path, content, f"entry 1 of '{name}'", "not an object")


# ---------------------------------------------------------------- stop: entries

BIG = 2**70


@pytest.mark.parametrize(
    "name, key, value, words",
    [
        ("annotations", "image_id", 4, ["annotation ids 6", "image_ids 4"]),
        ("annotations", "category_id", 3, ["annotation ids 6", "category_ids 3"]),
        ("annotations", "id", 5, ["annotations repeat an id", ": 5."]),
        ("annotations", "id", "6", ["entry 2 of 'annotations'", "'6'"]),
        ("annotations", "id", None, ["entry 2 of 'annotations'", "None"]),
        ("annotations", "id", 6.5, ["entry 2 of 'annotations'", "6.5"]),
        ("annotations", "id", BIG, ["entry 2 of 'annotations'", str(BIG)]),
        ("annotations", "image_id", "7", ["annotation 6 ", "image_id '7'"]),
        ("annotations", "category_id", True, ["annotation 6 ", "category_id True"]),
        ("annotations", "bbox", [1, 2, 3], ["annotation 6", "[1.0, 2.0, 3.0]", "[x, y, width, height]"]),
        ("annotations", "bbox", ["1", 2, 3, 4], ["annotation 6", "'1'"]),
        ("annotations", "bbox", {"x": 1}, ["annotation 6", "'x'"]),
        ("annotations", "bbox", [[1, 2], [3, 4], 1, 1], ["annotation 6", "[[1, 2]"]),
        ("annotations", "bbox", 12, ["annotation 6", "12"]),
        ("annotations", "iscrowd", 2, ["annotation 6", "iscrowd 2"]),
        ("annotations", "iscrowd", "no", ["annotation 6", "iscrowd 'no'"]),
        ("annotations", "iscrowd", [1], ["annotation 6", "iscrowd [1]"]),
        ("images", "id", 7, ["images repeat an id", ": 7."]),
        ("images", "id", "900", ["entry 2 of 'images'", "'900'"]),
        ("images", "width", 0, ["image 900", "width 0"]),
        ("images", "height", -3, ["image 900", "height -3"]),
        ("images", "file_name", "", ["image 900", "file_name ''"]),
        ("images", "file_name", None, ["image 900", "file_name None"]),
        ("images", "file_name", 900, ["image 900", "file_name 900"]),
        ("images", "file_name", "gone.png", ["1 of 3 images", "gone.png", "image 900", "train2017"]),
        ("images", "file_name", "deep/none.png", ["1 of 3 images", "deep/none.png"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path, name, key, value, words):
    content = good()
    content[name][2][key] = value
    refuses(tmp_path, content, "instances_train2017.json", *words)


def test_a_wrong_field_is_named_also_beside_a_number_that_is_none(tmp_path):
    content = good()
    content["annotations"][0]["area"], content["annotations"][2]["image_id"] = math.nan, 6.5
    refuses(tmp_path, content, "annotation 6 ", "image_id 6.5")


def test_categories_with_one_id_are_refused(tmp_path):
    content = good()
    content["categories"].append({"id": 2, "name": "dog"})
    refuses(tmp_path, content, "categories repeat an id", ": 2.")


def test_numbers_too_large_for_a_float_are_no_crash(tmp_path):
    content = good()
    content["annotations"][0]["bbox"][2] = 10**400
    refuses(tmp_path, content, "annotation 11", "bbox")
    content = good()
    content["annotations"][0]["area"] = 10**400
    with pytest.warns(DataWarning, match=r"replaced 1 of 4 areas .* \(annotation ids 11\)"):
        data = open_coco(write(tmp_path, content), "train")
    assert data.coco_api().anns[11]["area"] < 300  # that of the outline


def test_a_file_without_any_usable_box_is_refused(tmp_path):
    content = good()
    for entry in content["annotations"]:
        entry["bbox"] = [0, 0, 0, 0]
    refuses(tmp_path, content, "none of its 4 annotations has a usable box")


def test_a_file_with_crowds_only_is_refused(tmp_path):
    content = good()
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    refuses(tmp_path, content, "none of its 4 annotations has a usable box")


def test_boxes_as_fractions_of_the_image_are_refused(tmp_path):
    content = good()
    for entry in content["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.5, 0.25]
    refuses(tmp_path, content, "first pixel", "in pixels")


def test_masks_of_a_file_without_outlines_are_refused(tmp_path):
    content = good()
    for entry in content["annotations"]:
        entry["segmentation"] = []
    refuses(tmp_path, content, "no annotation has a usable 'segmentation'", with_masks=True)


# ---------------------------------------------------------------- stop: images


def encoded(kind: str, **more) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_cut_anywhere_is_refused_or_whole(tmp_path, kind):
    whole = encoded(kind)
    (tmp_path / "whole").write_bytes(whole)
    pixels = read_image(tmp_path / "whole")
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        (tmp_path / "cut").write_bytes(whole[:length])
        try:
            assert torch.equal(read_image(tmp_path / "cut"), pixels), f"{length} of {len(whole)} bytes read as an image"
        except DataError as error:
            refused += 1
            assert str(tmp_path / "cut") in str(error) and f"({length} bytes)" in str(error)
    assert refused >= 140


def test_an_image_that_is_none_is_refused_with_its_name(tmp_path):
    data = load(tmp_path, good())
    path = tmp_path / "train2017" / "three.png"
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"cannot decode image .*three\.png \(16 bytes\)"):
        data[1]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read image .*three\.png: No such file"):
        data[1]
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot read image .*three\.png"):
        data[1]


def test_a_size_other_than_listed_is_refused_with_both(tmp_path):
    data = load(tmp_path, good())
    Image.new("RGB", (41, 30)).save(tmp_path / "train2017" / "three.png")
    with pytest.raises(DataError, match=r"three\.png is 41x30 .* image 3 as 40x30") as caught:
        data[1]
    assert "EXIF" not in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_picture_that_is_listed_as_people_see_it_is_read_upright(tmp_path, orientation, kind):
    data, exif = load(tmp_path, good()), Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train2017" / "three.png", kind, exif=exif)
    with Image.open(tmp_path / "train2017" / "three.png") as stored:
        upright = np.array(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(data[1].image.permute(1, 2, 0), upright) and upright.shape == (30, 40, 3)


def test_a_size_that_fits_neither_way_is_refused_with_both(tmp_path):
    data, exif = load(tmp_path, good()), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 41)).save(tmp_path / "train2017" / "three.png", exif=exif)
    with pytest.raises(DataError, match=r"three\.png is 30x41 .*on disk, 41x30 turned by its EXIF note, but .* 40x30"):
        data[1]


@pytest.mark.parametrize("orientation", [0, 9, 65535, 65537])
def test_an_orientation_that_is_none_is_no_rotation(tmp_path, orientation, recwarn):
    data = load(tmp_path, good())
    Image.new("RGB", (40, 30)).save(tmp_path / "train2017" / "three.png", exif=exif_note(orientation))
    assert data[1].image.shape == (3, 30, 40)
    assert not [warning for warning in recwarn.list if issubclass(warning.category, DataWarning)]


def test_pixels_are_read_as_stored_whatever_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "b.jpg").write_bytes(encoded("JPEG", exif=exif))
    assert torch.equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "b.jpg"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_every_mode_of_pil_is_read_as_pil_reads_it(tmp_path, mode, kind):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(tmp_path / f"x.{kind}")
    image = read_image(tmp_path / f"x.{kind}")
    assert image.dtype == torch.uint8 and image.shape == (3, 9, 7)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture.convert("RGB")))


def test_without_torchvision_s_decoders_pil_gives_the_same_pixels(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    pixels = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr("detr_nb.coco.decode_image", None)
    assert torch.equal(read_image(tmp_path / "a.jpg"), pixels)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_become_eight(tmp_path, kind):
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)).save(tmp_path / f"x.{kind}")
    assert read_image(tmp_path / f"x.{kind}")[:, 0].tolist() == [[0, 0, 1, 128, 255]] * 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_a_data_error_in_a_loader_worker_stays_one(tmp_path):
    data = load(tmp_path, good())
    (tmp_path / "train2017" / "three.png").write_bytes(b"")
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)
    with pytest.raises(DataError, match=r"three\.png"):
        list(loader)


# ---------------------------------------------------------------- properties


@st.composite
def coco_files(draw) -> dict:
    "Valid files of any size, order, ids and numbers."
    ids = st.integers(-(2**62), 2**62)
    images = [
        {"id": i, "file_name": f"{n}.png", "width": draw(st.integers(2, 5000)), "height": draw(st.integers(2, 5000))}
        for n, i in enumerate(draw(st.lists(ids, min_size=1, max_size=6, unique=True)))
    ]
    categories = [{"id": i, "name": f"c{i}"} for i in draw(st.lists(ids, min_size=1, max_size=5, unique=True))]
    numbers = draw(st.lists(ids.filter(bool), min_size=1, max_size=12, unique=True))
    annotations = []
    for n, number in enumerate(numbers):
        image = draw(st.sampled_from(images))
        x, y = draw(st.floats(0, image["width"] - 1.5)), draw(st.floats(0, image["height"] - 1.5))
        w, h = draw(st.floats(1.25, image["width"] - x)), draw(st.floats(1.25, image["height"] - y))
        entry = annotation(number, image["id"], draw(st.sampled_from(categories))["id"], [x, y, w, h])
        entry["area"] = draw(st.floats(0, w * h))
        entry["iscrowd"] = draw(st.integers(0, 1)) if n else 0
        entry["segmentation"] = [[x, y, x + w, y, x, y + h]]
        annotations.append(entry)
    return {"images": images, "annotations": draw(st.permutations(annotations)), "categories": categories}


@settings(max_examples=60)
@given(content=coco_files(), with_masks=st.booleans())
def test_every_valid_file_comes_back_as_it_was(tmp_path_factory, content, with_masks):
    path = tmp_path_factory.mktemp("any") / "any.json"
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, objects, categories = read_index(path, with_masks)
    assert images.ids.tolist() == [entry["id"] for entry in content["images"]]
    assert [name.decode() for name in images.names.unpack()] == [entry["file_name"] for entry in content["images"]]
    assert list(categories.ids) == sorted(entry["id"] for entry in content["categories"])
    for row, image in enumerate(content["images"]):
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]  # in the file's order
        part = slice(*objects.offsets[row : row + 2].tolist())
        assert objects.ids[part].tolist() == [entry["id"] for entry in own]
        assert objects.boxes[part].tolist() == [entry["bbox"] for entry in own]
        assert objects.areas[part].tolist() == [entry["area"] for entry in own]
        assert objects.crowd[part].tolist() == [bool(entry["iscrowd"]) for entry in own]
        assert categories.to_id(objects.labels[part]).tolist() == [entry["category_id"] for entry in own]
        if with_masks:
            outlines = [json.loads(objects.outlines.item(i)) for i in range(part.start, part.stop)]
            assert outlines == [entry["segmentation"] for entry in own]


@given(items=st.lists(st.binary(max_size=20), max_size=20))
def test_packed_bytes_unpack(items):
    packed = PackedBytes.pack(items)
    assert packed.unpack() == items and [packed.item(i) for i in range(len(items))] == items


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed, density):
    mask = (np.random.default_rng(seed).random((23, 17)) < density).astype(np.uint8, order="F")
    runs = runs_of(run_length.encode(mask)["counts"].decode())
    rebuilt = np.repeat(np.arange(len(runs)) % 2, runs).reshape((23, 17), order="F")
    assert np.array_equal(rebuilt, mask)
