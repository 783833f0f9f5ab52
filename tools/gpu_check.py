"""What only a GPU can tell, in at most eight minutes, most valuable first; on a CPU the same on small problems.

    python tools/gpu_check.py --output FOLDER          # everything; lines of JSON as they are found, in check.jsonl
    python tools/gpu_check.py --part losses            # one part alone, to the screen

Each part is a process of its own with a limit of its own, so that one which hangs costs no other. Where a machine lacks
packages (tyro, msgspec, pycocotools), install them first from wheels: pip install --no-index --find-links WHEELS ...
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZE = (800, 1066) if GPU else (64, 96)
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40": 181, "4090": 165}  # TFLOP/s in bf16, dense, as the makers say


def machine() -> Iterator[dict]:
    "Where this runs."
    yield {"torch": torch.__version__, "device": torch.cuda.get_device_name() if GPU else "cpu",
           "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if GPU else None}


def losses_of(device: str, steps: int, precision: str = "no") -> list[float]:
    "The losses of some steps of the embedded model by AdamW, from the same weights on the same images."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from bench import random_targets

    from detr_nb.batching import Batch
    from detr_nb.config import PRESETS
    from detr_nb.engine import build_criterion, build_model, build_optimizer, set_rates, train_step
    torch.manual_seed(0)
    AcceleratorState._reset_state(True)
    config = PRESETS["shapes"].but(optimizer="adamw")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    model, criterion = build_model(config, 6).to(device).train(), build_criterion(config, 6).to(device)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    set_rates(optimizer, 0.2)
    targets = random_targets(4, 5)
    batch = Batch(torch.randn(4, 3, 128, 160, generator=torch.Generator().manual_seed(1)), None,
                  targets._replace(labels=targets.labels % 6)).to(device)
    return [float(train_step(model, criterion, optimizer, accelerator, [batch], config)[0]["loss"])
            for _ in range(steps)]


def losses() -> Iterator[dict]:
    "Twenty steps here give the CPU's losses to 1e-4 in float32; in bf16 they fall as well."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected, found = losses_of("cpu", 20), losses_of(DEVICE.type, 20)
    difference = max(abs(a - b) / a for a, b in zip(expected, found))
    yield {"float32": found[-1], "relative_difference": difference, "good": difference < 1e-4}
    half = losses_of(DEVICE.type, 20, "bf16")
    yield {"bf16": half[-1], "first": half[0], "good": half[-1] < 0.9 * half[0]}


def program(*arguments: object, launcher: tuple = ()) -> subprocess.Popen:
    "A training that goes on by itself."
    from detr_nb.shapes_set import write_shapes
    data = write_shapes(ROOT / "data/gpu_check", num_train=96, num_val=16)
    command = [sys.executable, *(launcher or ("-m",)), "detr_nb.train", "shapes", "--coco_path", data, "--epochs", 1,
               "--pretrain_epochs", 0, "--batch_size", 8, "--image_size", 128, "--report_to", "none", *arguments]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def runs(folder: Path) -> Iterator[dict]:
    "Whole trainings: by itself, killed and resumed, in half precision, through NCCL, two by gloo, FSDP."
    process = program("--output_dir", folder / "killed", "--save_every", 2)
    while not (folder / "killed/checkpoint.pth").exists() and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    one = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m")
    fsdp = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml",
            "--num_processes", "1", "-m")
    trials = {"auto": ((), ()), "killed": (("--resume", "auto"), ()), "bf16": (("--mixed_precision", "bf16"), ()),
              "one in a group": ((), one), "two by gloo": (("--device", "cpu"), (*one[:4], "2", "-m")),
              "fsdp": (("--optimizer", "adamw"), fsdp)}
    for name, (arguments, launcher) in trials.items():
        if GPU or name != "fsdp":
            process = program("--output_dir", folder / name.replace(" ", "_"), *arguments, launcher=launcher)
            text = process.communicate()[0]
            yield {"run": name, "good": not process.returncode, "says": text[-600:] if process.returncode else ""}


def peers() -> Iterator[dict]:
    "`make bench` against transformers, in float32 and in bf16."
    import bench
    for half in (False, True):
        bench.ON.update(device=DEVICE, bf16=half)
        for images in (2, 8, 16) if GPU else (1,):
            pair = bench.training_step(*SIZE, images)
            yield {"scenario": "training step, R50", "bf16": half, "batch": images, **bench.compare(pair, 5)}
        yield {"scenario": "inference, R50", "bf16": half, **bench.compare(bench.inference(*SIZE), 5)}
    bench.ON.update(bf16=False)
    yield {"scenario": "criterion, 16 images of 40", **bench.compare(bench.criterion(16, 40), 10)}


def ladder() -> Iterator[dict]:
    "Images a second, share of the peak, memory, waits and launches of a training step, from batch 2 to memory's end."
    import bench
    from torch.utils.flop_counter import FlopCounterMode
    bench.ON.update(device=DEVICE, bf16=True)
    ours, criterion = bench.models()[0].train(), bench.SetCriterion(91).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 1e-6, fused=GPU)

    def step(pixels: torch.Tensor, targets: object) -> None:
        with bench.autocast():
            predictions = ours(pixels, None)
        criterion.total(criterion(predictions, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = next((value for name, value in PEAKS.items() if GPU and name in torch.cuda.get_device_name()), None)
    for images in (2, 4, 8, 16, 32, 64) if GPU else (1, 2):
        for layout in (torch.contiguous_format, torch.channels_last):
            pixels = torch.randn(images, 3, *SIZE, device=DEVICE).contiguous(memory_format=layout)
            run = bench.partial(step, pixels, bench.random_targets(images, 8))
            with FlopCounterMode(display=False) as counter:
                run()
            took = bench.compare((run, None), 8 if GPU else 1)["ours"]  # milliseconds
            rate, memory = counter.get_total_flops() / took / 1e9, GPU and torch.cuda.max_memory_allocated() / 2**30
            yield {"batch": images, "layout": str(layout), "images_per_s": 1000 * images / took, "tflops": rate,
                   "share_of_peak": peak and rate / peak, "memory_gb": memory, **watched(run)}  # the memory so far


def watched(run: Callable[[], None]) -> dict:
    "Of one step: waits for the device, kernels, and the share of time that the device is busy."
    if not GPU:
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        spent = time.perf_counter() - began
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return {"waits": sum("synchroniz" in str(one.message) for one in caught), "kernels": len(kernels),
            "busy": sum(event.device_time for event in kernels) / 1e6 / spent}


def embedded(folder: Path) -> Iterator[dict]:
    "`make train` on the embedded set, or its beginning on a CPU."
    arguments = () if GPU else ("--limit_train", 64, "--limit_val", 16, "--epochs", 1, "--pretrain_epochs", 0)
    command = map(str, [sys.executable, "-m", "detr_nb.train", "--output_dir", folder / "embedded", *arguments])
    began, done = time.perf_counter(), subprocess.run(list(command), cwd=ROOT, stdout=sys.stderr)  # embedded.log
    yield {"seconds": time.perf_counter() - began, "good": not done.returncode}


PARTS = {"machine": (machine, 20), "losses": (losses, 50), "peers": (peers, 90), "ladder": (ladder, 100),
         "runs": (runs, 90), "embedded": (embedded, 130)}  # and their limits in seconds


def main() -> None:
    "Run the parts, or one."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--patience", type=float, default=1, help="factor on every limit")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.part:
        for found in PARTS[given.part][0](*[given.output] * (given.part in ("runs", "embedded"))):
            print(json.dumps({"part": given.part, **found}), flush=True)
        return
    for name, (_, limit) in PARTS.items():
        began = time.perf_counter()
        with open(given.output / "check.jsonl", "a") as lines, open(given.output / f"{name}.log", "w") as log:
            process = subprocess.Popen([sys.executable, __file__, "--part", name, "--output", given.output],
                                       stdout=lines, stderr=log, start_new_session=True)
            try:
                ended = process.wait(limit * given.patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                ended = "out of time"
            lines.write(json.dumps({"part": name, "ended": ended, "seconds": time.perf_counter() - began}) + "\n")
        print(name, ended, flush=True)


if __name__ == "__main__":
    main()
