"""Ours beside other implementations, on equal work: `make bench` writes nbs/bench.json and nbs/bench.md.

    python benchmarks/bench.py                      # every scenario
    python benchmarks/bench.py --only criterion     # those whose name has this in it
    python benchmarks/bench.py --smoke              # once each, on small problems: does everything run?
    python benchmarks/bench.py --photos DIR         # also the data pipeline, on photographs in COCO's layout ($PHOTOS)
    python benchmarks/bench.py --device cuda        # model and criterion on a GPU, and --bf16 for half precision
    python benchmarks/bench.py --original DIR       # also the released code, a clone of it or its package ($DETR):
                                                    # pip install --no-deps --target DIR detr==0.1.4

Ours and a peer take turns, so that what else the machine does meets both; a ratio is that of two neighbouring runs, and
the table gives the median of the ratios and the middle half of them. Same weights, same images, same targets, the same
parameters learn, float32 unless told otherwise. Both run with the threads that the environment asks for. Where no peer
does the same work, ours stands alone.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import functional as TF
from transformers import DetrConfig, DetrForObjectDetection
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from detr_nb.batching import Batch, Targets, collate, make_loader
from detr_nb.coco import open_coco
from detr_nb.config import PRESETS
from detr_nb.criterion import SetCriterion
from detr_nb.detr import DETR, Predictions
from detr_nb.engine import build_criterion, build_model, build_optimizer, set_rates, train_step
from detr_nb.evaluation import score
from detr_nb.layouts import from_released, from_transformers
from detr_nb.shapes_set import write_shapes
from detr_nb.transforms import output_size, paper_transform, scaled_lengths

PAGE = """# Beside other code

Ours and another implementation in turn, on equal work. Each row is one run of what it names, from end to end: the
losses of a whole batch and their gradients, a training step of a batch (32 images for the embedded model), one image
through the model, a whole set scored, a Python process from its start to its end, 20 photographs read. Times are
medians. A ratio is the peer's time by ours in two neighbouring runs, above 1 where ours is faster (or smaller); here
are the median of the ratios and their middle half. `make bench` writes this page. The original is its authors' package
`detr` 0.1.4 of 2020.

"""
HEADER = "| one run of | ours, ms (or MB) | the peer | the peer's, ms (or MB) | peer's / ours | its middle half |"
Pair = tuple[Callable[[], object], Callable[[], object] | None]  # ours, and the peer's where there is one
# where model and criterion run and where the released code lies, set by the command line
ON = {"device": torch.device("cpu"), "bf16": False, "original": None}


def autocast() -> torch.autocast:
    "Half precision in the model, where it is asked for."
    return torch.autocast(ON["device"].type, torch.bfloat16, enabled=ON["bf16"])


def random_targets(images: int, objects: int, seed: int = 0) -> Targets:
    "As many objects in each image, of COCO's classes."
    generator, total = torch.Generator().manual_seed(seed), images * objects
    boxes = torch.cat([0.2 + 0.6 * torch.rand(total, 2, generator=generator),
                       0.05 + 0.3 * torch.rand(total, 2, generator=generator)], dim=1)
    sizes = torch.tensor([[384, 512]]).repeat(images, 1)
    return Targets(torch.randint(0, 91, (total,), generator=generator), boxes, torch.full((images,), objects),
                   torch.arange(images), sizes, sizes).to(ON["device"])


def as_lists(targets: Targets) -> list[dict]:
    "The same for the peers: a dictionary for each image, with either's name of the labels."
    counts = targets.counts.tolist()
    return [{"class_labels": labels, "labels": labels, "boxes": boxes}
            for labels, boxes in zip(targets.labels.split(counts), targets.boxes.split(counts))]


def released() -> SimpleNamespace:
    "The released code: its criterion and matcher, model, and images with a mask. It wants an old torchvision."
    if str(ON["original"]) not in sys.path:
        sys.path.insert(0, str(ON["original"]))
    with patch("torchvision.__version__", "0.9.0"):
        from models import backbone, detr, matcher, transformer
        from util.misc import NestedTensor
    return SimpleNamespace(backbone=backbone, detr=detr, matcher=matcher, transformer=transformer, images=NestedTensor)


def released_criterion() -> torch.nn.Module:
    "The paper's, of the released code."
    code, weights = released(), {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    weights |= {f"{name}_{layer}": weight for layer in range(5) for name, weight in weights.items()}
    parts = ["labels", "boxes", "cardinality"]
    return code.detr.SetCriterion(91, code.matcher.HungarianMatcher(1, 5, 2), weights, 0.1, parts).to(ON["device"])


def criterion(images: int, objects: int, peer: str) -> Pair:
    "Matching and losses of six layers with a hundred queries, forward and backward."
    generator, targets = torch.Generator().manual_seed(1), random_targets(images, objects)
    logits = torch.randn(6, images, 100, 92, generator=generator).to(ON["device"]).requires_grad_()
    boxes = (0.05 + 0.5 * torch.rand(6, images, 100, 4, generator=generator)).to(ON["device"]).requires_grad_()
    own, lists = SetCriterion(91).to(ON["device"]), as_lists(targets)
    key, other = "auxiliary_outputs", ImageLoss(HungarianMatcher(1, 5, 2), 91, 0.1, ["labels", "boxes", "cardinality"])
    if peer != "transformers":
        key, other = "aux_outputs", released_criterion()
    other = other.to(ON["device"])
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}

    def ours() -> torch.Tensor:
        losses = own(Predictions(logits, boxes), targets)
        own.total(losses).backward()
        return losses["loss_ce"]

    def theirs() -> torch.Tensor:
        layers = [{"logits": layer, "pred_logits": layer, "pred_boxes": box} for layer, box in zip(logits, boxes)]
        losses = other(layers[-1] | {key: layers[:-1]}, lists)
        sum(weights[name.rstrip("_0123456789")] * value for name, value in losses.items()
            if name.rstrip("_0123456789") in weights).backward()
        return losses["loss_ce"]

    torch.testing.assert_close(ours(), theirs())  # the same work
    return ours, theirs


def original_models() -> tuple[DETR, torch.nn.Module]:
    "Ours and the released code's R50 model, with the same random weights."
    torch.manual_seed(0)
    code, args = released(), argparse.Namespace(
        hidden_dim=256, position_embedding="sine", lr_backbone=1e-5, masks=False, backbone="resnet50", dilation=False,
        dropout=0.1, nheads=8, dim_feedforward=2048, enc_layers=6, dec_layers=6, pre_norm=False)
    with patch.object(code.backbone, "is_main_process", lambda: False):  # which alone fetches ImageNet's weights
        parts = code.backbone.build_backbone(args), code.transformer.build_transformer(args)
    theirs = code.detr.DETR(*parts, num_classes=91, num_queries=100, aux_loss=True)
    return from_released({"model": theirs.state_dict()}), theirs


def models(peer: str) -> tuple[DETR, torch.nn.Module]:
    "The paper's R50 model with the same random weights twice; the stem and the first stage do not learn."
    if peer != "transformers":
        ours, theirs = original_models()
        for part, module in ours.backbone.body.named_children():
            module.requires_grad_(part not in ("conv1", "bn1", "layer1"))
        return ours.to(ON["device"]), theirs.to(ON["device"])
    torch.manual_seed(0)
    settings = dict(use_pretrained_backbone=False, backbone_config=None, num_labels=91, auxiliary_loss=True)
    theirs = DetrForObjectDetection(DetrConfig(**settings))
    ours = from_transformers(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        early = "backbone" in name and not any(f"layer{stage}" in name or f"stages.{stage - 1}" in name
                                               for stage in (2, 3, 4))
        parameter.requires_grad_(not early)
    for part, module in ours.backbone.body.named_children():
        module.requires_grad_(part not in ("conv1", "bn1", "layer1"))
    return ours.to(ON["device"]), theirs.to(ON["device"])


def training_step(height: int, width: int, images: int, peer: str) -> Pair:
    "Forward, loss and backward of the R50 model."
    ours, theirs = models(peer)
    generator, targets = torch.Generator().manual_seed(2), random_targets(images, 8)
    pixels = torch.randn(images, 3, height, width, generator=generator).to(ON["device"])
    mask, loss, lists = torch.ones_like(pixels[:, 0]), SetCriterion(91).to(ON["device"]), as_lists(targets)

    def step_of_ours() -> None:
        ours.zero_grad()
        with autocast():
            predictions = ours.train()(pixels, None)
        loss.total(loss(predictions, targets)).backward()

    def step_of_theirs() -> None:
        theirs.zero_grad()
        with autocast():
            found = theirs.train()(pixels, mask, labels=lists)
        found.loss.backward()

    def step_of_original() -> None:
        theirs.zero_grad()
        with autocast():
            found = theirs.train()(released().images(pixels, mask == 0))
        losses = of_original(found, lists)
        sum(of_original.weight_dict[name] * value for name, value in losses.items()
            if name in of_original.weight_dict).backward()

    if peer == "transformers":
        return step_of_ours, step_of_theirs
    of_original = released_criterion()
    return step_of_ours, step_of_original


def embedded_step(images: int) -> Pair:
    "A whole step of the embedded model, its optimizer with it."
    torch.manual_seed(0)
    config, accelerator = PRESETS["shapes"], Accelerator(cpu=ON["device"].type == "cpu")
    model, criterion = build_model(config, 6).train().to(ON["device"]), build_criterion(config, 6).to(ON["device"])
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    set_rates(optimizer, 1e-3)
    targets, pixels = random_targets(images, 4), torch.randn(images, 3, 128, 160, device=ON["device"])
    batches = [Batch(pixels, None, targets._replace(labels=targets.labels % 6))]
    return lambda: train_step(model, criterion, optimizer, accelerator, batches, config), None


def memory(height: int, width: int, images: int, peer: str) -> Pair:
    "The most memory that a process holds which takes two training steps: megabytes, where others give milliseconds."
    def measured(side: int) -> float:
        program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench; "
                   f"bench.ON['original'] = {str(ON['original'])!r}; "
                   f"run = bench.training_step({height}, {width}, {images}, {peer!r})[{side}]; run(); run(); "
                   "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])")
        return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout) / 1024

    return partial(measured, 0), partial(measured, 1)


def start_up(*programs: str) -> Pair:
    "A new Python that does one thing and ends."
    run = partial(subprocess.run, check=True, capture_output=True)
    return (*(partial(run, [sys.executable, "-c", program]) for program in programs), None)[:2]


def inference(height: int, width: int, peer: str) -> Pair:
    "One image through the R50 model."
    ours, theirs = (model.eval() for model in models(peer))
    pixels, mask = torch.randn(1, 3, height, width).to(ON["device"]), torch.ones(1, height, width).to(ON["device"])
    given = (pixels, mask) if peer == "transformers" else (released().images(pixels, mask == 0),)
    pair = [torch.no_grad()(autocast()(run)) for run in (lambda: ours(pixels, None), lambda: theirs(*given))]
    found = pair[1]()["pred_boxes"]
    assert (pair[0]().boxes[-1] - found).abs().max() < (0.1 if ON["bf16"] else 1e-4)  # the same work
    return tuple(pair)


def reading(folder: Path, short_side: int, count: int, train: bool = False, workers: int = 0) -> Pair:
    "Decode, transform and normalise photographs; beside PIL and torchvision, which do what the original does."
    (longest,) = scaled_lengths(short_side / 800, 1333)
    dataset = open_coco(folder, "train" if train else "val", transform=paper_transform(train, short_side / 800))
    dataset = dataset.subset(range(min(count, len(dataset))))
    files = [dataset.folder / dataset.index.images.names.item(row).decode() for row in dataset.rows.tolist()]
    if train:
        loader = make_loader(dataset, batch_size=2, num_workers=workers)
        return lambda: [batch.images.shape for batch in loader], None

    def theirs() -> list[torch.Tensor]:
        found = []
        for file in files:
            image = Image.open(file).convert("RGB")
            image = image.resize(output_size(*image.size, short_side, longest), Image.Resampling.BILINEAR)
            found.append(TF.normalize(TF.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return found

    ours = lambda: [collate([dataset[index]]).images[0] for index in range(len(files))]  # noqa: E731
    for a, b in zip(ours(), theirs()):  # the same work, but for a grey level here and there
        assert a.shape == b.shape and (a - b).abs().mean() < 0.1
    return ours, theirs


def scoring(images: int, folder: Path) -> Pair:
    "COCO's numbers of a hundred detections an image, by `score` with faster-coco-eval and by pycocotools alone."
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

    def ours() -> np.ndarray:
        return np.array(score(truth, rows, ids, "bbox", "faster_coco_eval").stats)

    def theirs() -> np.ndarray:
        with contextlib.redirect_stdout(None):
            evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        return evaluation.stats

    assert np.abs(ours() - theirs()).max() < 1e-12
    return ours, theirs


def scenarios(smoke: bool, folder: Path, photos: Path | None) -> Iterator[tuple[str, str, Callable[[], Pair], int]]:
    "Name, peer, what makes the pair, and how often it runs."
    peers = ["transformers"] + ["the original"] * (ON["original"] is not None)
    for problem, peer in product(((2, 8),) if smoke else ((16, 40), (8, 20), (2, 8)), peers):
        yield "criterion, {} images of {} objects".format(*problem), peer, partial(criterion, *problem, peer), 40
    step, size, count = ((64, 96, 1), (64, 96), 20) if smoke else ((384, 512, 2), (800, 1066), 5000)
    for peer in peers:
        yield "training step, R50, {}x{}, batch {}".format(*step), peer, partial(training_step, *step, peer), 6
    yield "training step, embedded model", "", partial(embedded_step, 2 if smoke else 32), 10
    for peer in peers:
        yield "inference, R50, {}x{}, batch 1".format(*size), peer, partial(inference, *size, peer), 6
    if ON["device"].type != "cpu":
        return
    yield f"scoring {count} images", "pycocotools", partial(scoring, count, folder / f"bench_{count}"), 3
    for peer in peers:
        yield "memory of a training step, R50, MB", peer, partial(memory, *step, peer), 2
    programs = "from detr_nb import DETR", "from transformers import DetrForObjectDetection"
    yield "import of a model's class", "transformers", partial(start_up, *programs), 5
    help_ = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('detr_nb.train', run_name='__main__')"
    yield "`train --help`", "", partial(start_up, help_), 5
    for side in (800, 160) if photos else ():
        yield f"validation images, short side {side}", "PIL, torchvision", partial(reading, photos, side, 20), 3
        for workers in (0, 2):
            yield (f"training images, short side {side}, {workers} workers", "",
                   partial(reading, photos, side, 20, True, workers), 3)


def compare(pair: Pair, repeats: int) -> dict[str, float]:
    "Median milliseconds of both, or of what they return as a number, and the ratio with its middle half."
    sides = [run for run in pair if run]
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):  # the first turn warms up
        for place, run in enumerate(sides):
            began = time.perf_counter()
            found = run()
            if ON["device"].type == "cuda":
                torch.cuda.synchronize()
            if turn or repeats == 0:
                spent = 1000 * (time.perf_counter() - began)
                times[place].append(found if isinstance(found, float) else spent)
    result = {"ours": statistics.median(times[0])}
    if len(sides) == 2:
        ratios = sorted(theirs / ours for ours, theirs in zip(*times))
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        result |= {"theirs": statistics.median(times[1]), "ratio": middle, "low": low, "high": high}
    return result


def main() -> None:
    "Run the scenarios; print the table and write both files."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where a set is drawn for the scoring")
    parser.add_argument("--photos", type=Path, default=os.environ.get("PHOTOS"), help="a data set in COCO's layout")
    parser.add_argument("--original", type=Path, default=os.environ.get("DETR"), help="where the released code lies")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, help="a folder for bench.md and bench.json; left out nothing is written")
    given = parser.parse_args()
    ON.update(device=given.device, bf16=given.bf16, original=given.original)
    warnings.simplefilter("ignore")
    names = ("torch", "torchvision", "transformers", "pycocotools", "faster-coco-eval", "numpy", "scipy")
    machine = {"date": date.today().isoformat(), "processor": platform.processor() or platform.machine(),
               "device": str(given.device), "threads": torch.get_num_threads(), "bf16": given.bf16,
               **{name: version(name) for name in names}}
    lines, found = [HEADER, "| --- " * 6 + "|"], []
    for name, peer, make, repeats in scenarios(given.smoke, given.data, given.photos):
        if given.only in name:
            numbers = compare(make(), 0 if given.smoke else repeats)
            found.append({"scenario": name, "peer": peer, **numbers})
            row = "| {} | {ours:.1f} | {} | {theirs:.1f} | {ratio:.2f} | {low:.2f} to {high:.2f} |"
            lines.append((row if peer else "| {} | {ours:.1f} | {} | | | |").format(name, peer, **numbers))
            print(lines[-1], flush=True)
    lines.append("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "bench.md").write_text(PAGE + "\n".join(lines) + "\n")
        (given.output / "bench.json").write_text(json.dumps({"machine": machine, "scenarios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
