"""Start and memory on an annotation file of COCO's size, ours beside pycocotools; each figure from its own process.

    python benchmarks/coco_index.py [--folder DIR] [--images 118000] [--objects 860000] [--workers 8] [--json]

The file is generated: polygons about as long as COCO's, one crowd in 86, the images are links to a few files.
Seconds are wall clock, and in brackets those of the processor. Memory is what a process holds alone (`Private_*` in
`/proc/PID/smaps_rollup`, Linux only) and its peak. Each worker reads every row of the index; "adds" is what it holds
beyond a worker on a set of eight images.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # 80, with COCO's gaps
LINKS = 30_000  # hard links to one file; some file systems allow no more than 65,000


def write_set(root: Path, split: str, images: int, objects: int) -> Path:
    "A split in COCO's layout; returns its annotation file."
    folder, path = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    folder.mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for i in range(images):
        name = folder / f"{i + 1:012}.jpg"
        if i % LINKS == 0:
            first = name
            Image.fromarray(pixels).resize((640, 480)).save(name, quality=90)
        else:
            os.link(first, name)
    with path.open("w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        file.writelines(("" if i == 0 else ", ") + json.dumps(image_entry(i)) for i in range(images))
        file.write('], "annotations": [')
        file.writelines(("" if n == 0 else ", ") + json.dumps(annotation(n, images, rng)) for n in range(objects))
        names = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in CATEGORY_IDS]
        file.write(f'], "categories": {json.dumps(names)}}}')
    return path


def image_entry(i: int) -> dict:
    "With all the fields that COCO's have."
    return {"license": 3, "file_name": f"{i + 1:012}.jpg", "height": 480, "width": 640, "id": i + 1,
            "coco_url": f"http://images.cocodataset.org/train2017/{i + 1:012}.jpg",
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg"}  # fmt: skip


def annotation(n: int, images: int, rng: np.random.Generator) -> dict:
    "A polygon of 24 points on average, or the run lengths of a crowd."
    (x, y), (w, h) = rng.uniform((0, 0), (500, 340)), rng.uniform(2, 139, 2)
    points = rng.random((max(3, int(rng.gamma(1.2, 19))), 2)) * (w, h) + (x, y)
    crowd = n % 86 == 85
    outline = [points.round(2).ravel().tolist()]
    if crowd:
        outline = {"counts": rng.integers(1, 900, 300).tolist(), "size": [480, 640]}
    return {"segmentation": outline, "area": round(w * h * 0.6, 4), "iscrowd": int(crowd),
            "image_id": int(rng.integers(1, images + 1)), "bbox": [round(v, 2) for v in (x, y, w, h)],
            "category_id": CATEGORY_IDS[n % 80], "id": n + 1}  # fmt: skip


# ---------------------------------------------------------------- measured in processes of their own


def private_mb() -> float:
    "What this process holds alone, in MB."
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def cpu_seconds() -> float:
    "What this process and its finished children have spent on the processor."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_mb() -> float:
    "The most that this process has held, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pycocotools_index(root: Path) -> dict:
    "Build pycocotools' index."
    from pycocotools.coco import COCO

    before, began, cpu = private_mb(), time.perf_counter(), cpu_seconds()
    with redirect_stdout(None):
        coco = COCO(str(root / "annotations" / "instances_train2017.json"))
    return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu, "held_mb": private_mb() - before,
            "peak_mb": peak_mb(), "objects": len(coco.anns)}  # fmt: skip


def our_index(root: Path, with_masks: bool = False) -> dict:
    "Read the index."
    from detr_nb.coco import read_index

    before, began, cpu = private_mb(), time.perf_counter(), cpu_seconds()
    index = read_index(root / "annotations" / "instances_train2017.json", with_masks)
    return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu, "held_mb": private_mb() - before,
            "peak_mb": peak_mb(), "objects": len(index.objects.ids)}  # fmt: skip


def our_index_with_outlines(root: Path) -> dict:
    "Read the index with the outlines, as for masks."
    return our_index(root, with_masks=True)


def first_step(root: Path, began: float) -> dict:
    "All that a training does before its first step, from `began` on: imports, data set, model, loader, first batch."
    stages, last = {}, began

    def passed(stage: str) -> None:
        nonlocal last
        stages[stage], last = time.time() - last, time.time()

    from detr_nb.batching import make_loader
    from detr_nb.coco import open_coco
    from detr_nb.config import OptimizerConfig, RunConfig
    from detr_nb.detr import build_detr
    from detr_nb.transforms import paper_transform

    passed("imports")
    dataset = open_coco(root, "train", transform=paper_transform(train=True))
    passed("data set")
    build_detr(dataset.categories.num_classes)
    passed("model")
    batch = next(iter(make_loader(dataset, OptimizerConfig.batch_size, num_workers=RunConfig.num_workers)))
    passed("first batch")
    return {"seconds": time.time() - began, "cpu": cpu_seconds(), "stages": stages, "held_mb": private_mb(),
            "peak_mb": peak_mb(), "images": len(batch.images)}  # fmt: skip


def worker_memory(root: Path, workers: int, kind: str, method: str) -> dict:
    "What loader workers hold alone, in MB, after each of them has read every row."
    from torch.utils.data import DataLoader

    dataset = Rows(root) if kind == "ours" else Dictionaries(root)
    order = [list(range(len(dataset)))] * workers
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=report,
                        multiprocessing_context=method)
    found = dict(loader)
    return {"workers_mb": sorted(found.values()), "processes": len(found), "main_mb": private_mb()}


def report(rows: list) -> tuple[int, float]:
    "A worker's number, and what it holds."
    return os.getpid(), private_mb()


class Rows:
    "The rows of our index, all that reading a sample reads of it; no image."

    def __init__(self, root: Path):
        from detr_nb.coco import CocoDataset

        files = root / "annotations" / "instances_train2017.json"
        self.dataset = CocoDataset(root / "train2017", files)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> int:
        images, objects, _ = self.dataset.index
        own = slice(*objects.offsets[row : row + 2].tolist())
        images.names.item(row), images.sizes[row].tolist(), int(images.ids[row])
        objects.boxes[own].tolist(), objects.labels[own].tolist(), objects.crowd[own].tolist()
        return row


class Dictionaries:
    "The same from pycocotools, as the released code does it."

    def __init__(self, root: Path):
        from pycocotools.coco import COCO

        with redirect_stdout(None):
            self.coco = COCO(str(root / "annotations" / "instances_train2017.json"))
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> int:
        self.coco.loadImgs(self.ids[row])
        for entry in self.coco.loadAnns(self.coco.getAnnIds(self.ids[row])):
            entry["bbox"], entry["category_id"], entry["iscrowd"]
        return row


def in_own_process(name: str, *arguments) -> dict:
    "Call one of the functions above in a fresh interpreter."
    call = f"{name}({', '.join(map(repr, arguments))})"
    program = f"import json; from pathlib import PosixPath; from coco_index import *; print(json.dumps({call}))"
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{call}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(root: Path, workers: int) -> dict:
    "All figures."
    tiny = root / "tiny"
    if not tiny.exists():
        write_set(tiny, "train", 8, 40)
    found = {name: in_own_process(name, root) for name in ("pycocotools_index", "our_index", "our_index_with_outlines")}
    found["first_start"] = in_own_process("first_step", root, time.time())
    for method in ("fork", "spawn"):
        alone = in_own_process("worker_memory", tiny, workers, "ours", method)
        found[method] = in_own_process("worker_memory", root, workers, "ours", method)
        found[method]["added_mb"] = [mb - min(alone["workers_mb"]) for mb in found[method]["workers_mb"]]
        found[method]["alone_mb"] = alone["workers_mb"]
    alone = in_own_process("worker_memory", tiny, 2, "dictionaries", "fork")
    found["dictionaries"] = in_own_process("worker_memory", root, 2, "dictionaries", "fork")  # two: they take gigabytes
    found["dictionaries"]["added_mb"] = [mb - min(alone["workers_mb"]) for mb in found["dictionaries"]["workers_mb"]]
    return found


def tell(found: dict) -> None:
    "The figures as lines of text."
    theirs = found["pycocotools_index"]
    print(f"annotation file: {found['megabytes']:.0f} MB, {theirs['objects']:,} objects")
    for key, name in (("pycocotools_index", "pycocotools.COCO"), ("our_index", "read_index"),
                      ("our_index_with_outlines", "read_index with outlines"),
                      ("first_start", "start to its step 1")):  # fmt: skip
        row = found[key]
        print(f"{name:25} {row['seconds']:6.1f} s ({row['cpu']:5.1f})  holds {row['held_mb']:5.0f} MB, "
              f"peak {row['peak_mb']:5.0f} MB  {row['seconds'] / theirs['seconds']:5.2f} of pycocotools.COCO")
    for key in ("first_start",):
        stages = found[key]["stages"].items()
        print(f"{key.replace('_', ' ')}: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages))
    for key in ("fork", "spawn", "dictionaries"):
        row = found[key]
        name = f"{row['processes']} workers, {key}"
        print(f"{name:25} each adds {min(row['added_mb']):.0f} to {max(row['added_mb']):.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to generate the set and leave it; else a temporary folder")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        path = root / "annotations" / "instances_train2017.json"
        if not path.exists():
            write_set(root, "train", args.images, args.objects)
        found = measure(root, args.workers)
        found["megabytes"] = path.stat().st_size / 1e6
    print(json.dumps(found)) if args.json else tell(found)


if __name__ == "__main__":
    main()
