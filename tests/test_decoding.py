"JPEG files that are used small are decoded small: nothing but a few grey levels may tell."
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from detr_nb.annotations import DataError
from detr_nb.coco import CocoDataset, read_image
from detr_nb.transforms import Compose, Limit, RandomCrop, RandomFlip, Resize, laptop_transform, paper_transform

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision 0.29
SIZES = [(960, 1280), (1283, 961), (2001, 1499), (700, 2800)]  # (height, width)
RECIPES = {"training": lambda exact: paper_transform(True, 0.1, exact),
           "validation": lambda exact: paper_transform(False, 0.1, exact),
           "laptop": lambda exact: laptop_transform(True), "one size": lambda exact: Resize([90], 140, exact)}


def photograph(size: tuple[int, int]) -> Image.Image:
    "A slope of colours with discs and lines on it, detail of all sizes."
    height, width = size
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x * 255 // width, y * 255 // height, (x + y) // 8 % 256], -1).astype(np.uint8)
    picture, rng = Image.fromarray(slope), np.random.default_rng(height)
    draw = ImageDraw.Draw(picture)
    for radius in rng.integers(5, 200, 60).tolist():
        (x, y), color = rng.integers(0, (width, height)).tolist(), tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="black", width=3)
    return picture


def make_set(root: Path, ending: str = "jpg", **more) -> Path:
    "A photograph of each size, each with two boxes."
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES, start=1):
        photograph((height, width)).save(root / f"{number}.{ending}", quality=90, **more)
        images.append({"id": number, "file_name": f"{number}.{ending}", "width": width, "height": height})
        for x, y, w, h in ((0, 0, width, height), (width * 0.3, height * 0.4, width / 3, height / 4)):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": [x, y, w, h]})
    path = root / "set.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations,
                                "categories": [{"id": 1, "name": "all"}]}))
    return path


def both(path: Path, transform, **more) -> tuple[CocoDataset, CocoDataset]:
    "The set with the transform, and with the same one behind a function, which has no `read`."
    return tuple(CocoDataset(path.parent, path, transform=one, **more)
                 for one in (transform, lambda sample, rng: transform(sample, rng)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_crops_and_boxes_are_those_of_the_whole_picture(photographs, recipe):
    reduced, whole = both(photographs, RECIPES[recipe](False))
    for epoch in range(12):
        for place in range(len(SIZES)):
            a, b = reduced[epoch, place], whole[epoch, place]
            assert a.image.shape == b.image.shape and a[3:] == b[3:]
            assert torch.equal(a.labels, b.labels) and torch.allclose(a.boxes, b.boxes, atol=1e-3)
            apart = (a.image.int() - b.image.int()).abs()
            assert apart.max() <= 40 and apart.float().mean() < 1.5


def test_what_is_decoded_is_smaller_and_twice_what_is_needed(photographs):
    transform, counts = RECIPES["validation"](False), []
    for number, size in enumerate(SIZES, start=1):
        image, needed = transform.read(photographs.parent / f"{number}.jpg", size), transform.size_needed(*size)
        assert all(a >= 2 * b for a, b in zip(image.shape[1:], needed))
        counts.append(image[0].numel() * 16 / (size[0] * size[1]))
    assert max(counts) < 5  # a quarter of both sides and less, but for one that is a half, or odd


@pytest.mark.parametrize("recipe", ["training", "validation", "one size"])
def test_an_exact_resize_reads_every_pixel(photographs, recipe):
    reduced, whole = both(photographs, RECIPES[recipe](True))
    for place in range(len(SIZES)):
        assert torch.equal(reduced[1, place].image, whole[1, place].image)


def test_an_object_stays_in_its_box(tmp_path):
    "A white rectangle on black, its edges between the pixels of the reduced picture, fills its box to half a pixel."
    picture, (x, y, w, h) = Image.new("RGB", (1283, 1027)), (1101, 905, 180, 121)  # at the far corner
    picture.paste("white", (x, y, x + w, y + h))
    picture.save(tmp_path / "a.jpg", quality=95)
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h]}
    (tmp_path / "set.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "width": 1283, "height": 1027}], "annotations": [entry],
        "categories": [{"id": 1, "name": "all"}]}))
    sample = CocoDataset(tmp_path, tmp_path / "set.json", transform=Resize([90]))[0]
    light = sample.image.float().mean(0) / 255
    seen = [light.amax(0).sum(), light.amax(1).sum()]  # width and height in pixels, edges by their share
    box = sample.boxes[0]
    assert [float(side) for side in seen] == pytest.approx((box[2:] - box[:2]).tolist(), abs=0.3)
    columns = torch.arange(light.shape[1]) + 0.5
    middle = (light.amax(0) * columns).sum() / light.amax(0).sum()
    assert float(middle) == pytest.approx(float(box[[0, 2]].mean()), abs=0.3)


def test_masks_get_the_whole_picture(photographs, tmp_path):
    content = json.loads(photographs.read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (tmp_path / "outlined.json").write_text(json.dumps(content))
    one, other = (CocoDataset(photographs.parent, tmp_path / "outlined.json", transform=transform, with_masks=True)
                  for transform in (RECIPES["validation"](False), lambda s, rng: RECIPES["validation"](False)(s, rng)))
    assert torch.equal(one[0].image, other[0].image) and torch.equal(one[0].masks, other[0].masks)


@pytest.mark.parametrize("transform", [
    Compose([RandomCrop(200, 300), Resize([50])]), Compose([lambda s, rng: s, Resize([50])]), Compose([]),
    Compose([RandomFlip(), Limit(5000)])])
def test_a_transform_that_looks_at_pixels_before_it_resizes_gets_all_of_them(photographs, transform):
    reduced, whole = both(photographs, transform)
    assert all(torch.equal(reduced[i].image, whole[i].image) for i in range(len(SIZES)))


@pytest.mark.parametrize("ending, mode", [("png", "RGB"), ("jpg", "CMYK")])
def test_other_files_are_read_whole(tmp_path, ending, mode):
    photograph(SIZES[0]).convert(mode).save(tmp_path / f"a.{ending}")
    assert Resize([50]).read(tmp_path / f"a.{ending}", SIZES[0]) is None


def test_a_picture_that_is_to_be_turned_is_read_whole(tmp_path):
    note = Image.Exif()
    note[0x0112] = 6
    photograph(SIZES[0]).save(tmp_path / "a.jpg", exif=note)
    assert Resize([50]).read(tmp_path / "a.jpg", SIZES[0][::-1]) is None
    assert Resize([50]).read(tmp_path / "a.jpg", SIZES[0]) is not None


@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-2000] + bytes(2000),
                                   lambda raw: b"<html>"])
def test_a_broken_file_is_refused_as_ever(photographs, tmp_path, spoil):
    for path in photographs.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "2.jpg"
    broken.write_bytes(spoil(broken.read_bytes()))
    with pytest.raises(DataError) as expected:
        read_image(broken)
    with pytest.raises(DataError) as caught, warnings.catch_warnings():
        CocoDataset(tmp_path, tmp_path / "set.json", transform=Resize([50]))[1]
    assert str(caught.value) == str(expected.value)
