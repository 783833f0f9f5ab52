"A DETR that has learned two drawn scenes by heart, for pages that need one and have no run at hand."
import tempfile
from pathlib import Path

import torch
from PIL import Image

from detr_nb.batching import collate, one_thread
from detr_nb.checkpoints import save_checkpoint
from detr_nb.coco import Sample
from detr_nb.criterion import SetCriterion
from detr_nb.detr import build_detr
from detr_nb.shapes import CATEGORIES, draw_scene
from detr_nb.shapes_set import RUNNING_INDEX

SMALL = dict(num_classes=6, backbone="small", norm="group", temperature=20, hidden_dim=64, nheads=4, enc_layers=1,
             dec_layers=2, dim_feedforward=128, dropout=0.0, num_queries=16, pre_norm=True)  # fmt: skip


def learn_two_scenes(steps: int = 200) -> tuple[Path, Image.Image]:
    "The folder of the run, as `detr_nb.load` takes it, and the first of its pictures."
    torch.manual_seed(0)
    scenes = [draw_scene(seed=0, index=index) for index in (RUNNING_INDEX, 3)]
    batch = collate([Sample(s.image, s.labels, s.boxes, i, tuple(s.image.shape[1:])) for i, s in enumerate(scenes)])
    model, criterion = build_detr(**SMALL), SetCriterion(6, bbox_loss_coef=3, giou_loss_coef=1.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1, 2 - 2 * step / steps))
    with one_thread():  # tensors this small gain nothing from a second one
        for _ in range(steps):
            criterion.total(criterion(model(batch.images, batch.padding), batch.targets)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), rates.step(), optimizer.zero_grad()
    run = Path(tempfile.mkdtemp(prefix="two_scenes"))
    save_checkpoint(run / "best.pth", {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": steps, "model": model.state_dict(), "config": {},
        "architecture": SMALL, "preprocessing": {"short_side": None, "max_size": 160},
        "classes": {"ids": list(CATEGORIES), "names": list(CATEGORIES.values())}})  # fmt: skip
    return run, Image.fromarray(scenes[0].image.permute(1, 2, 0).numpy())
