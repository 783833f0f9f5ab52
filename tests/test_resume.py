"Runs that are asked to stop, killed, or find their checkpoint damaged: what comes out is what would have come out."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detr_nb.checkpoints import CHECKPOINT, PREVIOUS
from detr_nb.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent
ALONE = [sys.executable, "-m", "detr_nb.train"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "detr_nb.train",
]  # fmt: skip
SMALL = [
    "--enc_layers", "1", "--dec_layers", "2", "--hidden_dim", "64", "--dim_feedforward", "128", "--dropout", "0.1",
    "--epochs", "2", "--pretrain_epochs", "1", "--eval_every", "1", "--save_every", "3", "--log_every", "1",
    "--report_to", "none", "--device", "cpu", "--resume", "auto",
]  # fmt: skip
REQUEUE = 75


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    "A small embedded set."
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=64, num_val=8, num_workers=1)


def start(launcher: list[str], shapes: Path, folder: Path, *arguments: object) -> subprocess.Popen:
    "Start a run in a process group of its own."
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "--shapes_path", shapes, "--output_dir", folder, *SMALL, *arguments]
    with open(folder.with_name(folder.name + ".out"), "a") as output:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True
        )


def finish(launcher: list[str], shapes: Path, folder: Path, *arguments: object) -> str:
    "Let a run come to its end; returns what it printed."
    code = start(launcher, shapes, folder, *arguments).wait(timeout=300)
    said = folder.with_name(folder.name + ".out").read_text()
    assert code == 0, said[-4000:]
    return said


def end(process: subprocess.Popen, number: signal.Signals) -> int:
    "Send the whole group a signal, as schedulers do, and wait."
    os.killpg(process.pid, number)
    return process.wait(timeout=60)


def wait_for_steps(process: subprocess.Popen, folder: Path, lines: int) -> None:
    "Wait until a run has logged so many steps."
    until = time.monotonic() + 120
    while not (folder / "steps.jsonl").exists() or len((folder / "steps.jsonl").read_text().splitlines()) < lines:
        assert process.poll() is None and time.monotonic() < until, "the run ended, or is stuck"
        time.sleep(0.01)


def same_runs(ours: Path, theirs: Path) -> None:
    "Weights, optimizer and logs are equal, bit for bit."
    a, b = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (ours, theirs))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["step"] == b["step"] and a["best_ap"] == b["best_ap"]
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][key][name]) for name in state)
    for name in ("log.txt", "steps.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory) -> Path:
    "A run of one process that nobody disturbed, with readers of its own."
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(ALONE, shapes, folder, "--batch_size", 8, "--num_workers", 1)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_says_so_by_its_exit_code_and_goes_on_to_the_same_end(
    number, alone, shapes, tmp_path
):
    arguments = ["--batch_size", 8, "--num_workers", 1]
    process = start(ALONE, shapes, tmp_path / "run", *arguments)
    wait_for_steps(process, tmp_path / "run", 12)  # in the second epoch, of DETR
    asked = time.monotonic()
    assert end(process, number) == REQUEUE, (tmp_path / "run.out").read_text()[-3000:]
    assert time.monotonic() - asked < 20
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert state["epoch"] >= 0 and state["batch"] > 0  # inside an epoch
    finish(ALONE, shapes, tmp_path / "run", *arguments)
    same_runs(tmp_path / "run", alone)


def test_the_one_before_is_used_when_the_newest_is_torn(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    newest = folder / CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = finish(ALONE, shapes, folder, "--batch_size", 8, "--num_workers", 1)
    assert "going on from previous.pth" in said and str(newest) in said
    same_runs(folder, alone)


def test_a_full_disk_does_not_end_the_run_and_leaves_the_checkpoint_there_was(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    before = (folder / CHECKPOINT).read_bytes()
    limited = ["bash", "-c", 'ulimit -f 1500; exec "$@"', "bash"]  # files of 1.5 MB at most; a checkpoint is larger
    command = [*limited, *ALONE, "--shapes_path", shapes, "--output_dir", folder, *SMALL, "--batch_size", 8]
    command = list(map(str, [*command, "--epochs", 3, "--num_workers", 0]))  # readers would need larger files as well
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "was not written" in result.stdout and "The run goes on" in result.stdout
    assert (folder / CHECKPOINT).read_bytes() == before and not list(folder.glob("*.part"))
    assert len((folder / "log.txt").read_text().splitlines()) == 3


def test_a_resumed_run_takes_the_new_rate_and_says_so(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    (folder / CHECKPOINT).unlink()
    shutil.copy(folder / PREVIOUS, folder / CHECKPOINT)  # saved before the last epoch's evaluation
    said = finish(ALONE, shapes, folder, "--batch_size", 8, "--num_workers", 0, "--lr", "1e-5", "--epochs", "3")
    assert "--lr was 0.0005" in said and "is 1e-05 now" in said and "--epochs was 2" in said
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    assert {group["base_lr"] for group in state["optimizer"]["param_groups"] if not group["muon"]} == {1e-5, 5e-4}


def test_a_new_run_sets_the_older_one_in_its_folder_aside(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    said = finish(ALONE, shapes, folder, "--batch_size", 8, "--resume", "", "--fast_dev_run")
    assert "held another run" in said
    assert (folder / "older-1/log.txt").read_bytes() == (alone / "log.txt").read_bytes()
    assert len((folder / "log.txt").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def pair(shapes, tmp_path_factory) -> Path:
    "A run of two processes that nobody disturbed."
    folder = tmp_path_factory.mktemp("pair") / "run"
    finish(TORCHRUN, shapes, folder, "--batch_size", 4, "--num_workers", 0)
    return folder


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(pair, shapes, tmp_path):
    folder, rng, arguments = tmp_path / "run", random.Random(0), ["--batch_size", 4, "--num_workers", 0]
    while_saving = 0
    for kill in range(10):
        process = start(TORCHRUN, shapes, folder, *arguments, "--save_every", 1)  # often in the middle of writing
        if kill < 5:
            wait_for_steps(process, folder, rng.randrange(1, 22))
            time.sleep(rng.random() * 0.2)
        else:  # while a checkpoint is being written
            part, until = folder / f"{CHECKPOINT}.part", time.monotonic() + 60
            while not part.exists() and time.monotonic() < until and process.poll() is None:
                pass
        if process.poll() is None:
            end(process, signal.SIGKILL)
            while_saving += (folder / f"{CHECKPOINT}.part").exists()
    finish(TORCHRUN, shapes, folder, *arguments)
    assert while_saving  # at least one of them
    same_runs(folder, pair)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(pair, shapes, tmp_path):
    folder = tmp_path / "run"
    process = start(TORCHRUN, shapes, folder, "--batch_size", 4, "--num_workers", 0)
    wait_for_steps(process, folder, 12)
    end(process, signal.SIGKILL)
    said = finish(ALONE, shapes, folder, "--batch_size", 4, "--num_workers", 0)
    assert "resumed on 1 processes, saved on 2" in said and "batches of 8 images were saved, they have 4 now" in said
    ours, theirs = (json.loads((run / "log.txt").read_text().splitlines()[-1]) for run in (folder, pair))
    assert ours["epoch"] == theirs["epoch"] and abs(ours["train_loss"] - theirs["train_loss"]) < theirs["train_loss"]
