"""Panoptic post-processing and quality at COCO's size, on one core, CPU time of the best of several tries.

    python benchmarks/panoptic.py

Post-processing: 100 queries, masks of 120 x 160, an image of 480 x 640. `noise` is the worst case: no two neighbouring
pixels agree. Quality: 100 images of 480 x 640 with about 20 segments, the PNGs of the truth read from the disk.
"""
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from detr_nb.panoptic import PanopticQuality, panoptic_segments
from detr_nb.panoptic_data import PanopticDataset, Segments
from detr_nb.shapes_set import ids_to_rgb

HEIGHT, WIDTH, NUM_CLASSES, NUM_THINGS, NUM_IMAGES = 480, 640, 133, 80, 100


def best_of(function, tries: int = 7) -> float:
    "Seconds of CPU time of the fastest try, after one to warm up."
    function()
    times = []
    for _ in range(tries):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def time_postprocessing(masks: torch.Tensor, kept: int) -> tuple[float, int]:
    "Milliseconds an image, and how many segments came out."
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(1, 100, NUM_CLASSES + 1)
    labels = torch.randint(NUM_CLASSES, (100,), generator=generator)
    labels[kept:] = NUM_CLASSES
    logits[0, torch.arange(100), labels] = 12
    size = torch.tensor([[HEIGHT, WIDTH]])
    is_thing = torch.arange(NUM_CLASSES) < NUM_THINGS
    found = panoptic_segments(logits, masks, size, size, is_thing)[0]
    return best_of(lambda: panoptic_segments(logits, masks, size, size, is_thing)) * 1e3, len(found.ids)


def random_map(generator: torch.Generator, segments: int = 20) -> np.ndarray:
    "Patches with smooth borders; sparse ids."
    scores = F.interpolate(torch.randn(1, segments, 8, 10, generator=generator), (HEIGHT, WIDTH), mode="bicubic")
    return (scores[0].argmax(0).numpy() + 1) * 700_001


def write_set(root: Path) -> list[Segments]:
    "A panoptic set of random maps; returns a shifted copy of each as results."
    generator, entries, results = torch.Generator().manual_seed(1), [], []
    (root / "images").mkdir()
    (root / "pngs").mkdir()
    for number in range(1, NUM_IMAGES + 1):
        ids = random_map(generator)
        present = np.unique(ids)
        labels = torch.randint(NUM_CLASSES, (len(present),), generator=generator)
        Image.fromarray(ids_to_rgb(ids)).save(root / "pngs" / f"{number}.png")
        (root / "images" / f"{number}.jpg").touch()
        segments = [{"id": i, "category_id": label} for i, label in zip(present.tolist(), labels.tolist())]
        entries.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        pixels, marks = torch.from_numpy(np.roll(ids, 5, (0, 1))), torch.ones(len(present))
        areas = (pixels == torch.from_numpy(present)[:, None, None]).flatten(1).sum(1)
        is_thing = labels < NUM_THINGS
        results.append(Segments(pixels, torch.from_numpy(present), labels, areas, is_thing, marks < 0, marks))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, NUM_IMAGES + 1)]
    categories = [{"id": i, "name": str(i), "isthing": int(i < NUM_THINGS)} for i in range(NUM_CLASSES)]
    content = {"images": images, "annotations": entries, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(content))
    return results


def time_quality() -> tuple[float, float]:
    "Seconds for all images, and their PQ."
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results = write_set(root)
        dataset = PanopticDataset(root / "images", root / "panoptic.json", root / "pngs")
        evaluator, scores = PanopticQuality(dataset), {}

        def run() -> None:
            evaluator.update(dataset.image_ids, results)
            scores.update(evaluator.compute())

        return best_of(run, tries=2), scores["PQ_all"]["pq"]


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 100, HEIGHT // 4, WIDTH // 4, generator=generator)
    smooth = F.interpolate(5 * torch.randn(1, 100, 12, 16, generator=generator), noise.shape[2:], mode="bicubic")
    print("post-processing of 100 queries   kept   segments   ms an image")
    cases = ("noise", noise, 100), ("smooth", smooth, 100), ("smooth", smooth, 25), ("smooth", smooth, 0)
    for name, masks, kept in cases:
        milliseconds, segments = time_postprocessing(masks, kept)
        print(f"{name:32} {kept:4} {segments:10} {milliseconds:13.1f}")
    seconds, pq = time_quality()
    print(f"quality of {NUM_IMAGES} images: {seconds:.2f} s, with reading the PNGs (PQ {pq:.1f})")


if __name__ == "__main__":
    main()
