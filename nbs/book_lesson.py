"A DETR that has learned two drawn scenes by heart, for pages that need one and have no run at hand."
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

from detr_nb.batching import Batch, collate, one_thread
from detr_nb.checkpoints import save_checkpoint
from detr_nb.coco import Sample
from detr_nb.config import PRESETS
from detr_nb.criterion import SetCriterion
from detr_nb.detr import DETR, Predictions, build_detr
from detr_nb.engine import build_optimizer, set_rates
from detr_nb.shapes import CATEGORIES, draw_scene
from detr_nb.shapes_set import RUNNING_INDEX

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_classes=6, backbone="small", norm="group", temperature=20, hidden_dim=64, nheads=4, enc_layers=1,
             dec_layers=2, dim_feedforward=128, dropout=0.0, num_queries=16, pre_norm=True)  # fmt: skip


def two_scenes() -> list[Sample]:
    "The book's running scene and another one, one wide and one tall."
    scenes = [draw_scene(seed=0, index=index) for index in (RUNNING_INDEX, 3)]
    return [Sample(s.image, s.labels, s.boxes, i, tuple(s.image.shape[1:])) for i, s in enumerate(scenes)]


def learn_two_scenes() -> Path:
    "The folder of a run that has learned the two scenes, for `detr_nb.load`; made once for each state of the code."
    sources = [Path(__file__), *sorted((ROOT / "detr_nb").glob("[!_]*.py"))]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()).hexdigest()[:12]
    run = ROOT / f"data/two_scenes/{key}"
    run.mkdir(parents=True, exist_ok=True)
    with FileLock(run / ".lock"):
        if not (run / "best.pth").exists():
            _learn(run / "best.pth")
            for older in set(run.parent.iterdir()) - {run}:
                shutil.rmtree(older)
    return run


def learn_steps(
    model: DETR,  # is trained
    batch: Batch,
    steps: int = 200,
    **criterion: float,  # settings of `SetCriterion`
) -> Iterator[Predictions]:  # what the model answers before each step
    "Train on one batch; whoever stops asking ends it there."
    losses = SetCriterion(model.num_classes, **{"bbox_loss_coef": 3, "giou_loss_coef": 1.2} | criterion)
    optimizer = build_optimizer(model, PRESETS["shapes"])
    for step in range(steps):
        set_rates(optimizer, min(1, (step + 1) / 20) * (1 - step / steps))
        with one_thread():  # tensors this small gain nothing from a second one
            predictions = model(batch.images, batch.padding)
        yield Predictions(predictions.logits.detach(), predictions.boxes.detach())
        with one_thread():
            losses.total(losses(predictions, batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad()


def _learn(file: Path, steps: int = 200) -> None:
    "Train on one batch of both scenes, and save what was learned."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch, model = collate(two_scenes()), build_detr(**SMALL)
    for _ in learn_steps(model, batch, steps):
        pass
    save_checkpoint(file, {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": steps, "model": model.state_dict(), "config": {},
        "architecture": SMALL, "preprocessing": {"short_side": None, "max_size": 160},
        "classes": {"ids": list(CATEGORIES), "names": list(CATEGORIES.values())}})  # fmt: skip
