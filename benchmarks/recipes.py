"""Fine-tune on two sets by several recipes, and write what each gave to nbs/recipes.csv.

    python benchmarks/recipes.py --bccd data/bccd --weights runs/shapes/best.pth     # an hour on two cores

The one set is BCCD in COCO's layout, which is not part of the project. The other is drawn here: the six shapes of the
embedded set in another style, outlines and hatching on paper. A run that is there already is not repeated.
"""
import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from detr_nb.plots import read_log
from detr_nb.shapes import CATEGORIES, Scene, draw_scene, smooth_noise

RECIPES = {  # after `python -m detr_nb.train`; SHAPES is the checkpoint that `make train` leaves
    "the small model": "finetune --finetune SHAPES",
    "the small model, backbone frozen": "finetune --finetune SHAPES --lr_backbone 0",
    "the small model, weights averaged": "finetune --finetune SHAPES --ema 0.99",
    "photos": "photos --finetune SHAPES",
    "photos, transformer from nothing": "photos",
    "photos, 240 pixels": "photos --finetune SHAPES --image_size 240",
}


def sketch(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    "A scene as outlines and hatching on paper, twice as large."
    owner = np.zeros(scene.image.shape[1:], int)
    for number, mask in enumerate(scene.masks.numpy(), 1):
        owner[mask] = number
    owner = np.kron(owner, np.ones((2, 2), int))
    y, x = np.mgrid[: owner.shape[0], : owner.shape[1]]
    edge = np.zeros(owner.shape, bool)
    edge[1:] |= owner[1:] != owner[:-1]
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    ink = ndimage.gaussian_filter(ndimage.binary_dilation(edge).astype(float), 0.7)
    for number in range(1, owner.max() + 1):
        turn, width = rng.uniform(0, np.pi), rng.uniform(4, 9)
        hatch = np.sin((x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / width) > 0.4
        ink = np.maximum(ink, 0.45 * (hatch & (owner == number)))
    paper = 236 - 25 * smooth_noise(*owner.shape, 60, rng) + rng.normal(0, 4, owner.shape)
    return np.clip(paper * (1 - 0.75 * ink), 0, 255).astype(np.uint8)


def write_sketches(root: Path, counts: dict[str, int]) -> Path:
    "A set of sketches as Roboflow exports one; crowds are left out."
    for split, count in counts.items():
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        images, annotations, ids = [], [], list(CATEGORIES)
        for i in range(count):
            scene = draw_scene(9, i, "train" if split == "train" else "val")
            picture = sketch(scene, np.random.default_rng([5, i, count]))
            Image.fromarray(picture).convert("RGB").save(folder / f"{i:04}.jpg", quality=92)
            images.append({"id": i, "file_name": f"{i:04}.jpg", "height": len(picture), "width": picture.shape[1]})
            boxes, labels = 2 * scene.boxes[~scene.crowd], scene.labels[~scene.crowd]
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": ids[label], "iscrowd": 0,
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        categories = [{"id": i, "name": f"pencil {name}"} for i, name in CATEGORIES.items()]
        (folder / "_annotations.coco.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def main() -> None:
    "Run what is missing, and write the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", help="folder of BCCD in COCO's layout; without it only the sketches are learned")
    parser.add_argument("--weights", default="runs/shapes/best.pth", help="the checkpoint of `make train`")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--epochs", type=int, default=16, help="of every recipe")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    given.runs, weights = given.runs.resolve(), str(Path(given.weights).resolve())
    sketches = given.runs / "sketches"
    sets = {"sketches": sketches if sketches.exists() else write_sketches(sketches, {"train": 200, "valid": 100})}
    sets |= {"bccd": Path(given.bccd).resolve()} if given.bccd else {}
    machine, rows = f"{platform.processor() or platform.machine()}, torch {torch.__version__}", []
    for name, folder in sets.items():
        for recipe, flags in RECIPES.items():
            run = given.runs / f"{name} {recipe}".replace(",", "").replace(" ", "_")
            if not (run / "predictions.png").exists():
                words = flags.replace("SHAPES", weights).split()
                words += ["--coco_path", folder, "--epochs", given.epochs, "--output_dir", run, "--report_to", "none"]
                began = time.time()
                command = [sys.executable, "-m", "detr_nb.train", *map(str, words)]
                subprocess.run(command, check=True, cwd=given.runs)  # where no runs/shapes is found by itself
                (run / "minutes.txt").write_text(f"{(time.time() - began) / 60:.1f}\n")
            scores = [row["test_coco_eval_bbox"] for row in read_log(run) if "test_coco_eval_bbox" in row][-1]
            minutes = (run / "minutes.txt").read_text().strip()
            rows.append([name, recipe, f"{scores[0]:.3f}", f"{scores[1]:.3f}", minutes, machine])
            print(*rows[-1][:5], sep="\t", flush=True)
    with open("nbs/recipes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["set", "recipe", "AP", "AP50", "minutes", "machine"], *rows])


if __name__ == "__main__":
    main()
