"""Memory that masks take when predicting: DETR R50, 100 queries, images of 800 x 1088 pixels, float32, on the CPU.

    python benchmarks/mask_memory.py

Every case runs in a process of its own; printed is how much the largest resident size grew over that of boxes alone.
"""
import resource
import subprocess
import sys

import torch

from detr_nb.detr import build_detr
from detr_nb.segmentation import build_segmentation

CASES = {  # masks that are kept of an image's 100, and how many are painted at once
    "boxes alone": (0, 64),
    "all 100 at once": (100, 100),
    "all 100, 64 at once": (100, 64),
    "10 kept": (10, 64),
}


def run(kept: int, at_once: int) -> float:
    "Gigabytes at most, for one image."
    torch.manual_seed(0)
    model = build_segmentation(build_detr(91, "resnet50", pretrained=None)).eval()
    model.at_once = at_once
    chosen = torch.arange(100)[None] < kept
    with torch.inference_mode():
        images = torch.randn(1, 3, 800, 1088)
        model(images, keep=lambda predictions: chosen) if kept else model.detr(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    if len(sys.argv) == 2:
        print(run(*CASES[sys.argv[1]]))
        return
    base = 0.0
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        size = float(done.stdout.split()[-1])
        base = base or size
        print(f"{name:20} {size:5.2f} GB at most, {size - base:5.2f} GB over boxes alone")


if __name__ == "__main__":
    main()
