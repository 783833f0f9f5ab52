"What breaks in other people's trainers, each with a test that it cannot break here; the names are the complaints."
import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from book_demos import spawn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from detr_nb import engine, train
from detr_nb.batching import Batch, collate
from detr_nb.coco import Sample
from detr_nb.config import PRESETS, Config
from detr_nb.distributed import Process
from detr_nb.engine import build_criterion, build_model, build_optimizer
from detr_nb.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore::detr_nb.annotations.DataWarning")
IDS = {7: "cell", 42: "platelet"}
PICTURES = [(60, 80), (80, 60), (64, 64), (40, 120), (64, 64), (90, 60)]  # (height, width); object counts are 0 to 5
QUIET = ["--device", "cpu", "--num_workers", "0", "--report_to", "none", "--num_threads", "1", "--log_every", "1"]
TINY = ["--backbone", "small", "--backbone_norm", "group", "--no_pretrained", "--enc_layers", "1", "--dec_layers", "2",
        "--hidden_dim", "32", "--dim_feedforward", "32", "--nheads", "4", "--num_queries", "12", "--temperature", "20",
        "--image_size", "64", "--epochs", "2", "--batch_size", "2"]  # fmt: skip


def write_set(folder: Path) -> Path:
    "A small set in COCO's layout with masks, of pictures of several shapes; returns its folder."
    rng = np.random.default_rng(0)
    categories = [{"id": key, "name": name} for key, name in IDS.items()]
    for split in ("train", "val"):
        content = {"images": [], "annotations": [], "categories": categories}
        (folder / f"{split}2017").mkdir(parents=True)
        for number, (height, width) in enumerate(PICTURES, start=1):
            pixels = np.full((height, width, 3), 220, dtype=np.uint8)
            for _ in range(number - 1):
                (x, y), (w, h) = rng.integers(0, 30, 2).tolist(), rng.integers(8, 20, 2).tolist()
                key = int(rng.choice(list(IDS)))
                w, h = min(w, width - x), min(h, height - y)
                pixels[y : y + h, x : x + w] = 4 * key
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": key, "iscrowd": 0,
                    "bbox": [x, y, w, h], "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
            name = f"{number:012d}.png"
            Image.fromarray(pixels).save(folder / f"{split}2017" / name)
            content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        path = folder / f"annotations/instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def go(pictures, tmp_path, caplog) -> Callable[..., str]:
    "Trains on the pictures into a folder of that name; returns what was logged, and the message it ended with."

    def go(name: str, *flags: object, fails: bool = False) -> str:
        caplog.clear()
        words = ["--coco_path", pictures, "--output_dir", tmp_path / name, *TINY, *QUIET, *flags]
        with caplog.at_level("INFO", "detr_nb"):
            if not fails:
                train.main(list(map(str, words)))
                return caplog.text
            with pytest.raises(SystemExit) as end:
                train.main(list(map(str, words)))
        return f"{caplog.text}{end.value.code}"

    return go


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


# ---- "It ran for two days and then CUDA was out of memory"


def prepared(go: Callable, monkeypatch: pytest.MonkeyPatch, *flags: object) -> Run:
    "A run that is ready for its first step."
    found = []

    def stop_here(run: Run) -> None:
        found.append(run)
        raise SystemExit(3)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_rehearse", stop_here)
        go("prepared", *flags, fails=True)
    found[0].lock.release(force=True)
    return found[0]


@pytest.mark.parametrize("flags", [
    [], ["--batch_size", 1], ["--masks", "--batch_size", 3], ["--image_size", 40, "--group_by_shape"],
    ["--overfit", 4], ["--limit_train", 3]], ids=lambda flags: " ".join(map(str, flags)) or "as it is")
def test_no_batch_is_larger_than_the_one_of_the_first_step(flags, go, monkeypatch):
    "Nor much smaller, in many epochs of crops and sizes at random."
    run = prepared(go, monkeypatch, *flags)
    worst = train._largest_batch(run)
    sides, most, pixels = [0, 0], 0, 0
    for epoch in range(60):
        run.train_loader.batch_sampler.set_epoch(epoch, 0)
        for batch in run.train_loader:
            sides = [max(pair) for pair in zip(sides, batch.images.shape[2:])]
            most, pixels = max(most, int(batch.targets.counts.max())), max(pixels, batch.images.numel())
            assert (batch.targets.masks is None) == (worst.targets.masks is None)
    assert len(worst.images) == run.config.optimizer.batch_size and int(worst.targets.counts.min()) == most
    assert 0.65 * worst.images.numel() < pixels <= worst.images.numel()
    if len(worst.images) > 1:
        assert all(0.8 * limit < side <= limit for side, limit in zip(sides, worst.images.shape[2:]))


def test_memory_runs_out_at_the_first_step_or_never_and_the_peak_is_said(go, tmp_path, monkeypatch):
    "On a device that holds so many pixels at a time; from too few for any step to just enough."
    step, ended = engine.batch_losses, []
    for room in (10_000, 40_000, 50_000, 60_000, 64_151, 64_152):
        def on_the_device(model, criterion, accelerator, batch, *rest, room=room):
            if batch.images.numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(model, criterion, accelerator, batch, *rest)

        monkeypatch.setattr(train, "batch_losses", on_the_device)
        monkeypatch.setattr(engine, "batch_losses", on_the_device)
        folder, enough = tmp_path / str(room), room == 64_152
        said = go(str(room), fails=not enough)
        ended.append((folder / "log.txt").exists())
        largest = "the largest step, 2 images of 99 x 108 pixels with 5 objects each"
        if enough:
            assert re.search(rf"{largest}: \d+\.\d GB of memory", said) and len(losses_of(folder)) == 6
        else:
            assert f"{largest}, does not fit into the memory of cpu: lower --batch_size" in said
            assert not (folder / "steps.jsonl").exists() and not list(folder.glob("*.pth"))
    assert ended == [False] * 5 + [True]


def test_the_first_step_leaves_no_trace_in_the_run(go, tmp_path, monkeypatch):
    "Neither in weights and moments, nor in batch norms' means, nor in the dice of dropout and crops."
    flags = ["--backbone", "resnet18", "--backbone_norm", "batch", "--dropout", 0.2, "--ema", 0.9, "--masks"]
    go("with", *flags)
    monkeypatch.setattr(train, "_rehearse", lambda run: None)
    go("without", *flags)
    first, second = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("with", "without"))
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    for key in ("model", "ema"):
        assert all(torch.equal(tensor, second[key][name]) for name, tensor in first[key].items())
    assert any(name.endswith("running_mean") for name in first["model"])


# ---- "Expected to have finished reduction in the prior iteration: unused parameters"

SMALLEST = PRESETS["paper"].but(enc_layers=1, dec_layers=2, hidden_dim=32, nheads=4, dim_feedforward=16, num_queries=5,
                                pretrained=False, backbone="small", backbone_norm="group")  # fmt: skip
BACKBONES = {
    "small": dict(backbone="small", backbone_norm="group"),
    "resnet18": dict(backbone="resnet18", backbone_norm="frozen"),
    "resnet18-batch": dict(backbone="resnet18", backbone_norm="batch"),
    "timm-lite0": dict(backbone="timm/tf_efficientnet_lite0", backbone_norm="frozen"),
    "timm-hrnet": dict(backbone="timm/hrnet_w18_small", backbone_norm="batch"),  # its last map needs not all of it
}
MASKS = {"boxes": {}, "masks": dict(masks=True), "frozen": dict(masks=True, frozen_weights="boxes.pth")}
FLAGS = dict(aux_loss=(True, False), pre_norm=(True, False), position_embedding=("sine", "learned"),
             dec_layers=(1, 2), enc_layers=(0, 1), lr_backbone=(1e-5, 0), optimizer=("adamw", "muon"),
             dilation=(False, True))  # fmt: skip


def combinations(backbone: str) -> list[dict]:
    "Every combination of the flags that this backbone has."
    flags = FLAGS if backbone in ("resnet18", "resnet18-batch", "timm-lite0") else FLAGS | dict(dilation=(False,))
    return [dict(zip(flags, values)) for values in itertools.product(*flags.values())]


def some_batch(counts: Sequence[int], masks: bool) -> Batch:
    "Images of different heights with as many objects."
    samples = []
    for place, count in enumerate(counts):
        size = (32 - 8 * place, 32)
        boxes = torch.tensor([[4.0, 4, 16, 16]]).repeat(count, 1) + torch.arange(count)[:, None]
        painted = torch.ones(count, *size, dtype=torch.bool) if masks else None
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        samples.append(Sample(image, torch.zeros(count, dtype=torch.int64), boxes, place, size, painted))
    return collate(samples)


def loss_of(model: torch.nn.Module, bare: torch.nn.Module, config: Config, counts: Sequence[int]) -> torch.Tensor:
    "The loss of a batch, as the trainer takes it."
    accelerator = SimpleNamespace(unwrap_model=lambda model: bare, autocast=nullcontext)
    batch, criterion = some_batch(counts, config.model.masks), build_criterion(config, 2)
    return engine.batch_losses(model, criterion, accelerator, batch, None, config.loss.aux_loss)["loss"]


def without_gradient(config: Config) -> list[str]:
    "What is to learn and gets no gradient, or is to learn and is in no group of the optimizer; with objects or none."
    torch.manual_seed(0)
    model, found = build_model(config, 2).train(), []
    groups = build_optimizer(model, config).param_groups
    learns = {id(parameter) for group in groups for parameter in group["params"]}
    assert learns
    for counts in ([2, 1], [0, 0]):
        model.zero_grad()
        loss_of(model, model, config, counts).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (id(parameter) in learns) or parameter.requires_grad != (
                    parameter.grad is not None):
                found.append(f"{name} with {counts} objects")
    return found


@pytest.mark.filterwarnings("ignore:.*random weights and frozen batch norm")
@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["every seventh", "all"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_that_learns_gets_a_gradient_with_every_combination_of_flags(backbone, masks, share):
    "Nothing else is in the optimizer, either; with no objects in the batch, too."
    if "timm" in BACKBONES[backbone]["backbone"]:
        pytest.importorskip("timm")
    combined = combinations(backbone)[::share]
    assert all({settings[name] for settings in combined} == set(values) for name, values in FLAGS.items()
               if name != "dilation")
    wrong = {str(settings): found for settings in combined if (found := without_gradient(
        SMALLEST.but(**BACKBONES[backbone], **MASKS[masks], **settings)))}
    assert not wrong, f"{len(wrong)} of {len(combined)}: {next(iter(wrong.items()))}"


def steps_beside_nobody(process: Process, settings: dict) -> list[float]:
    "Three steps of a process whose images have no objects in turn with the other's."
    torch.manual_seed(0)
    config = SMALLEST.but(**settings)
    bare = build_model(config, 2).train()
    optimizer = build_optimizer(bare, config)
    model, norms = DistributedDataParallel(bare), []
    for step in range(3):
        counts = [3, 1] if step % 2 == process.rank else [0, 0]
        loss_of(model, bare, config, counts).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in bare.parameters() if p.grad is not None]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("settings", [
    dict(), dict(masks=True), dict(aux_loss=False, position_embedding="learned", dec_layers=1),
    dict(masks=True, frozen_weights="boxes.pth", lr_backbone=0),
    pytest.param(dict(BACKBONES["timm-hrnet"], aux_loss=False), id="timm-hrnet")], ids=str)
def test_a_process_without_objects_does_not_stop_the_other(settings):
    "DistributedDataParallel would raise at the second step where a parameter took no part in the first."
    if "timm" in settings.get("backbone", ""):
        pytest.importorskip("timm")
    first, second = spawn(steps_beside_nobody, 2, settings)
    assert first == second and len(first) == 3 and all(norm > 0 for norm in first)
