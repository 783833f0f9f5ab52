"""The evaluator in several processes, and against pycocotools fed in its usual way."""
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from book_demos import spawn
from ledger import PYCOCOTOOLS, Ledger
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_nb.batching import Batch, Targets, make_loader
from detr_nb.coco import CocoDataset
from detr_nb.criterion import SetCriterion
from detr_nb.detr import Predictions
from detr_nb.distributed import Process, UserError
from detr_nb.evaluation import CocoEvaluator, Detections, evaluate, postprocess, score

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2

CATEGORY_IDS = (3, 5, 90)
NUM_IMAGES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Eleven images of 40 x 60 pixels with 0 to 5 objects each, some of them crowds, ids with gaps and beyond float32."
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(NUM_IMAGES):
        image_id = 2**31 + 7 * number
        Image.new("RGB", (60, 40)).save(root / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "height": 40, "width": 60})
        for _ in range(number % 6):
            x, y = rng.uniform(0, 25, 2)
            w, h = rng.uniform(5, 35), rng.uniform(5, 15)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "bbox": [x, y, w, h], "area": w * h,
                                "category_id": int(rng.choice(CATEGORY_IDS)), "iscrowd": int(rng.random() < 0.2)})
    categories = [{"id": k, "name": f"class {k}"} for k in CATEGORY_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def load(folder: Path) -> CocoDataset:
    return CocoDataset(folder, folder / "annotations.json")


def make_detections(dataset: CocoDataset, index: int, count: int = 40) -> Detections:
    "Random detections of one image, many of them near its objects; the same whoever asks."
    rng, sample = torch.Generator().manual_seed(index), dataset[index]
    low = torch.rand(count, 2, generator=rng) * torch.tensor([30.0, 20])
    boxes = torch.cat([low, low + 3 + 20 * torch.rand(count, 2, generator=rng)], dim=-1)
    labels = torch.randint(3, (count,), generator=rng)
    near = min(len(sample.boxes), count)
    boxes[:near] = sample.boxes[:near] + torch.randn(near, 4, generator=rng)
    labels[:near] = sample.labels[:near]
    return Detections(torch.rand(1, count, generator=rng), labels[None], boxes[None])


def run_on(dataset: CocoDataset, indices, count: int = 40) -> dict:
    evaluator = CocoEvaluator(dataset)
    for index in indices:
        evaluator.update(dataset.image_ids[[index]], make_detections(dataset, index, count))
    return evaluator.compute()


def strange_image_on_one(process: Process, dataset: CocoDataset) -> str:
    "The error on every process when the last one saw an image that is not in the annotations."
    evaluator = CocoEvaluator(dataset)
    image_id = 12345 if process.rank == 1 else int(dataset.image_ids[0])
    evaluator.update(torch.tensor([image_id]), make_detections(dataset, 0))
    try:
        evaluator.compute()
    except UserError as error:
        return str(error)
    return "accepted"


def in_several_ways(process: Process, folder: Path) -> dict:
    "All that two processes are asked to do here, in one start."
    dataset, first = load(folder), process.rank == 0
    return {
        "unequal shares": run_on(dataset, range(0, 4) if first else range(4, NUM_IMAGES)),
        "images seen twice": run_on(dataset, range(0, 4) if first else range(2, NUM_IMAGES)),
        "nothing on rank 0": run_on(dataset, [] if first else range(NUM_IMAGES)),
        "error": strange_image_on_one(process, dataset),
        "loop": run_loop(process, folder, batch_size=2),
    }


@pytest.fixture(scope="module")
def by_two(folder: Path) -> list[dict]:
    return spawn(in_several_ways, 2, folder)


@pytest.fixture(scope="module")
def by_three(folder: Path) -> list[dict]:
    return spawn(run_loop, 3, folder, 2)


def test_two_processes_give_the_numbers_of_one(folder: Path, by_two: list[dict], capsys) -> None:
    "To the last bit, since the detections are the same; and pycocotools' prints are not heard."
    alone = run_on(load(folder), range(NUM_IMAGES))
    assert capsys.readouterr() == ("", "")
    assert 0 < alone["coco_eval_bbox"][0] < 1 and alone["images"] == NUM_IMAGES
    for case in ("unequal shares", "images seen twice", "nothing on rank 0"):
        assert by_two[0][case] == by_two[1][case] == alone, case


def test_an_error_while_scoring_reaches_every_process(by_two: list[dict]) -> None:
    assert by_two[0]["error"] == by_two[1]["error"] and "12345" in by_two[0]["error"]


@pytest.mark.parametrize("count", [0, 1, 40, 350])
def test_equal_to_pycocotools_fed_with_dictionaries(folder: Path, count: int, ledger: Ledger) -> None:
    "350 detections of 3 classes: more than 100 for one class of an image. Crowds and images without objects are there."
    dataset = load(folder)
    found = [make_detections(dataset, index, count) for index in range(NUM_IMAGES)]
    ours = run_on(dataset, range(NUM_IMAGES), count)["coco_eval_bbox"]
    if count:
        compare_with_pycocotools(ours, found, folder, dataset, ledger)
    else:  # pycocotools cannot read an empty list
        assert ours[:3] == [0.0] * 3 and ours[6:9] == [0.0] * 3


def compare_with_pycocotools(
    ours: list[float], found: list[Detections], folder: Path, dataset: CocoDataset, ledger: Ledger
) -> None:
    "The 12 numbers of its own summary, from its own reading of a list of dictionaries."
    results = []
    for image_id, detections in zip(dataset.image_ids.tolist(), found):
        for value, label, (x1, y1, x2, y2) in zip(*(tensor[0].tolist() for tensor in detections)):
            results.append({"image_id": image_id, "category_id": CATEGORY_IDS[label], "score": value,
                            "bbox": [x1, y1, x2 - x1, y2 - y1]})
    with redirect_stdout(io.StringIO()):
        truth = COCO(folder / "annotations.json")
        reference = COCOeval(truth, truth.loadRes(results), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    theirs = torch.from_numpy(reference.stats)
    ledger.compare("COCO metrics", theirs.new_tensor(ours), theirs, PYCOCOTOOLS)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_faster_coco_eval_gives_the_twelve_numbers_of_pycocotools(
    folder: Path, seed: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    "And the arrays that tables and thresholds are read from, in silence; with outlines, each box is its own mask."
    caplog.set_level("DEBUG")
    pytest.importorskip("faster_coco_eval")
    rng, dataset = np.random.default_rng(seed), load(folder)
    with redirect_stdout(io.StringIO()):
        truth = COCO(folder / "annotations.json")
    for annotation in truth.dataset["annotations"]:
        annotation["segmentation"] = outline(annotation["bbox"])
    results = []
    for annotation in truth.dataset["annotations"] * 3:
        box = (np.array(annotation["bbox"]) + rng.normal(0, 2, 4)).clip(0.5, 60).tolist()
        results.append({"image_id": annotation["image_id"], "category_id": int(rng.choice(CATEGORY_IDS)), "bbox": box,
                        "score": round(float(rng.random()), 1)})  # many are equally sure
        if kind == "segm":
            code = run_length.frPyObjects(outline(results[-1].pop("bbox")), 40, 60)[0]
            results[-1]["segmentation"] = code | {"counts": code["counts"].decode()}
    one, other, chosen = (score(truth, [*map(dict, results)], dataset.image_ids.numpy(), kind, library)
                          for library in ("pycocotools", "faster_coco_eval", "auto"))
    assert not caplog.records
    assert 0 < one.stats[0] < 1 and type(other) is type(chosen) is not type(one)
    assert other.stats[:12].tolist() == pytest.approx(one.stats.tolist(), abs=1e-12)
    for name in ("precision", "recall", "scores"):
        assert np.abs(other.eval[name] - one.eval[name]).max() < 1e-12, name


def outline(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def truth_as_detections(dataset: CocoDataset, index: int) -> Detections:
    sample = dataset[index]
    return Detections(torch.ones(1, len(sample.labels)), sample.labels[None], sample.boxes[None])


def test_ground_truth_against_itself_is_perfect(folder: Path, ledger: Ledger) -> None:
    dataset = load(folder)
    evaluator = CocoEvaluator(dataset)
    found = [truth_as_detections(dataset, index) for index in range(NUM_IMAGES)]
    for index, detections in enumerate(found):
        evaluator.update(dataset.image_ids[[index]], detections)
    result = evaluator.compute()
    compare_with_pycocotools(result["coco_eval_bbox"], found, folder, dataset, ledger)
    assert result["coco_eval_bbox"][:3] == pytest.approx([1.0] * 3, abs=1e-12)
    assert list(result["per_class_ap"]) == [f"class {k}" for k in CATEGORY_IDS]
    assert list(result["per_class_ap"].values()) == pytest.approx([1.0] * 3, abs=1e-12)


def test_a_subset_is_scored_on_its_images_only_and_an_unfinished_evaluation_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load(folder)
    part = dataset.subset([5, 3])
    alone = run_on(part, [0, 1])
    assert not caplog.records and alone["images"] == 2
    evaluator = CocoEvaluator(dataset)
    for index in (0, 1):
        evaluator.update(part.image_ids[[index]], make_detections(part, index))
    assert evaluator.compute()["coco_eval_bbox"] == alone["coco_eval_bbox"]
    assert "2 of the 11 images" in caplog.text


def test_half_precision_outputs_are_scored_in_float32() -> None:
    logits, boxes = torch.randn(2, 5, 4), torch.rand(2, 5, 4)
    found = postprocess(logits.bfloat16(), boxes.bfloat16(), torch.tensor([[480, 640], [333, 500]]))
    assert found.scores.dtype == found.boxes.dtype == torch.float32


class Guess(torch.nn.Module):
    "Predictions that depend on the images, so that a process's share of them matters; no training needed."

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free = torch.nn.Dropout(), torch.nn.Dropout()

    def forward(self, images: torch.Tensor, padding: torch.Tensor | None = None) -> Predictions:
        assert not torch.is_grad_enabled() and not self.free.training
        logits, boxes = zip(*(self.look(image) for image in images))
        return Predictions(torch.stack(logits, dim=1), torch.stack(boxes, dim=1).sigmoid())

    def look(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(int(image[0, 0, 0] * 1000))
        return torch.randn(2, 6, 4, generator=rng), torch.randn(2, 6, 4, generator=rng)


def color_by_number(sample, rng):
    "Every image in a colour of its own."
    return sample._replace(image=torch.full_like(sample.image, sample.image_id % 251))


def run_loop(process: Process | None, folder: Path, batch_size: int) -> dict:
    rank, world_size = (process.rank, process.world_size) if process else (0, 1)
    dataset = CocoDataset(folder, folder / "annotations.json", transform=color_by_number)
    loader = make_loader(dataset, batch_size, rank, world_size, shuffle=False)
    model = Guess().train()
    model.frozen.eval()
    result = evaluate(model, loader, CocoEvaluator(dataset), "cpu", SetCriterion(num_classes=3))
    assert model.training and model.free.training and not model.frozen.training
    return result


def test_the_loop_gives_the_same_scores_and_losses_for_any_batches_and_processes(
    folder: Path, by_two: list[dict], by_three: list[dict]
) -> None:
    "With batches of 2, two processes have different numbers of batches."
    whole = run_loop(None, folder, NUM_IMAGES)
    names = {"loss_ce", "loss_bbox_0", "class_error", "cardinality_error"}  # as the released code calls them
    assert {"loss", *(names - {"cardinality_error"}), *(f"{name}_unscaled" for name in names)} <= whole.keys()
    assert whole["loss_bbox_0"] == pytest.approx(5 * whole["loss_bbox_0_unscaled"]), "weighted, as in training"
    assert by_two[0]["loop"] == by_two[1]["loop"] and by_three[0] == by_three[1] == by_three[2]
    for other in (run_loop(None, folder, 3), by_two[0]["loop"], by_three[0]):
        assert other["coco_eval_bbox"] == pytest.approx(whole["coco_eval_bbox"], abs=1e-3)
        assert other["images"] == NUM_IMAGES
        for name in whole:
            if "loss" in name or "error" in name:
                assert other[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_the_mode_comes_back_when_the_model_fails(folder: Path) -> None:
    class Fails(torch.nn.Linear):
        def forward(self, images, padding):
            raise RuntimeError("as told")

    no_objects = torch.zeros(1, dtype=torch.int64)
    targets = Targets(no_objects[:0], torch.zeros(0, 4), no_objects, no_objects, torch.ones(1, 2), torch.ones(1, 2))
    model = Fails(1, 1)
    with pytest.raises(RuntimeError, match="as told"):
        evaluate(model, [Batch(torch.zeros(1, 3, 8, 8), None, targets)], CocoEvaluator(load(folder)), "cpu")
    assert model.training


def test_the_file_for_the_server_gives_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder)
    evaluator, path = CocoEvaluator(dataset), tmp_path / "detections_val_ours_results.json"
    evaluator.compute()
    evaluator.write_detections(path)
    assert json.loads(path.read_text()) == []  # without detections
    for index in range(NUM_IMAGES):
        evaluator.update(dataset.image_ids[[index]], make_detections(dataset, index))
    numbers = evaluator.compute()["coco_eval_bbox"]
    evaluator.write_detections(path)
    results = json.loads(path.read_text())
    assert len(results) == 40 * NUM_IMAGES and {result["category_id"] for result in results} == set(CATEGORY_IDS)
    assert results[-1]["image_id"] == 2**31 + 7 * (NUM_IMAGES - 1), "ids beyond float32"
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score"}
    with redirect_stdout(io.StringIO()):
        truth = COCO(folder / "annotations.json")
    again = score(truth, results, dataset.image_ids.numpy())
    assert again.stats.tolist() == pytest.approx(numbers, abs=1e-3), "boxes are rounded to a hundredth of a pixel"


def test_the_table_of_classes_agrees_with_the_numbers(folder: Path) -> None:
    dataset = load(folder)
    evaluator = CocoEvaluator(dataset)
    for index in range(NUM_IMAGES):
        evaluator.update(dataset.image_ids[[index]], make_detections(dataset, index))
    result = evaluator.compute()
    head, *lines, total = (line.split() for line in evaluator.class_tables["bbox"].splitlines())
    assert head == ["class", "objects", "AP", "AP50", "AP75", "AR100"]
    assert {" ".join(line[:2]): float(line[3]) for line in lines} == pytest.approx(result["per_class_ap"], abs=5e-4)
    numbers = result["coco_eval_bbox"]
    assert [float(word) for word in total[3:]] == pytest.approx([*numbers[:3], numbers[8]], abs=5e-4)
    assert int(total[2]) == sum(int(line[2]) for line in lines) == int(dataset.object_counts.sum())


def test_classes_without_objects_have_no_line(folder: Path) -> None:
    dataset = load(folder)
    part = dataset.subset([1])  # one object of one class
    evaluator = CocoEvaluator(part)
    evaluator.update(part.image_ids, truth_as_detections(part, 0))
    evaluator.compute()
    head, *lines = evaluator.class_tables["bbox"].splitlines()
    assert len(lines) == 3 and "-" not in lines[0] and lines[2] == "(2 more without objects here)"


def test_objects_that_are_answered_twice_are_counted_and_mistakes_named(folder: Path) -> None:
    "The truth, and a second answer of another class on every object of one image: as many mistakes."
    dataset = load(folder)
    evaluator, doubled = CocoEvaluator(dataset), 5
    for index in range(NUM_IMAGES):
        scores, labels, boxes = truth_as_detections(dataset, index)
        if index == doubled:
            scores = torch.cat([scores, 0.6 * scores], dim=1)
            labels, boxes = torch.cat([labels, (labels + 1) % 3], dim=1), torch.cat([boxes, boxes], dim=1)
        evaluator.update(dataset.image_ids[[index]], Detections(scores, labels, boxes))
    result, counts = evaluator.compute(), dataset.object_counts
    judged = evaluator.judgement
    assert result["duplicates"] == judged.duplicates == int(counts[doubled]) / int(counts.sum())
    assert judged.confusion[:3, :3].tolist() == np.diag(dataset.class_counts).tolist()
    wrong = {image: count for image, count in judged.mistakes.items() if count}
    assert wrong == {int(dataset.image_ids[doubled]): int(counts[doubled])} and judged.confusion[3].sum() == 5
    thresholds = {name: row["threshold"] for name, row in evaluator.thresholds.items()}
    assert thresholds == {f"class {k}": 1 for k in CATEGORY_IDS}


def test_an_unsure_answer_is_no_duplicate_and_no_mistake(folder: Path) -> None:
    dataset = load(folder)
    evaluator = CocoEvaluator(dataset)
    for index in range(NUM_IMAGES):
        scores, labels, boxes = truth_as_detections(dataset, index)
        twice = [torch.cat(pair, dim=1) for pair in ((scores, 0.5 * scores), (labels, labels), (boxes, boxes))]
        evaluator.update(dataset.image_ids[[index]], Detections(*twice))
    assert evaluator.compute()["duplicates"] == 0 and not any(evaluator.judgement.mistakes.values())
