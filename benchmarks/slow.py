"""Watch DETR train: who answers for which object, and where it looks. Writes nbs/slow.json, which `slow.ipynb` draws.

    python benchmarks/slow.py                         # all runs: about 20 minutes of one core
    python benchmarks/slow.py --steps 52 --short 52   # the short form

Every 26 steps the training halts before 96 images that it also learns from, always the same ones and not augmented.
The rate is constant until it drops to a tenth. The backbone has learned its cells (chapter 31) but in the run that says
otherwise.
"""
import argparse
import base64
import json
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from detr_nb.batching import Batch, CachedDataset, make_loader
from detr_nb.checkpoints import load_checkpoint
from detr_nb.config import PRESETS, Config
from detr_nb.engine import (
    Averages,
    build_criterion,
    build_model,
    build_optimizer,
    choose_transform,
    rate_factor,
    set_rates,
    train_step,
)
from detr_nb.evaluation import CocoEvaluator, evaluate, evaluation_mode
from detr_nb.matcher import image_of_target, match
from detr_nb.score import first_images, open_split
from detr_nb.seeding import seed_everything

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # what differs from DETR
    "DETR": {},
    "no lesson for the backbone": {},
    "no auxiliary losses": {"aux_loss": False},
    "64 queries": {"num_queries": 64},
    "anchors with a bias": {"decoder": "dab", "box_bias": "rpb"},
}
LOSSES = ("loss", "loss_ce_unscaled", "loss_bbox_unscaled", "loss_giou_unscaled", "class_error")
IMAGES, SHOWN, EVERY = 96, 12, 26  # watched; with classes and scores; steps between two looks
Weights = list[Tensor]  # of the decoder's layers, each (B, heads, Q, cells)


def note_attention(calls: Weights, queries: Tensor, keys: Tensor, values: Tensor, attn_mask=None, *_, **__) -> Tensor:
    "Attention written out, so that its weights can be kept."
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    calls.append(scores.softmax(-1))
    return calls[-1] @ values


def watch_batch(model: nn.Module, batch: Batch, config: Config) -> dict[str, Tensor]:
    "Answers, matches and attention on one batch; the layers come first."
    calls: Weights = []
    with patch.object(F, "scaled_dot_product_attention", partial(note_attention, calls)):
        answer = model(batch.images, batch.padding)
    weights = torch.stack(calls[config.model.enc_layers + 1 :: 2])  # after the encoder: among queries, to the image
    height, width = (-(-side // 16) for side in batch.images.shape[2:])
    real = torch.ones(len(batch.images), height, width) if batch.padding is None else (
        F.interpolate(1.0 - batch.padding[:, None].float(), size=(height, width))[:, 0])
    cells = real.flatten(1).sum(1)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    matches = match(answer, batch.targets, *(getattr(config.loss, f"set_cost_{name}")
                                             for name in ("class", "bbox", "giou"))).of_layer(-1 + len(answer.logits))
    query = torch.full((len(batch.targets.labels),), 255)
    query[matches.target] = matches.query
    image = image_of_target(batch.targets)
    y, x = ((torch.arange(side) + 0.5) for side in (height, width))
    sizes = torch.stack([real[:, 0].sum(1), real[:, :, 0].sum(1)], 1).repeat(1, 2)[image]  # cells across and down
    box = batch.targets.boxes * sizes  # in cells
    rows, columns = (y - box[:, 1:2]).abs() <= box[:, 3:] / 2, (x - box[:, :1]).abs() <= box[:, 2:3] / 2
    inside = rows[..., None] & columns[:, None]
    found = weights.mean(2)[:, image[matches.target], matches.query]  # (L, P, S)
    return {"spread": (entropy.exp() / cells[:, None, None]).mean((2, 3)),  # of each layer and image
            "inside": (found * inside.flatten(1)[matches.target]).sum(-1),  # of each layer and object
            "area": (inside.flatten(1).sum(1) / cells[image])[None],
            "query": query[None], "boxes": answer.boxes[-1:],
            "scores": answer.logits[-1:].softmax(-1)[..., :-1].amax(-1),
            "classes": answer.logits[-1:, ..., :-1].argmax(-1)}


def pack(values: Tensor) -> str:
    "Numbers of 0..255, as text."
    return base64.b64encode(values.round().to(torch.uint8).numpy().tobytes()).decode()


def look(model: nn.Module, batches: list[Batch], config: Config) -> dict:
    "What is kept of the watched images."
    with evaluation_mode(model) as bare:
        found = [watch_batch(bare, batch, config) for batch in batches]
    seen = {name: torch.cat([part[name] for part in found], 1) for name in found[0]}
    chosen = slice(0, SHOWN)
    return {"spread": seen["spread"].mean(1).tolist(), "inside": seen["inside"].mean(1).tolist(),
            "area": seen["area"].mean().item(), "query": pack(seen["query"][0]), "boxes": pack(255 * seen["boxes"][0]),
            "scores": pack(255 * seen["scores"][0, chosen]), "classes": pack(seen["classes"][0, chosen])}


def run(name: str, options: argparse.Namespace) -> dict:
    "Train one variant; returns what was seen on the way."
    steps = options.steps if name == "DETR" else options.short
    config = PRESETS["shapes"].but(shapes_path=str(options.shapes_path), schedule="step", warmup_steps=46, **RUNS[name])
    train = CachedDataset(open_split(config, "train"))
    loader = make_loader(train, config.optimizer.batch_size, seed=config.run.seed, group_by_shape=True)
    watched, val = (first_images(open_split(config, split), IMAGES) for split in ("train", "val"))
    watched.transform = choose_transform(config, False)
    watched, val = (list(make_loader(part, 32, shuffle=False)) for part in (watched, val))
    evaluator = CocoEvaluator(first_images(open_split(config, "val"), IMAGES))
    seed_everything(config.run.seed)
    model = build_model(config, 6).train()
    if name != "no lesson for the backbone":
        taught = load_checkpoint(options.backbone)["model"]
        model.backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in taught.items()
                                        if key.startswith("backbone.")})
    criterion, optimizer = build_criterion(config, 6), build_optimizer(model, config)
    looks, averages, step, began, accelerator = [], Averages(), 0, time.process_time(), Accelerator(cpu=True)
    for epoch in range(1 + steps // len(loader)):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            if step % EVERY == 0:
                looks.append({"step": step, **look(model, watched, config),
                              "losses": averages.compute() if step else {},
                              "AP": evaluate(model, val, evaluator, "cpu")["coco_eval_bbox"][:2]})
                if name != "DETR":
                    del looks[-1]["boxes"], looks[-1]["scores"], looks[-1]["classes"]
                averages = Averages()
                print(f"{name}, step {step}: AP {looks[-1]['AP'][0]:.3f}", flush=True)
            if step == steps:
                return {"looks": looks, "cpu_seconds": round(time.process_time() - began),
                        "counts": torch.cat([part.targets.counts for part in watched]).tolist()}
            dropped = 0.1 if step >= 0.8 * options.steps else 1.0
            set_rates(optimizer, dropped * rate_factor(step, len(loader), config))
            losses, _ = train_step(model, criterion, optimizer, accelerator, [batch], config)
            averages.add({key: losses[key] for key in LOSSES})
            step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=624, help="of DETR; the rate drops after four fifths of them")
    parser.add_argument("--short", type=int, default=234, help="steps of the other runs")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--backbone", type=Path, default=ROOT / "runs/detr/backbone.pth")
    parser.add_argument("--shapes_path", type=Path, default=ROOT / "data/shapes")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/slow.json")
    options = parser.parse_args()
    if not options.backbone.exists():
        sys.exit(f"{options.backbone} is not there: `make train ARGS='shapes --output_dir runs/detr'` makes it, "
                 "or name another run's with --backbone")
    found = {"date": str(date.today()), "torch": version("torch"), "threads": torch.get_num_threads(),
             "images": IMAGES, "every": EVERY, "runs": {}}
    for name in options.only:
        found["runs"][name] = run(name, options)
        short = json.loads(json.dumps(found), parse_float=lambda digits: round(float(digits), 5))
        options.output.write_text(json.dumps(short, indent=0) + "\n")


if __name__ == "__main__":
    main()
