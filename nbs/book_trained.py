"What the slow cells of several pages ask the DETR in runs/detr."
from pathlib import Path

import torch
from torch import Tensor

from detr_nb.batching import Batch, Targets, make_loader
from detr_nb.boxes import cxcywh_to_xyxy, paired_iou
from detr_nb.coco import open_coco
from detr_nb.config import PRESETS
from detr_nb.detr import DETR, Predictions
from detr_nb.engine import choose_transform
from detr_nb.evaluation import evaluation_mode
from detr_nb.matcher import image_of_target
from detr_nb.pretrained import load_detector

ROOT = Path(__file__).resolve().parent.parent


def trained_model() -> DETR:
    "The best checkpoint of the embedded set."
    return load_detector(ROOT / "runs/detr/best.pth").model.eval()


def validation_batches(count: int) -> list[Batch]:
    "The first validation images of the embedded set, twenty at a time."
    images = open_coco(ROOT / "data/shapes", "val", transform=choose_transform(PRESETS["shapes"], train=False))
    return list(make_loader(images.subset(range(count)), 20, shuffle=False))


def right_answers(predictions: Predictions, targets: Targets) -> Tensor:  # (N,)
    "How many queries give each object its class with a score above 0.5 and a box of IoU above 0.5."
    image = image_of_target(targets)
    score = predictions.probabilities()[image, :, targets.labels]
    found, wanted = cxcywh_to_xyxy(predictions.boxes[-1, image]), cxcywh_to_xyxy(targets.boxes[:, None])
    return ((score > 0.5) & (paired_iou(found, wanted) > 0.5)).sum(1)


def answers_of(model: DETR, batches: list[Batch]) -> Tensor:  # (N,)
    "The same for all objects of some batches."
    with evaluation_mode(model):
        return torch.cat([right_answers(model(b.images, b.padding), b.targets) for b in batches])
