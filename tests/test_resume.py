"Runs that are asked to stop, killed, or find their checkpoint damaged: what comes out is what would have come out."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from child import Child, clean_environ, pair_environs

from detr_nb.checkpoints import CHECKPOINT, PREVIOUS
from detr_nb.config import Config, RunConfig
from detr_nb.distributed import UserError
from detr_nb.runs import BACKBONE, LOGS, open_run
from detr_nb.shapes_set import write_shapes

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--enc_layers", "1", "--dec_layers", "2", "--hidden_dim", "64", "--dim_feedforward", "128", "--dropout", "0.1",
    "--epochs", "2", "--pretrain_epochs", "1", "--eval_every", "1", "--save_every", "3", "--log_every", "1",
    "--report_to", "none", "--device", "cpu", "--resume", "auto",
]  # fmt: skip
REQUEUE, EPOCHS = 75, 5
PATIENCE_S = 300  # nothing is claimed about time: who takes longer hangs
PAIR = ["--batch_size", "4", "--num_workers", "0", "--epochs", str(EPOCHS)]  # of two processes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    "A small embedded set."
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=64, num_val=8, num_workers=1)


MODULE = ("-m", "detr_nb.train")


def start(
    shapes: Path, folder: Path, *arguments: object, program: Sequence[object] = MODULE, **environ: object
) -> subprocess.Popen | Child:
    "Start a process of a run, or its launcher, alone in its process group."
    environ = clean_environ(TQDM_DISABLE="1", OMP_NUM_THREADS="1") | {k: str(v) for k, v in environ.items()}
    command = [*program, "--shapes_path", shapes, "--output_dir", folder, *SMALL, *arguments]
    command, said = list(map(str, command)), folder.with_name(folder.name + ".out")
    if program is MODULE:
        return Child(command, environ, said)
    with open(said, "a") as output:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environ, stdout=output, stderr=output,
                                start_new_session=True)


def start_pair(
    shapes: Path, folder: Path, *arguments: object, program: Sequence[object] = MODULE, **environ: object
) -> list[subprocess.Popen | Child]:
    "Start a run of two processes, as a launcher would, but without one: whoever is killed, nobody else interferes."
    pair = pair_environs(**{name: str(value) for name, value in environ.items()})
    return [start(shapes, folder, *PAIR, *arguments, program=program, **own) for own in pair]


def finish(*processes: subprocess.Popen | Child, folder: Path) -> str:
    "Let a run come to its end; returns what it has printed since it first began."
    codes = [process.wait(timeout=PATIENCE_S) for process in processes]
    said = folder.with_name(folder.name + ".out").read_text()
    assert not any(codes), said[-4000:]
    return said


def end(process: subprocess.Popen | Child, number: signal.Signals) -> int:
    "Send the whole group a signal, as schedulers do, and wait."
    os.killpg(process.pid, number)
    return process.wait(timeout=PATIENCE_S)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | Child | None = None) -> None:
    "Wait for something to come true, while a process runs."
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None, "the run ended"
        assert time.monotonic() < until, "it does not come true"
        time.sleep(0.002)


def wait_for_steps(process: subprocess.Popen | Child, folder: Path, lines: int) -> None:
    "Wait until a run has logged so many steps."
    path = folder / "steps.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= lines, process)


def wait_for_newer(process: subprocess.Popen | Child, began: float, *paths: Path) -> None:
    "Wait until a running process has written one of these; what an earlier process left there does not count."
    wait_until(lambda: any(path.exists() and path.stat().st_mtime > began for path in paths), process)


def same_runs(ours: Path, theirs: Path) -> None:
    "Weights, optimizer and logs are equal, bit for bit."
    a, b = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (ours, theirs))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["step"] == b["step"] and a["best_ap"] == b["best_ap"]
    assert a.get("ema", {}).keys() == b.get("ema", {}).keys() and a.get("ema_steps") == b.get("ema_steps")
    assert all(torch.equal(a["ema"][name], b["ema"][name]) for name in a.get("ema", ()))
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][key][name]) for name in state)
    for name in filter(lambda name: (ours / name).exists() or (theirs / name).exists(), LOGS):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory) -> Path:
    "A run of one process that nobody disturbed, with readers of its own."
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(shapes, folder, "--batch_size", 8, "--num_workers", 1), folder=folder)
    return folder


@pytest.mark.parametrize(
    ("number", "lines", "code", "file"),
    [
        pytest.param(signal.SIGTERM, 12, REQUEUE, CHECKPOINT, id="SIGTERM in an epoch of DETR"),
        pytest.param(signal.SIGUSR1, 4, REQUEUE, BACKBONE, marks=pytest.mark.slow, id="SIGUSR1 in the first stage"),
        pytest.param(signal.SIGKILL, 4, -signal.SIGKILL, BACKBONE, id="SIGKILL in the first stage"),
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_end_bit_for_bit(number, lines, code, file, alone, shapes, tmp_path):
    "The backbone takes eight steps, DETR eight in each of two epochs. Who is asked saves, and the exit code says so."
    folder, arguments = tmp_path / "run", ["--batch_size", 8, "--num_workers", 1]
    process = start(shapes, folder, *arguments)
    wait_for_steps(process, folder, lines)
    assert end(process, number) == code, (tmp_path / "run.out").read_text()[-3000:]
    assert torch.load(folder / file, weights_only=True)["step"] > 0
    assert (folder / CHECKPOINT).exists() == (file == CHECKPOINT)
    said = finish(start(shapes, folder, *arguments), folder=folder)
    assert said.count("going on at batch") == 1
    same_runs(folder, alone)


def test_averaged_weights_and_looks_go_on_bit_for_bit(shapes, tmp_path):
    """Sixteen epochs of 32 images, evaluated when it is over. The plan has five looks between, at steps 10, 21, 32, 42
    and 53; the run is asked to stop after the second, and goes on from the save before the third."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    more = ["--batch_size", 8, "--num_workers", 0, "--limit_train", 32, "--ema", "0.9", "--pretrain_epochs", 0]
    more += ["--epochs", 16, "--eval_every", 0]
    finish(start(shapes, whole, *more), folder=whole)
    process = start(shapes, folder, *more)
    wait_for_steps(process, folder, 25)
    assert end(process, signal.SIGTERM) == REQUEUE, (tmp_path / "run.out").read_text()[-3000:]
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] < 64
    finish(start(shapes, folder, *more), folder=folder)
    same_runs(folder, whole)
    looks = [json.loads(line) for line in (whole / "looks.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [10, 21, 32, 42, 53] and {look["images"] for look in looks} == {8}
    state = torch.load(whole / CHECKPOINT, weights_only=True)
    assert state["ema_steps"] == state["step"] == 64
    assert not all(torch.equal(x, state["model"][name]) for name, x in state["ema"].items())


HELD_EVALUATION = """
import os, sys, time
from detr_nb import train
evaluate = train.evaluate
def evaluate_held(model, batches, *others):
    def held():
        for batch in batches:
            yield batch
            print("a batch on rank", os.environ["RANK"], flush=True)
            while not os.path.exists(os.environ["GO"]):
                time.sleep(0.01)
    return evaluate(model, held(), *others)
train.evaluate = evaluate_held
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(0,), (0, 1)], ids=["rank 0", "both"])
def test_an_evaluation_ends_between_two_batches_and_is_done_again(asked, shapes, tmp_path):
    "Of two processes, each with two batches of two images; they wait after the first until the signal was sent."
    folder, program, go = tmp_path / "run", tmp_path / "slow.py", tmp_path / "go"
    program.write_text(HELD_EVALUATION)
    few = ["--batch_size", "2", "--epochs", "1", "--limit_train", "8"]
    processes = start_pair(shapes, folder, *few, program=[program], GO=go)
    said = folder.with_name("run.out")
    wait_until(lambda: all(f"a batch on rank {rank}" in said.read_text() for rank in (0, 1)), processes[0])
    for rank in asked:
        processes[rank].send_signal(signal.SIGUSR1)
    go.touch()
    assert [process.wait(timeout=PATIENCE_S) for process in processes] == [REQUEUE] * 2, said.read_text()
    for rank in (0, 1):  # who is not asked comes to its own end
        assert said.read_text().count(f"a batch on rank {rank}") == (1 if rank in asked else 2)
    assert not (folder / "log.txt").exists()
    finish(*start_pair(shapes, folder, *few), folder=folder)
    finish(*start_pair(shapes, tmp_path / "undisturbed", *few), folder=tmp_path / "undisturbed")
    same_runs(folder, tmp_path / "undisturbed")


def children_of(parent: subprocess.Popen) -> list[int]:
    "The numbers of the processes that a process has started."
    return [int(word) for word in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


def is_running(number: int) -> bool:
    "Whether there is such a process; one that has ended and that nobody has asked about does not count."
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *MODULE]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/one_cpu.yaml", *MODULE]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found with Linux's /proc")
@pytest.mark.parametrize(
    ("program", "number", "arguments"),
    [
        pytest.param(TORCHRUN, signal.SIGKILL, PAIR, id="torchrun is killed"),
        pytest.param(TORCHRUN, signal.SIGUSR1, PAIR, id="torchrun gets SIGUSR1", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGTERM, ["--batch_size", 8, "--epochs", 3], id="accelerate gets SIGTERM"),
    ],
)
def test_whose_launcher_ends_saves_and_ends_too(program, number, arguments, shapes, tmp_path):
    "The signal comes to the launcher alone, which does not pass it on."
    folder = tmp_path / "run"
    launcher = start(shapes, folder, *arguments, program=program)
    wait_for_steps(launcher, folder, 3)
    orphans = children_of(launcher)
    launcher.send_signal(number)
    launcher.wait(timeout=PATIENCE_S)
    wait_until(lambda: not any(map(is_running, orphans)))
    said = folder.with_name("run.out").read_text()
    assert said.count("asked to stop: saved after batch") == 1, said
    assert len(orphans) == (2 if program is TORCHRUN else 1)


def test_a_folder_that_a_run_writes_to_is_refused_to_another(shapes, tmp_path):
    folder = tmp_path / "run"
    config = Config(run=RunConfig(output_dir=str(folder)))
    process = start(shapes, folder, "--batch_size", 8)
    wait_for_steps(process, folder, 1)
    process.send_signal(signal.SIGSTOP)  # it goes on, and is not about to end
    before = (folder / "steps.jsonl").read_bytes()
    try:
        with pytest.raises(UserError, match="run belongs to a run that is going on"):
            open_run(config, patience_s=0.1)
        assert (folder / "steps.jsonl").read_bytes() == before
    finally:
        process.kill()
        process.wait()
    _, lock = open_run(config, patience_s=PATIENCE_S)  # whose loader processes notice that they are alone
    lock.release()
    assert (folder / "older-1/steps.jsonl").read_bytes() == before


def test_the_one_before_is_used_when_the_newest_is_torn(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    newest = folder / CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = finish(start(shapes, folder, "--batch_size", 8, "--num_workers", 1), folder=folder)
    assert "going on from previous.pth" in said and str(newest) in said
    same_runs(folder, alone)


def test_a_full_disk_does_not_end_the_run_and_leaves_the_checkpoint_there_was(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    before = (folder / CHECKPOINT).read_bytes()
    limited = ["bash", "-c", 'ulimit -f 1500; exec "$@"', "bash"]  # files of 1.5 MB at most; a checkpoint is larger
    command = [*limited, sys.executable, "-m", "detr_nb.train", "--shapes_path", shapes, "--output_dir", folder]
    # no readers: they would need larger files as well
    command = list(map(str, [*command, *SMALL, "--batch_size", 8, "--epochs", 3, "--num_workers", 0]))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "was not written" in result.stdout and "The run goes on" in result.stdout
    assert (folder / CHECKPOINT).read_bytes() == before and not list(folder.glob("*.part"))
    assert len((folder / "log.txt").read_text().splitlines()) == 3


def test_a_resumed_run_takes_the_new_rate_and_says_so(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    (folder / CHECKPOINT).unlink()
    shutil.copy(folder / PREVIOUS, folder / CHECKPOINT)  # saved before the last epoch's evaluation
    changed = ["--lr", "1e-5", "--epochs", "3"]
    said = finish(start(shapes, folder, "--batch_size", 8, "--num_workers", 0, *changed), folder=folder)
    assert "--lr was 0.0005" in said and "is 1e-05 now" in said and "--epochs was 2" in said
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    assert {group["base_lr"] for group in state["optimizer"]["param_groups"] if not group["muon"]} == {1e-5, 5e-4}


def test_a_new_run_sets_the_older_one_in_its_folder_aside(alone, shapes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    said = finish(start(shapes, folder, "--batch_size", 8, "--resume", "", "--fast_dev_run"), folder=folder)
    assert "held another run" in said
    assert (folder / "older-1/log.txt").read_bytes() == (alone / "log.txt").read_bytes()
    assert len((folder / "log.txt").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def pair(shapes, tmp_path_factory) -> Path:
    "A run of two processes that nobody disturbed."
    folder = tmp_path_factory.mktemp("pair") / "run"
    finish(*start_pair(shapes, folder), folder=folder)
    return folder


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(pair, shapes, tmp_path):
    """Five at any moment after a step, five while a checkpoint is being written, whose half is left there. Every other
    time one process alone is killed, and the other ends by itself."""
    folder, rng = tmp_path / "run", random.Random(0)
    newest, part = (folder / BACKBONE, folder / CHECKPOINT), folder / f"{CHECKPOINT}.part"
    while_saving = 0
    for kill in range(10):
        began, anywhere = time.time(), kill < 5
        processes = start_pair(shapes, folder, "--save_every", 1)
        wait_for_newer(processes[0], began, *(newest if anywhere else [part]))
        time.sleep(rng.random() * (0.3 if anywhere else 0.002))
        assert [process.poll() for process in processes] == [None, None], "the run ended by itself"
        doomed = processes if kill % 2 == 0 else [processes[rng.randrange(2)]]
        for process in doomed:
            process.kill()
        while_saving += part.exists() and part.stat().st_mtime > began
        assert all(process.wait(timeout=PATIENCE_S) for process in processes)
    said = finish(*start_pair(shapes, folder), folder=folder)
    assert while_saving >= 3 and said.count("going on at batch") == 10
    same_runs(folder, pair)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found with Linux's /proc")
def test_torchrun_starts_a_fallen_run_again(pair, shapes, tmp_path):
    folder, began = tmp_path / "run", time.time()
    launcher = start(shapes, folder, *PAIR, "--save_every", 1, program=[*TORCHRUN[:-2], "--max_restarts=2", *MODULE])
    wait_for_newer(launcher, began, folder / CHECKPOINT)
    os.kill(children_of(launcher)[1], signal.SIGKILL)
    said = finish(launcher, folder=folder)
    assert said.count("going on at batch") == 1
    same_runs(folder, pair)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(pair, shapes, tmp_path):
    folder = tmp_path / "run"
    processes = start_pair(shapes, folder)
    wait_for_steps(processes[0], folder, 12)
    for process in processes:
        end(process, signal.SIGKILL)
    said = finish(start(shapes, folder, *PAIR), folder=folder)
    assert "resumed on 1 processes, saved on 2" in said and "batches of 8 images were saved, they have 4 now" in said
    ours, theirs = (json.loads((run / "log.txt").read_text().splitlines()[-1]) for run in (folder, pair))
    assert ours["epoch"] == theirs["epoch"] and abs(ours["train_loss"] - theirs["train_loss"]) < theirs["train_loss"]
