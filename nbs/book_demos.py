"Processes for chapters and tests, and what chapters let them do: these can import only what stands in a file."
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, multiprocessing
from torch.utils.data import Dataset

from detr_nb.batching import Targets
from detr_nb.distributed import (
    Launch,
    Process,
    barrier,
    gather_objects,
    gather_tensors,
    get_logger,
    on_main,
    reduce_mean,
    reduce_sum,
    start,
    stop,
)
from detr_nb.seeding import sample_rng, seed_everything


def _run_task(own_rank: int, folder: str, port: int, num_processes: int, function: Callable, args: tuple) -> None:
    "What a spawned process does: join the group, run the function, leave what it prints and its result in the folder."
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    launch = Launch(own_rank, num_processes, own_rank, num_processes, master_port=port, launcher="torchrun")
    torch.set_num_threads(1)
    with open(Path(folder, f"{own_rank}.out"), "w", buffering=1) as out, redirect_stdout(out), redirect_stderr(out):
        torch.save(function(start("cpu", 60.0, launch), *args), Path(folder, f"{own_rank}.pt"))
    stop()


def spawn(
    function: Callable,  # called as function(process, *args); importable by name
    num_processes: int,
    *args: Any,
    timeout_s: float = 120.0,  # for all of it
) -> list[Any]:  # what each returned, in order of rank
    "Run a function in several new CPU processes that form a group, relay what they print, and return their results."
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(f"other processes cannot import {function.__name__!r} from a notebook or script: use a module")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: the system picks a free one
    with tempfile.TemporaryDirectory() as folder:
        task = (folder, store.port, num_processes, function, args)
        multiprocessing.set_forkserver_preload(["detr_nb.train"])  # imported once, where there is such a server
        how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        started = multiprocessing.start_processes(_run_task, task, num_processes, join=False, start_method=how)
        end = time.monotonic() + timeout_s
        try:
            while not started.join(max(0.0, end - time.monotonic())):
                if time.monotonic() > end:
                    running = [number for number, process in enumerate(started.processes) if process.is_alive()]
                    raise TimeoutError(f"still running after {timeout_s:g} s, and now ended: ranks {running}")
        finally:
            for process in started.processes:
                process.kill()
                process.join()
            for path in sorted(Path(folder).glob("*.out")):
                sys.stdout.write(path.read_text())
        return [torch.load(Path(folder, f"{number}.pt"), weights_only=False) for number in range(num_processes)]


def describe_process(process: Process) -> dict[str, Any]:
    "Say who this is, what it holds, and what all processes hold together."
    logging.basicConfig(stream=sys.stdout, format="logged: %(message)s", level=logging.INFO)
    mine = {"loss": 0.5 + process.rank, "objects": torch.tensor([1, 2, 3]) * 10**process.rank}
    together = reduce_sum(mine)
    print(f"I am rank {process.rank} of {process.world_size}, number {process.local_rank} on this host, "
          f"on the {process.device}, backend {dist.get_backend()}\n  I hold  {mine}\n  we hold {together}")
    get_logger("detr_nb.demonstration").info("only rank 0 says this")
    return {
        "mine": mine,
        "together": together,
        "mean": reduce_mean(mine),
        "everybody": gather_objects(f"rank {process.rank} with {process.rank + 1} detections"),
        "rows": gather_tensors(torch.full((process.rank + 1, 2), float(process.rank))),  # one row on rank 0, two on 1
        "told": on_main(lambda: f"rank {process.rank} says so"),
    }


def gradient_share(
    process: Process, inputs: Float[Tensor, "N D"], targets: Float[Tensor, " N"], weights: Float[Tensor, " D"]
) -> dict[str, Any]:
    "The mean gradient by hand and by DistributedDataParallel; then a call that one process skips."
    share = slice(process.rank, None, process.world_size)  # every second example
    model = torch.nn.Linear(weights.numel(), 1, bias=False)
    model.weight.data = weights[None].clone()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    gradients = {}
    for name, forward in (("by hand", model), ("DistributedDataParallel", wrapped)):
        model.zero_grad()
        (forward(inputs[share])[:, 0] - targets[share]).square().mean().backward()
        gradients[name] = reduce_mean(model.weight.grad[0]) if name == "by hand" else model.weight.grad[0].clone()
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    error = None
    if process.rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=impatient)  # rank 1 does not call this
        except RuntimeError as caught:
            error = str(caught)
    barrier()  # rank 1 waits here, to be alive and merely absent
    return {"gradients": gradients, "error": error}


def draw_on_rank(process: Process, seed: int) -> dict[str, list[float]]:
    "What one process draws for its weights, its order of images and its dropout."
    seed_everything(seed, process.rank)
    model = torch.nn.Linear(3, 1, bias=False)
    drawn = model.weight[0].tolist()
    torch.nn.parallel.DistributedDataParallel(model)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    dropout = torch.nn.functional.dropout(torch.ones(10), p=0.5)
    agreed = model.weight[0].tolist()
    return {"drawn weights": drawn, "weights": agreed, "order": order.tolist(), "dropout": dropout.tolist()}


class Dice(Dataset):
    "Sample i is four throws of 0..99, from four generators."

    sources = ("random", "numpy", "dataset.rng", "sample_rng")

    def __init__(self, size: int, seed: int = 0):
        self.size, self.seed, self.epoch, self.rng = size, seed, 0, np.random.default_rng(seed)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        old = np.random.randint(100)  # noqa: NPY002
        new = sample_rng(self.seed, self.epoch, index).integers(100)
        return torch.tensor([random.randrange(100), old, self.rng.integers(100), new])


def losses_on_rank(process: Process, batches: list) -> dict[str, dict[str, float]]:
    "Three criteria on this process's share of a batch, given as (predictions, targets) for each rank; see the museum."
    from accelerate import PartialState
    from transformers import RTDetrConfig
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
    from transformers.loss.loss_rt_detr import RTDetrLoss
    from transformers.utils import logging as their_logging

    from detr_nb.criterion import SetCriterion

    their_logging.set_verbosity_error()
    PartialState(cpu=True)  # as their trainer does: it tells their loss how many processes there are
    predictions, targets = batches[process.rank]
    outputs = {"logits": predictions.logits[-1], "pred_boxes": predictions.boxes[-1]}
    labels = list_targets(targets)
    theirs = ImageLoss(HungarianMatcher(1, 5, 2), 6, 0.1, ["labels", "boxes"])
    sigmoids = outputs | {"logits": outputs["logits"][..., :-1]}  # RT-DETR has no class of no-object
    losses = {"detr_nb": SetCriterion(6)(predictions, targets), "transformers, DETR": theirs(outputs, labels),
              "transformers, RT-DETR": RTDetrLoss(RTDetrConfig(num_labels=6))(sigmoids, labels)}  # fmt: skip
    return {name: {key: float(value) for key, value in own.items()} for name, own in losses.items()}


def list_targets(targets: Targets) -> list[dict[str, torch.Tensor]]:
    "Packed targets as transformers wants them."
    counts = targets.counts.tolist()
    pairs = zip(targets.labels.split(counts), targets.boxes.split(counts))
    return [{"class_labels": labels, "boxes": boxes} for labels, boxes in pairs]
