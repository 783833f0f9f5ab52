"""Panoptic data, post-processing and quality against plain loops, in several processes, and on bad input."""
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from book_demos import spawn
from PIL import Image

from detr_nb.annotations import DataError, DataWarning
from detr_nb.batching import CachedDataset, make_loader
from detr_nb.detr import Predictions, build_detr
from detr_nb.distributed import Process, UserError
from detr_nb.evaluation import evaluate
from detr_nb.panoptic import PanopticEvaluator, PanopticQuality, PanopticWriter, judge, panoptic_segments
from detr_nb.panoptic_data import PanopticDataset, Segments, open_panoptic
from detr_nb.segmentation import MaskCriterion, build_segmentation
from detr_nb.shapes import CATEGORIES, STUFF, draw_scene
from detr_nb.shapes_set import ids_to_rgb, write_shapes
from detr_nb.transforms import laptop_transform

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=60, num_val=24, num_workers=0)


# ---- reading -------------------------------------------------------------------------------------------------------


def test_samples_are_what_was_drawn(shapes: Path):
    dataset, ids = open_panoptic(shapes, None, "train"), [*CATEGORIES, *STUFF]
    assert dataset.categories.ids == tuple(sorted(ids)) and dataset.is_thing.tolist() == [True] * 6 + [False] * 4
    crowds = 0
    for index in range(len(dataset)):
        sample, scene = dataset[index], draw_scene(seed=0, index=index)
        things, real = dataset.is_thing[sample.labels], ~scene.crowd
        assert torch.equal(sample.labels[things], scene.labels[real])
        assert torch.equal(sample.masks[things], scene.masks[real])
        assert torch.equal(sample.boxes[things], scene.boxes[real])
        free = ~scene.masks.any(0)
        for label, mask, box in zip(sample.labels[~things], sample.masks[~things], sample.boxes[~things]):
            assert torch.equal(mask, free & (scene.stuff == int(label) - 6))
            y, x = mask.nonzero().unbind(1)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]  # a pixel reaches from x to x + 1
        assert int(dataset.object_counts[index]) == len(sample.labels)
        assert len(scene.labels) or not things.any()  # without things there is stuff alone
        assert int(dataset.segments(index).crowd.sum()) == int(scene.crowd.sum())
        crowds += int(scene.crowd.sum())
    assert crowds > 0 and not dataset.skipped.images


def test_goes_through_loader_cache_subset_and_transforms(shapes: Path):
    dataset = open_panoptic(shapes, shapes, "train", transform=laptop_transform(train=True), seed=3)
    cached = CachedDataset(dataset)
    assert cached.is_thing is dataset.is_thing and torch.equal(cached.segments(5).pixels, dataset.segments(5).pixels)
    chosen = cached.subset([4, 1, 8])
    assert chosen.image_ids.tolist() == dataset.image_ids[[4, 1, 8]].tolist()
    assert torch.equal(chosen.segments(2).pixels, dataset.segments(8).pixels)
    for first, second in zip(make_loader(dataset, 4), make_loader(cached, 4)):
        assert torch.equal(first.targets.masks, second.targets.masks) and torch.equal(first.images, second.images)
        assert len(first.targets.masks) == len(first.targets.labels) == len(first.targets.boxes)


# ---- bad input -----------------------------------------------------------------------------------------------------

SIZE = (6, 8)
CLASSES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 90, "name": "grass", "isthing": 0},
           {"id": 200, "name": "sky", "isthing": 0}]


def make_set(folder: Path, change: Callable[[dict, np.ndarray], np.ndarray | None] = lambda content, ids: None) -> dict:
    "One image: a cat (id 70000), a crowd of cats (300), grass (9); sparse ids. `change` may damage it."
    ids = np.zeros(SIZE, dtype=np.int64)
    ids[:2, :3], ids[2:4, 4:], ids[4:] = 70000, 300, 9
    segments = [{"id": 70000, "category_id": 7, "iscrowd": 0}, {"id": 300, "category_id": 7, "iscrowd": 1},
                {"id": 9, "category_id": 90, "iscrowd": 0}]
    content = {"images": [{"id": 5, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
               "categories": json.loads(json.dumps(CLASSES)),
               "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": segments}]}
    changed = change(content, ids)
    ids = ids if changed is None else changed
    for name in ("images", "pngs"):
        (folder / name).mkdir(exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "a.jpg")
    Image.fromarray(ids_to_rgb(ids)).save(folder / "pngs" / "a.png")
    (folder / "panoptic.json").write_text(json.dumps(content))
    return content


def open_set(folder: Path) -> PanopticDataset:
    return PanopticDataset(folder / "images", folder / "panoptic.json", folder / "pngs")


def test_the_sound_set_is_read(tmp_path: Path):
    make_set(tmp_path)
    dataset = open_set(tmp_path)
    sample, truth = dataset[0], dataset.segments(0)
    assert sample.labels.tolist() == [0, 1] and sample.boxes.tolist() == [[0, 0, 3, 2], [0, 4, 8, 6]]
    assert truth.ids.tolist() == [70000, 300, 9] and truth.areas.tolist() == [6, 8, 16]
    assert truth.crowd.tolist() == [False, True, False] and truth.is_thing.tolist() == [True, True, False]


def first(content: dict) -> dict:
    return content["annotations"][0]


def grass(content: dict) -> dict:
    return first(content)["segments_info"][2]


REFUSED = {  # what is done to the content, and what the message must say
    "no isthing": (lambda content: content["categories"][1].pop("isthing"), ["categories[1]", "isthing"]),
    "a strange isthing": (lambda content: content["categories"][1].update(isthing="no"), ["categories[1].isthing"]),
    "instances": (lambda content: first(content).pop("segments_info"), ["annotations[0]", "file of instances"]),
    "an id twice": (lambda content: grass(content).update(id=300), ["image 5", "300"]),
    "void": (lambda content: grass(content).update(id=0), ["annotations[0].segments_info[2].id"]),
    "more than three bytes": (lambda content: grass(content).update(id=2**24), ["segments_info[2].id"]),
    "an unknown class": (lambda content: grass(content).update(category_id=91), ["91", "category_id"]),
    "an unknown image": (lambda content: first(content).update(image_id=6), ["image_id", "6"]),
    "two entries": (lambda content: content["annotations"].append(first(content)), ["5", "unique"]),
    "a lost PNG": (lambda content: first(content).update(file_name="b.png"), ["b.png", "pngs"]),
    "a nameless PNG": (lambda content: first(content).pop("file_name"), ["annotations[0]", "file_name"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_when_opened(tmp_path: Path, name: str):
    damage, parts = REFUSED[name]
    make_set(tmp_path, lambda content, ids: (damage(content), ids)[1])
    with pytest.raises(DataError) as error:
        open_set(tmp_path)
    assert all(part in str(error.value) for part in [*parts, "panoptic.json"]), str(error.value)


def test_refuses_pictures_that_do_not_fit(tmp_path: Path):
    "A PNG of another size, one that shares no id with the JSON, an image of another size."
    make_set(tmp_path, lambda content, ids: ids[:, :-1])
    for read in (lambda dataset: dataset[0], lambda dataset: dataset.segments(0)):
        with pytest.raises(DataError, match=r"a\.png is 7x6 .* image 5 as 8x6"):
            read(open_set(tmp_path))
    make_set(tmp_path, lambda content, ids: ids * 3)
    with pytest.raises(DataError, match=r"no pixel of the 3 segments .*image 5 .*70000"):
        open_set(tmp_path)[0]
    make_set(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="9x9"):
        open_set(tmp_path)[0]


def test_drops_segments_without_pixels_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_set(tmp_path, lambda content, ids: np.where(ids == 9, 0, ids))
    dataset = open_set(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dataset[0].labels.tolist() == [0]
    assert dataset.segments(0).ids.tolist() == [70000, 300]
    assert dataset.skipped.images == {"segments without pixels in the PNG": {5: 1}}
    assert len(caplog.records) == 1
    assert all(part in caplog.text for part in ("1 segments without pixels", "image 5", "ids 9", "panoptic.json"))


def test_pixels_that_the_json_does_not_list_are_void(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def unlist(content, ids):
        del content["annotations"][0]["segments_info"][2]

    make_set(tmp_path, unlist)
    dataset = open_set(tmp_path)
    with caplog.at_level(logging.WARNING):
        truth = dataset.segments(0)
    assert truth.pixels.unique().tolist() == [0, 300, 70000] and truth.areas.tolist() == [6, 8]
    assert dataset.skipped.images == {"ids in the PNG that the JSON does not list": {5: 1}}
    assert "image 5" in caplog.text and "ids 9" in caplog.text


def test_images_without_an_entry_are_left_out_with_a_warning(tmp_path: Path):
    def add_image(content, ids):
        content["images"].insert(0, {"id": 2, "file_name": "a.jpg", "height": 6, "width": 8})

    make_set(tmp_path, add_image)
    with pytest.warns(DataWarning) as caught:
        dataset = open_set(tmp_path)
    assert any("1 of 2 images without an entry" in str(warning.message) for warning in caught)
    assert dataset.image_ids.tolist() == [5] and dataset[0].image_id == 5


def test_says_where_it_looked(tmp_path: Path, shapes: Path):
    with pytest.raises(DataError, match="panoptic_val2017.json"):
        open_panoptic(tmp_path, None, "val")
    with pytest.raises(DataError, match="--coco_path"):
        open_panoptic(shapes, tmp_path, "val")


def test_box_evaluation_sees_the_things(tmp_path: Path, shapes: Path):
    dataset = open_panoptic(shapes, None, "val")
    truth = dataset.coco_api()
    assert {a["category_id"] for a in truth.dataset["annotations"]} <= set(CATEGORIES)
    assert len(truth.dataset["annotations"]) == sum(len(draw_scene(0, i, "val").labels) for i in range(24))
    make_set(tmp_path)  # no boxes and areas in the file: measured
    annotations = open_set(tmp_path).coco_api().dataset["annotations"]
    assert [(a["bbox"], a["area"], a["iscrowd"]) for a in annotations] == [([0, 0, 3, 2], 6, 0), ([4, 2, 4, 2], 8, 1)]


# ---- post-processing -----------------------------------------------------------------------------------------------

IS_THING = torch.tensor([True, True, True, False, False, False])


def segments_by_loop(logits, masks, size, target_size, threshold, join_stuff=False):
    "The released rule for one image without padding, as nested loops; also the labels, areas and scores by segment."
    chances = logits.double().softmax(-1)
    kept = [q for q in range(len(logits)) if int(chances[q].argmax()) < len(IS_THING) and chances[q].max() > threshold]
    label = {q: int(chances[q].argmax()) for q in kept}
    first = {q: q if IS_THING[label[q]] else min(p for p in kept if label[p] == label[q]) for q in kept}
    shares = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
    while kept:
        owner = [[max(kept, key=lambda q: float(shares[q, y, x])) for x in range(size[1])] for y in range(size[0])]
        small_map = Image.fromarray(np.array(owner, dtype=np.int32)).resize(target_size[::-1], Image.Resampling.NEAREST)
        shown = [[first[q] for q in row] for row in np.array(small_map).tolist()]
        area = {q: sum(row.count(q) for row in shown) for q in kept}
        small = [q for q in kept if (area[first[q]] if join_stuff else area[q]) <= 4]
        if not small:
            last = [q for q in kept if area[q]]
            numbers = {q: place + 1 for place, q in enumerate(last)}
            ids = [[numbers[q] for q in row] for row in shown]
            return ids, [label[q] for q in last], [area[q] for q in last], [float(chances[q].max()) for q in last]
        kept = [q for q in kept if q not in small]
    return np.zeros(target_size).tolist(), [], [], []


def random_outputs(seed: int, queries: int = 12, coarse: int = 4) -> tuple:
    "Logits, smooth masks, a size and a target size; several queries of each class, some of them nearly empty."
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(20, 45, (2,), generator=generator).tolist()
    target = tuple(torch.randint(15, 60, (2,), generator=generator).tolist())
    logits = 4 * torch.randn(queries, 7, generator=generator)
    masks = 3 * torch.randn(1, queries, coarse, coarse + 1, generator=generator)
    masks = F.interpolate(masks, (-(-height // 4), -(-width // 4)), mode="bilinear")[0]
    return logits, masks, (height, width), target


@pytest.mark.parametrize("join_stuff", [False, True])
def test_equals_a_plain_loop(join_stuff: bool):
    merged = withdrawn = 0
    for seed in range(40):
        logits, masks, size, target = random_outputs(seed)
        found = panoptic_segments(logits[None], masks[None], torch.tensor([size]), torch.tensor([target]), IS_THING,
                                  threshold=0.5, join_stuff=join_stuff)[0]
        ids, labels, areas, scores = segments_by_loop(logits, masks, size, target, 0.5, join_stuff)
        assert found.pixels.tolist() == ids and found.labels.tolist() == labels and found.areas.tolist() == areas
        torch.testing.assert_close(found.scores, torch.tensor(scores), rtol=0, atol=1e-6)
        assert found.is_thing.tolist() == IS_THING[found.labels].tolist() and not found.crowd.any()
        kept = int(((logits.softmax(-1).max(-1).values > 0.5) & (logits.argmax(-1) < 6)).sum())
        stuff = logits.argmax(-1)[(logits.softmax(-1).max(-1).values > 0.5)]
        merged += any((stuff == k).sum() > 1 for k in (3, 4, 5))
        withdrawn += kept > len(labels)
    assert merged > 10 and withdrawn > 10  # the rule's branches were taken


def test_each_image_of_a_padded_batch_is_cut_out_of_the_canvas():
    torch.manual_seed(0)
    sizes, canvas = torch.tensor([[24, 40], [32, 28]]), (32, 40)
    masks, logits = torch.randn(2, 5, 8, 10), torch.zeros(2, 5, 7)
    logits[:, torch.arange(5), [0, 1, 2, 3, 4]] = 9
    found = panoptic_segments(logits, masks, sizes, sizes, IS_THING)
    full = F.interpolate(masks, canvas, mode="bilinear", align_corners=False).argmax(1) + 1
    for (height, width), segments, expected in zip(sizes.tolist(), found, full):
        assert torch.equal(segments.pixels, expected[:height, :width].int())
    wide = panoptic_segments(logits, masks, sizes, sizes, IS_THING, canvas=(32, 48))
    assert not torch.equal(wide[0].pixels, found[0].pixels)  # the canvas matters


def test_what_is_not_surer_than_the_threshold_is_void():
    size = torch.tensor([[8, 12]])
    for queries in (0, 1, 3):  # all of them say no-object
        logits = torch.zeros(1, queries, 7).index_fill(-1, torch.tensor([6]), 9.0)
        found = panoptic_segments(logits, torch.randn(1, queries, 2, 3), size, 2 * size, IS_THING)[0]
        assert found.pixels.shape == (16, 24) and not found.pixels.any() and len(found.ids) == len(found.scores) == 0
    logits = torch.zeros(1, 1, 7).index_fill(-1, torch.tensor([2]), 3.0)
    score, masks = float(logits.softmax(-1).max()), torch.ones(1, 1, 2, 2)
    at, below = (panoptic_segments(logits, masks, size, size, IS_THING, low)[0] for low in (score, score - 1e-6))
    assert len(at.ids) == 0 and below.labels.tolist() == [2] and below.areas.tolist() == [96]


def test_half_precision_is_widened():
    logits, masks, size, target = random_outputs(3)
    sizes = torch.tensor([size]), torch.tensor([target])
    logits, masks = logits[None].bfloat16(), masks[None].bfloat16()
    half, full = (panoptic_segments(a, b, *sizes, IS_THING, 0.5)[0]
                  for a, b in ((logits, masks), (logits.float(), masks.float())))
    assert torch.equal(half.pixels, full.pixels) and torch.equal(half.scores, full.scores)


def test_says_when_the_classes_do_not_fit():
    with pytest.raises(UserError, match="9 classes .* 6 entries"):
        panoptic_segments(torch.zeros(1, 2, 10), torch.zeros(1, 2, 4, 4), *[torch.tensor([[8, 8]])] * 2, IS_THING)


def test_equals_transformers_where_the_rules_agree():
    "Equal scores, masks of the final size that overlap little, each stuff class once, no small segment."
    transformers = pytest.importorskip("transformers")
    from transformers.models.detr.modeling_detr import DetrSegmentationOutput

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(6, 2, generator=generator) * 96
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    masks = -((torch.stack([y, x]) - points[:, :, None, None]) ** 2).sum(1)  # one region around each point
    masks = (masks - masks.topk(2, dim=0).values.mean(0)) / 50
    logits = torch.zeros(1, 6, 7)
    logits[0, torch.arange(6), [0, 1, 1, 3, 4, 5]] = 12
    outputs = DetrSegmentationOutput(logits=logits, pred_masks=masks[None])
    processor = transformers.DetrImageProcessor()
    theirs = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.85, label_ids_to_fuse={3, 4, 5}, target_sizes=[(96, 96)])[0]
    size = torch.tensor([[96, 96]])
    ours = panoptic_segments(logits, masks[None], size, size, IS_THING)[0]
    assert len(ours.ids) == 6 and torch.equal(ours.pixels, theirs["segmentation"].int())
    assert [info["label_id"] for info in theirs["segments_info"]] == ours.labels.tolist()
    torch.testing.assert_close(torch.tensor([info["score"] for info in theirs["segments_info"]]), ours.scores,
                               rtol=0, atol=1e-6)


# ---- quality -------------------------------------------------------------------------------------------------------


def from_map(pixels: np.ndarray, labels: dict[int, int], crowd: set[int] = frozenset(), things: int = 6) -> Segments:
    "Segments of a map; `labels` by id."
    ids = torch.tensor(sorted(set(np.unique(pixels).tolist()) & labels.keys()))
    label = torch.tensor([labels[i] for i in ids.tolist()], dtype=torch.int64)
    areas = torch.tensor([int((pixels == i).sum()) for i in ids.tolist()], dtype=torch.int64)
    crowds = torch.tensor([i in crowd for i in ids.tolist()], dtype=torch.bool)
    return Segments(torch.from_numpy(pixels).int(), ids, label, areas, label < things, crowds, torch.ones(len(ids)))


def quality_by_force(pairs: list[tuple[Segments, Segments]], num_classes: int) -> list[tuple | None]:
    "PQ, SQ, RQ of each class by the definition (Kirillov et al. 2019, sec. 4.1 and 4.2), segment by segment."
    ious, alarms, misses = ([[] for _ in range(num_classes)] for _ in range(3))
    for truth, found in pairs:
        judged = torch.isin(truth.pixels, truth.ids.int())  # not void
        taken = set()
        for t in range(len(truth.ids)):
            partner = None
            for f in range(len(found.ids)):
                a, b = truth.pixels == truth.ids[t], (found.pixels == found.ids[f]) & judged
                iou = int((a & b).sum()) / int((a | b).sum())
                if truth.labels[t] == found.labels[f] and iou > 0.5 and not truth.crowd[t]:
                    partner = f
                    ious[int(truth.labels[t])].append(iou)
            if partner is not None:
                taken.add(partner)
            elif not truth.crowd[t]:
                misses[int(truth.labels[t])].append(1)
        for f in set(range(len(found.ids))) - taken:
            mine = found.pixels == found.ids[f]
            free = mine & ~judged
            for t in range(len(truth.ids)):
                if truth.crowd[t] and truth.labels[t] == found.labels[f]:
                    free |= mine & (truth.pixels == truth.ids[t])
            if int(free.sum()) / int(mine.sum()) <= 0.5:
                alarms[int(found.labels[f])].append(1)
    return [None if not (i or a or m) else
            (math.fsum(i) / (n := len(i) + len(a) / 2 + len(m) / 2), math.fsum(i) / len(i) if i else 0.0, len(i) / n)
            for i, a, m in zip(ious, alarms, misses)]


def merge(truth: Segments, rng: np.random.Generator) -> Segments:
    "The segments of each class, or two at random, become one."
    pixels, labels = truth.pixels.numpy().copy(), dict(zip(truth.ids.tolist(), truth.labels.tolist()))
    first, second = rng.choice(truth.ids.numpy(), 2)
    pixels[pixels == second] = first
    return from_map(pixels, labels)


def split(truth: Segments, rng: np.random.Generator) -> Segments:
    "Segments are cut along a line, at a third or in the middle."
    pixels, labels = truth.pixels.numpy().copy(), dict(zip(truth.ids.tolist(), truth.labels.tolist()))
    for number, i in enumerate(truth.ids.tolist()):
        y, x = np.nonzero(pixels == i)
        cut = np.quantile(x, rng.choice([0.33, 0.5]))
        pixels[y[x > cut], x[x > cut]] = 2**23 + number
        labels[2**23 + number] = labels[i]
    return from_map(pixels, labels)


def shift(truth: Segments, rng: np.random.Generator) -> Segments:
    "Everything moves by a few pixels."
    pixels = np.roll(truth.pixels.numpy(), rng.integers(-8, 9, 2), (0, 1))
    return from_map(pixels, dict(zip(truth.ids.tolist(), truth.labels.tolist())))


def relabel(truth: Segments, rng: np.random.Generator) -> Segments:
    "Some segments have another class."
    labels = truth.labels.numpy().copy()
    labels[rng.random(len(labels)) < 0.4] = rng.integers(10)
    return truth._replace(labels=torch.from_numpy(labels), crowd=torch.zeros_like(truth.crowd))


def erase(truth: Segments, rng: np.random.Generator) -> Segments:
    "A corner becomes void."
    pixels = truth.pixels.numpy().copy()
    pixels[: rng.integers(10, 60), : rng.integers(10, 60)] = 0
    return from_map(pixels, dict(zip(truth.ids.tolist(), truth.labels.tolist())))


DAMAGES = [merge, split, shift, relabel, erase]


class Truth:
    "A stand-in for a data set: some truths, by place."

    def __init__(self, dataset: PanopticDataset, truths: list[Segments]):
        self.truths, self.image_ids, self.annotations = truths, dataset.image_ids[: len(truths)], dataset.annotations
        self.categories, self.is_thing = dataset.categories, dataset.is_thing

    def segments(self, index: int) -> Segments:
        return self.truths[index]


def score(truth, found: list[Segments]) -> dict:
    evaluator = PanopticQuality(truth)
    evaluator.update(truth.image_ids, found)
    return evaluator.compute()


def test_the_truth_against_itself_is_exactly_100(shapes: Path):
    dataset = open_panoptic(shapes, None, "train")
    result = score(dataset, [dataset.segments(i) for i in range(len(dataset))])
    for name, count in (("PQ_all", 10), ("PQ_th", 6), ("PQ_st", 4)):
        assert result[name] == {"pq": 100.0, "sq": 100.0, "rq": 100.0, "n": count}
    assert result["images"] == 60 and set(result["per_class_pq"].values()) == {100.0}
    assert list(result["per_class_pq"]) == [*CATEGORIES.values(), *STUFF.values()]


@pytest.mark.parametrize("together", [False, True], ids=["one damage an image", "all at once"])
def test_damaged_copies_are_scored_as_defined(shapes: Path, together: bool):
    dataset, rng = open_panoptic(shapes, None, "train"), np.random.default_rng(0)
    pairs = []
    for index in range(30):  # truths with crowds, and void in every second
        truth = dataset.segments(index)
        found = truth
        for damage in DAMAGES if together else [DAMAGES[index % len(DAMAGES)]]:
            found = damage(found, rng) if len(found.ids) else found
        if index % 2:
            truth = cut_hole(truth, rng)
        pairs.append((truth, found))
    result = score(Truth(dataset, [truth for truth, _ in pairs]), [found for _, found in pairs])
    expected = quality_by_force(pairs, 10)
    for name, own in (("PQ_all", slice(0, 10)), ("PQ_th", slice(0, 6)), ("PQ_st", slice(6, 10))):
        seen = [numbers for numbers in expected[own] if numbers is not None]
        means = [100 * math.fsum(column) / len(seen) for column in zip(*seen)]
        assert result[name] == dict(zip(("pq", "sq", "rq"), means)) | {"n": len(seen)}  # to the last bit
    assert result["PQ_all"]["pq"] < 99
    assert list(result["per_class_pq"].values()) == [100 * e[0] if e else -1.0 for e in expected]


def cut_hole(truth: Segments, rng: np.random.Generator) -> Segments:
    "The truth with a void hole; crowds stay crowds."
    pixels = truth.pixels.numpy().copy()
    pixels[rng.integers(40) :, rng.integers(40) : 60] = 0
    crowd = set(truth.ids[truth.crowd].tolist())
    return from_map(pixels, dict(zip(truth.ids.tolist(), truth.labels.tolist())), crowd)


def bar(*parts: tuple[int, int]) -> np.ndarray:
    "A map of one row from (id, pixels)."
    return np.repeat([i for i, _ in parts], [n for _, n in parts])[None]


RULES = [
    # truth, found: ((id, pixels), ...), labels, crowds; expected: kinds by label as (matched ious, alarms, misses)
    ("an IoU of one half is no match", (((1, 4), (2, 4)), {1: 0, 2: 1}, ()), (((1, 2), (2, 6)), {1: 0, 2: 1}),
     {0: ([], 1, 1), 1: ([4 / 6], 0, 0)}),
    ("void pixels do not count in the union", (((1, 4), (0, 4)), {1: 0}, ()), (((1, 8),), {1: 0}), {0: ([1.0], 0, 0)}),
    ("void of the found is no segment", (((1, 8),), {1: 0}, ()), (((1, 6), (0, 2)), {1: 0}), {0: ([0.75], 0, 0)}),
    ("half in void is a false alarm", (((0, 4), (1, 4)), {1: 0}, ()), (((1, 8),), {1: 1}),
     {0: ([], 0, 1), 1: ([], 1, 0)}),
    ("more than half in void is ignored", (((0, 5), (1, 3)), {1: 0}, ()), (((1, 8),), {1: 1}), {0: ([], 0, 1)}),
    ("inside a crowd of its class is ignored", (((1, 6), (2, 2)), {1: 0, 2: 1}, (1,)), (((1, 6), (2, 2)), {1: 0, 2: 1}),
     {1: ([1.0], 0, 0)}),
    ("inside a crowd of another class is a false alarm", (((1, 8),), {1: 0}, (1,)), (((1, 8),), {1: 1}),
     {1: ([], 1, 0)}),
    ("a crowd not found is not missed", (((1, 8),), {1: 0}, (1,)), (((0, 8),), {}), {}),
    ("void and crowd add up", (((1, 3), (0, 2), (2, 4)), {1: 0, 2: 1}, (1,)), (((1, 9),), {1: 0}), {1: ([], 0, 1)}),
    ("two crowds of a class add up", (((1, 3), (3, 2), (2, 4)), {1: 0, 2: 1, 3: 0}, (1, 3)), (((1, 9),), {1: 0}),
     {1: ([], 0, 1)}),
]


def test_void_and_crowd_rules():
    for name, truth, found, expected in RULES:
        verdicts = judge(1, from_map(bar(*truth[0]), truth[1], set(truth[2])), from_map(bar(*found[0]), found[1]))
        by_label = {}
        for label in np.unique(verdicts.labels).tolist():
            kinds, ious = (column[verdicts.labels == label] for column in (verdicts.kinds, verdicts.ious))
            by_label[label] = (ious[kinds == 0].tolist(), int((kinds == 1).sum()), int((kinds == 2).sum()))
        assert by_label == expected, name


def test_a_class_nobody_saw_is_minus_one(shapes: Path):
    dataset = open_panoptic(shapes, None, "train")
    nothing = Truth(dataset, [from_map(np.zeros((4, 4), dtype=np.int64), {})])
    result = score(nothing, [from_map(np.zeros((4, 4), dtype=np.int64), {})])
    assert result["PQ_all"] == {"pq": -1.0, "sq": -1.0, "rq": -1.0, "n": 0}
    json.dumps(result)  # goes into the log


def test_wrong_results_are_refused(shapes: Path):
    dataset = open_panoptic(shapes, None, "val")
    evaluator, image_ids, truth = PanopticQuality(dataset), dataset.image_ids[:1], dataset.segments(0)
    for results, message in (((image_ids + 10**6, [truth]), "does not list"),
                             ((image_ids, [truth._replace(pixels=truth.pixels[1:])]), "original size")):
        evaluator.update(*results)
        with pytest.raises(UserError, match=message):
            evaluator.compute()
    evaluator.update(image_ids, [truth])
    assert evaluator.compute()["images"] == 1  # and is forgotten


def share_of(process: Process, folder: Path, results: Path, shares: list[list[int]]) -> tuple[dict, str]:
    "Score and write the shifted truth of this process's share; then the error when the last rank fails."
    dataset = open_panoptic(folder, None, "val")
    evaluator, writer = PanopticQuality(dataset), PanopticWriter(results, dataset)
    for index in shares[process.rank]:
        found = shift(dataset.segments(index), np.random.default_rng(index))
        evaluator.update(dataset.image_ids[[index]], [found])
        writer.update(dataset.image_ids[[index]], [found])
    scores = evaluator.compute()
    writer.close()
    if process.rank == process.world_size - 1:
        evaluator.update(torch.tensor([3]), [dataset.segments(0)])
    try:
        evaluator.compute()
    except UserError as error:
        return scores, str(error)
    return scores, "accepted"


def test_two_processes_with_repeated_images_score_as_one(shapes: Path, tmp_path: Path):
    indices = list(range(24))
    dataset = open_panoptic(shapes, None, "val")
    alone = score(dataset, [shift(dataset.segments(i), np.random.default_rng(i)) for i in indices])
    shares = [indices[:15] + [3], indices[10:][::-1]]  # uneven, overlapping, in another order
    for scores, error in spawn(share_of, 2, shapes, tmp_path, shares):
        assert scores == alone and "image 3" in error
    results = tmp_path / "panoptic_predictions.json"
    written = PanopticDataset(shapes / "val2017", results, results.with_suffix(""))
    assert written.image_ids.tolist() == dataset.image_ids.tolist()
    assert score(dataset, [written.segments(i) for i in indices]) == alone


# ---- results, the loop -----------------------------------------------------------------------------------


def test_results_are_read_back(shapes: Path, tmp_path: Path):
    dataset = open_panoptic(shapes, None, "val")
    writer = PanopticWriter(tmp_path, dataset)
    for index, image_id in enumerate(dataset.image_ids):
        truth = dataset.segments(index)
        writer.update(image_id[None], [truth._replace(scores=torch.linspace(0.5, 1, len(truth.ids)))])
    path = writer.close()
    content = json.loads(path.read_text())
    assert content["categories"] == [{k: c[k] for k in ("id", "name", "isthing")} for c in
                                     json.loads(dataset.annotations.read_text())["categories"]]
    official = {a["image_id"]: a for a in json.loads(dataset.annotations.read_text())["annotations"]}
    for entry in content["annotations"]:
        theirs = official[entry["image_id"]]
        assert entry["file_name"] == theirs["file_name"]
        keys = theirs["segments_info"][0]
        assert [{k: part[k] for k in keys} for part in entry["segments_info"]] == theirs["segments_info"]
        ours, same = (np.array(Image.open(folder / entry["file_name"]))
                      for folder in (path.with_suffix(""), dataset.png_folder))
        assert (ours == same).all()
    again = PanopticDataset(dataset.folder, path, path.with_suffix(""))
    assert score(dataset, [again.segments(i) for i in range(len(again))])["PQ_all"]["pq"] == 100.0


def truthful_answer(batch, num_classes: int, queries: int = 16) -> Predictions:
    "What a model would say that knows the truth, with masks at a quarter of the canvas's size."
    canvas, targets, start = batch.images.shape[-2:], batch.targets, 0
    logits = torch.zeros(1, len(batch.images), queries, num_classes + 1)
    logits[..., -1] = 9
    boxes = torch.full((1, len(batch.images), queries, 4), 0.5)
    full = torch.full((len(batch.images), queries, *canvas), -1.0)
    for row, count in enumerate(targets.counts.tolist()):
        own, start = slice(start, start + count), start + count
        logits[0, row, torch.arange(count), targets.labels[own]] = 20
        boxes[0, row, :count], full[row, :count] = targets.boxes[own], 2.0 * targets.masks[own] - 1
    return Predictions(logits, boxes, F.interpolate(full, tuple(-(-side // 4) for side in canvas), mode="area"))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_of_predictions_are_scored_and_written(shapes: Path, tmp_path: Path, batch_size: int):
    transform = laptop_transform(train=False, short_side=96)  # another size than the original
    dataset = open_panoptic(shapes, None, "val", transform=transform)
    evaluator = PanopticEvaluator(dataset, writer=PanopticWriter(tmp_path, dataset))
    for _ in range(2):  # the second round begins anew
        evaluator.reset()
        for batch in make_loader(dataset, batch_size, shuffle=False):
            found = evaluator.detect(truthful_answer(batch, 10), batch.targets)
            evaluator.update(batch.targets.image_ids, found)
        result = evaluator.compute()
        assert result["images"] == 24 and result["PQ_all"]["pq"] > 75 and result["PQ_st"]["pq"] > 90
        assert result["coco_eval_bbox"][0] > 0.99 and result["coco_eval_masks"][1] > 0.95
    written = PanopticDataset(dataset.folder, *(tmp_path / f"panoptic_predictions{end}" for end in (".json", "")))
    again = score(dataset, [written.segments(i) for i in range(24)])
    assert again == {name: result[name] for name in again}
    head, *lines = evaluator.class_tables["panoptic quality"].splitlines()
    assert head.split() == ["class", "segments", "PQ", "SQ", "RQ"]
    quality = {name: pq for name, pq in result["per_class_pq"].items() if pq >= 0}  # -1: not in these images
    assert {line.split()[0]: float(line.split()[2]) for line in lines} == pytest.approx(quality, abs=0.05)


def test_a_model_with_masks_runs_in_the_loop(shapes: Path):
    dataset = open_panoptic(shapes, None, "val", transform=laptop_transform(train=False)).subset(range(6))
    sizes = dict(hidden_dim=64, nheads=8, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=8)
    model, batches = build_segmentation(build_detr(10, "small", **sizes)), make_loader(dataset, 4, shuffle=False)
    result = evaluate(model, batches, PanopticEvaluator(dataset, threshold=0.0), "cpu", MaskCriterion(num_classes=10))
    assert result["images"] == 6 and 0 <= result["PQ_all"]["pq"] < 60  # it has learned nothing
    assert result["loss_mask"] > 0 and len(result["coco_eval_bbox"]) == 12
