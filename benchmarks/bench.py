"""Ours beside other implementations, on equal work: `make bench` writes nbs/bench.json and nbs/bench.md.

    python benchmarks/bench.py                      # every scenario
    python benchmarks/bench.py --only criterion     # those whose name has this in it
    python benchmarks/bench.py --smoke              # once each, on small problems: does everything run?

Ours and a peer take turns, so that what else the machine does meets both; a ratio is that of two neighbouring runs, and
the table gives the median of the ratios and the middle half of them. Same weights, same images, same targets, the same
parameters learn, float32. Both run with the threads that the environment asks for.
"""
import argparse
import contextlib
import io
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import DetrConfig, DetrForObjectDetection
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from detr_nb.batching import Targets
from detr_nb.coco import open_coco
from detr_nb.criterion import SetCriterion
from detr_nb.detr import DETR, Predictions
from detr_nb.evaluation import score
from detr_nb.layouts import from_transformers
from detr_nb.shapes_set import write_shapes

Pair = tuple[Callable[[], object], Callable[[], object]]  # ours, and the peer's


def random_targets(images: int, objects: int, seed: int = 0) -> Targets:
    "As many objects in each image, of COCO's classes."
    generator, total = torch.Generator().manual_seed(seed), images * objects
    boxes = torch.cat([0.2 + 0.6 * torch.rand(total, 2, generator=generator),
                       0.05 + 0.3 * torch.rand(total, 2, generator=generator)], dim=1)
    sizes = torch.tensor([[384, 512]]).repeat(images, 1)
    return Targets(torch.randint(0, 91, (total,), generator=generator), boxes, torch.full((images,), objects),
                   torch.arange(images), sizes, sizes)


def as_lists(targets: Targets) -> list[dict]:
    "The same for transformers: a dictionary for each image."
    counts = targets.counts.tolist()
    return [{"class_labels": labels, "boxes": boxes}
            for labels, boxes in zip(targets.labels.split(counts), targets.boxes.split(counts))]


def criterion(images: int, objects: int) -> Pair:
    "Matching and losses of six layers with a hundred queries, forward and backward."
    generator, targets = torch.Generator().manual_seed(1), random_targets(images, objects)
    logits = torch.randn(6, images, 100, 92, generator=generator).requires_grad_()
    boxes = (0.05 + 0.5 * torch.rand(6, images, 100, 4, generator=generator)).requires_grad_()
    own, lists = SetCriterion(91), as_lists(targets)
    names = ["labels", "boxes", "cardinality"]
    other = ImageLoss(HungarianMatcher(1, 5, 2), num_classes=91, eos_coef=0.1, losses=names)
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}

    def ours() -> torch.Tensor:
        losses = own(Predictions(logits, boxes), targets)
        own.total(losses).backward()
        return losses["loss_ce"]

    def theirs() -> torch.Tensor:
        outputs = {"logits": logits[-1], "pred_boxes": boxes[-1], "auxiliary_outputs": [
            {"logits": layer, "pred_boxes": box} for layer, box in zip(logits[:-1], boxes[:-1])]}
        losses = other(outputs, lists)
        sum(weights[name.rstrip("_0123456789")] * value for name, value in losses.items()
            if name.rstrip("_0123456789") in weights).backward()
        return losses["loss_ce"]

    torch.testing.assert_close(ours(), theirs())  # the same work
    return ours, theirs


def models() -> tuple[DETR, DetrForObjectDetection]:
    "The paper's R50 model with the same random weights twice; the stem and the first stage do not learn."
    torch.manual_seed(0)
    theirs = DetrForObjectDetection(DetrConfig(use_pretrained_backbone=False, backbone_config=None, num_labels=91,
                                               auxiliary_loss=True))
    ours = from_transformers(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        early = "backbone" in name and not any(f"layer{stage}" in name or f"stages.{stage - 1}" in name
                                               for stage in (2, 3, 4))
        parameter.requires_grad_(not early)
    for part, module in ours.backbone.body.named_children():
        module.requires_grad_(part not in ("conv1", "bn1", "layer1"))
    return ours, theirs


def training_step(height: int, width: int, images: int) -> Pair:
    "Forward, loss and backward of the R50 model."
    ours, theirs = models()
    generator, targets = torch.Generator().manual_seed(2), random_targets(images, 8)
    pixels, mask = torch.randn(images, 3, height, width, generator=generator), torch.ones(images, height, width)
    loss, lists = SetCriterion(91), as_lists(targets)

    def step_of_ours() -> None:
        ours.zero_grad()
        loss.total(loss(ours.train()(pixels, None), targets)).backward()

    def step_of_theirs() -> None:
        theirs.zero_grad()
        theirs.train()(pixels, mask, labels=lists).loss.backward()

    return step_of_ours, step_of_theirs


def inference(height: int, width: int) -> Pair:
    "One image through the R50 model."
    ours, theirs = (model.eval() for model in models())
    pixels, mask = torch.randn(1, 3, height, width), torch.ones(1, height, width)
    with torch.no_grad():
        assert (ours(pixels, None).boxes[-1] - theirs(pixels, mask).pred_boxes).abs().max() < 1e-4  # the same work
    return torch.no_grad()(lambda: ours(pixels, None)), torch.no_grad()(lambda: theirs(pixels, mask))


def scoring(images: int, folder: Path) -> Pair:
    "COCO's numbers of a hundred detections an image, by faster-coco-eval and by pycocotools."
    with contextlib.redirect_stderr(io.StringIO()):
        root = folder if (folder / "shapes.json").exists() else write_shapes(folder, num_train=1, num_val=images)
    dataset, rng, rows = open_coco(root, "val"), np.random.default_rng(0), []
    truth = dataset.coco_api()
    for image in truth.getImgIds():
        boxes = np.concatenate([rng.uniform(0, 80, (100, 2)), rng.uniform(5, 50, (100, 2))], axis=1)
        known = np.array([annotation["bbox"] for annotation in truth.imgToAnns[image]]).reshape(-1, 4)
        boxes[: len(known)] = known + rng.normal(0, 2, known.shape)
        kinds = rng.choice(dataset.categories.ids, 100)
        rows.append(np.column_stack([np.full(100, image), boxes, rng.uniform(0, 1, 100), kinds]))
    rows, ids = np.concatenate(rows), np.array(truth.getImgIds())

    def by(library: str) -> Callable[[], np.ndarray]:
        return lambda: np.array(score(truth, rows, ids, "bbox", library).stats)

    assert np.abs(by("faster_coco_eval")() - by("pycocotools")()).max() < 1e-12
    return by("faster_coco_eval"), by("pycocotools")


def scenarios(smoke: bool, folder: Path) -> Iterator[tuple[str, str, Callable[[], Pair], int]]:
    "Name, peer, what makes the pair, and how often it runs."
    for problem in ((2, 8),) if smoke else ((16, 40), (8, 20), (2, 8)):
        yield "criterion, {} images of {} objects".format(*problem), "transformers", partial(criterion, *problem), 40
    step, size, count = ((64, 96, 1), (64, 96), 20) if smoke else ((384, 512, 2), (800, 1066), 5000)
    yield "training step, R50, {}x{}, batch {}".format(*step), "transformers", partial(training_step, *step), 6
    yield "inference, R50, {}x{}, batch 1".format(*size), "transformers", partial(inference, *size), 6
    yield f"scoring {count} images", "pycocotools", partial(scoring, count, folder / f"bench_{count}"), 3


def compare(pair: Pair, repeats: int) -> dict[str, float]:
    "Median milliseconds of both, and the ratio with its middle half."
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 1):  # the first turn warms up
        for place, run in enumerate(pair):
            began = time.perf_counter()
            run()
            if turn or repeats == 0:
                times[place].append(1000 * (time.perf_counter() - began))
    ratios = sorted(theirs / ours for ours, theirs in zip(*times))
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"ours_ms": statistics.median(times[0]), "theirs_ms": statistics.median(times[1]), "ratio": middle,
            "low": low, "high": high}


def main() -> None:
    "Run the scenarios; print the table and write both files."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where a set is drawn for the scoring")
    parser.add_argument("--output", type=Path, help="a folder for bench.md and bench.json; left out nothing is written")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    names = ("torch", "torchvision", "transformers", "pycocotools", "faster-coco-eval", "numpy", "scipy")
    machine = {"date": date.today().isoformat(), "processor": platform.processor() or platform.machine(),
               "threads": torch.get_num_threads(), "device": "cpu", **{name: version(name) for name in names}}
    lines = ["| scenario | ours, ms | peer | its ms | ratio | middle half |", "| --- | --- | --- | --- | --- | --- |"]
    found = []
    for name, peer, make, repeats in scenarios(given.smoke, given.data):
        if given.only in name:
            numbers = compare(make(), 0 if given.smoke else repeats)
            found.append({"scenario": name, "peer": peer, **numbers})
            lines.append("| {} | {ours_ms:.1f} | {} | {theirs_ms:.1f} | {ratio:.2f} | {low:.2f} to {high:.2f} |".format(
                name, peer, **numbers))
            print(lines[-1], flush=True)
    lines.append("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if given.output:
        (given.output / "bench.md").write_text("\n".join(lines) + "\n")
        (given.output / "bench.json").write_text(json.dumps({"machine": machine, "scenarios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
