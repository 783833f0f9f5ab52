"What breaks in other people's trainers, each with a test that it cannot break here; the names are the complaints."
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_nb import engine, train
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
