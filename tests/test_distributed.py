"""Real processes, started the ways that a user starts them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import child
import pytest
import torch
from book_demos import spawn
from child import Child
from torch.utils.data import DataLoader

from detr_nb.distributed import (
    Launch,
    Process,
    UserError,
    gather_tensors,
    on_main,
    read_launcher,
    set_threads,
    stop,
    user_errors,
)

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file")

REPORT = """
import json, logging, os, sys
from detr_nb.distributed import *

process = start("cpu", timeout_s=60)
again = start("cpu")
threads = set_threads(process.local_world_size)
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="LOGGED %(message)s")
get_logger("test").info("once")
summed = reduce_sum({"b": 1.5, "a": process.rank + 1})
report = {"process": [process.rank, process.world_size, process.local_rank, process.launcher],
          "again": again == process, "summed": summed, "mean": reduce_mean(process.rank),
          "gathered": gather_objects({"rank": process.rank})}
if "accelerate" in sys.argv:
    from accelerate import Accelerator
    import torch
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    report["accelerate"] = [accelerator.process_index, accelerator.num_processes, accelerator.local_process_index,
                            type(model).__name__, accelerator.device.type]
    report["threads"] = [threads, torch.get_num_threads()]
barrier()
stop()
# one write of one line: the processes share the pipe
os.write(1, (json.dumps(report) + chr(10)).encode())
"""


def clean_environ(**more: str) -> dict[str, str]:
    "The environment without any launcher's variables, nor a wish for threads, and a path to the package."
    kept = child.clean_environ(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    kept.pop("OMP_NUM_THREADS", None)
    return kept | more


def slurm_environ(rank: int, tasks: int, job: int, **more: str) -> dict[str, str]:
    "What srun gives to one task of a step on one host."
    given = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0}
    given |= {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks}
    given |= {"SLURM_STEP_NODELIST": "node07", "SLURM_JOB_NODELIST": "node07"}
    return clean_environ(**{name: str(value) for name, value in given.items()}, **more)


def open_process(environ: dict[str, str], *command: str) -> subprocess.Popen | Child:
    "A process whose output we read; the caller waits for it. A launcher's is a new Python."
    if command[0] != "-m":
        return Child(command, environ)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environ, **pipes)


def check_reports(reports: list[dict], launcher: str) -> None:
    "Two processes that knew who they are, and agreed on what they computed together."
    assert [report["process"] for report in reports] == [[0, 2, 0, launcher], [1, 2, 1, launcher]]
    for rank, report in enumerate(reports):
        assert report["again"], "a second start must change nothing"
        assert report["summed"] == {"a": 3, "b": 3.0} and report["mean"] == 0.5
        assert report["gathered"] == [{"rank": 0}, {"rank": 1}]
        if "accelerate" in report:
            assert report["accelerate"] == [rank, 2, rank, "DistributedDataParallel", "cpu"]
            assert report["threads"][0] == report["threads"][1], "accelerate must leave our number of threads alone"


# --- who am I, and who is missing


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_processes_are_one_run_and_accelerate_takes_the_group_over(launcher, tmp_path):
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    program = (str(script), "accelerate")
    if launcher == "torchrun":
        processes = [open_process(clean_environ(), *TORCHRUN, *program)]
    else:
        processes = [open_process(slurm_environ(rank, 2, os.getpid()), *program) for rank in range(2)]
    outputs, errors = zip(*(process.communicate(timeout=120) for process in processes))
    assert not any(process.returncode for process in processes), errors
    reports = [json.loads(line) for line in "".join(outputs).splitlines()]
    check_reports(sorted(reports, key=lambda report: report["process"]), launcher)
    assert "".join(errors).count("LOGGED once") == 1, "rank 0 logs, rank 1 does not"


@pytest.mark.parametrize("absent", [1, 0])
def test_who_did_not_come_is_named(absent):
    code = "from detr_nb.distributed import start; start('cpu')"
    environs = [slurm_environ(rank, 3, os.getpid() + 1 + absent, DETR_NB_TIMEOUT_S="3") for rank in range(3)]
    processes = [open_process(environ, "-c", code) for rank, environ in enumerate(environs) if rank != absent]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "waited 3 s at 127.0.0.1:" in errors[0] and f"for rank {absent}, who did not come" in errors[0]


def test_a_slurm_shell_without_srun_is_one_process_and_not_a_hang():
    inside = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[01-02]"}  # salloc
    step = inside | {"SLURM_PROCID": "0"}
    shells = [inside, step | {"SLURM_STEP_NUM_TASKS": "1"}, step | {"ENVIRONMENT": "BATCH"}]
    for environ in [*shells, step | {"SLURM_JOB_NAME": "interactive"}]:
        assert read_launcher(environ) == Launch()
    assert read_launcher(step | {"SLURM_LOCALID": "0", "MASTER_ADDR": "node01"}).world_size == 4  # srun, an old one


def test_slurm_spells_out_where_to_meet_or_the_user_does(tmp_path, monkeypatch):
    environ = slurm_environ(3, 4, 7) | {"SLURM_STEP_NODELIST": "node[01-02]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        read_launcher(environ)
    assert read_launcher(environ | {"MASTER_ADDR": "here"}).master_address == "here"
    answer = "echo node01; echo node02"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n[ \"$*\" = 'show hostnames node[01-02]' ] && {answer}\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert read_launcher(environ).master_address == "node01"


# --- threads


ONE_BY_ACCELERATE = (*ACCELERATE, str(ROOT / "configs/accelerate/one_cpu.yaml"))


@pytest.mark.parametrize(
    ("launcher", "wish"),
    [
        (TORCHRUN, None),
        (ONE_BY_ACCELERATE, "1"),
        pytest.param(TORCHRUN, "1", marks=pytest.mark.slow),
        pytest.param(ONE_BY_ACCELERATE, None, marks=pytest.mark.slow),
    ],
)
def test_one_thread_is_a_wish_of_the_user_but_not_of_a_launcher(launcher, wish, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = set_threads()
    stop()
    script = tmp_path / "threads.py"
    script.write_text("from detr_nb.distributed import set_threads\nprint('threads:', set_threads())")
    environ = clean_environ(**({"OMP_NUM_THREADS": wish} if wish else {}))
    output, errors = open_process(environ, *launcher, str(script)).communicate(timeout=120)
    assert set(output.split("threads:")[1:]) == {f" {wish or cores}\n"}, errors


# --- what a user can mend


class Damaged(torch.utils.data.Dataset):
    "For the test below: data that cannot be read."

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


class DataError(UserError):
    "An error as other chapters have it."


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_user_can_mend_is_said_without_a_traceback(num_workers):
    with pytest.raises(SystemExit) as end, user_errors():
        list(DataLoader(Damaged(DataError("7.jpg: cut off")), num_workers=num_workers))
    assert end.value.code == "DataError: 7.jpg: cut off"
    with pytest.raises(DataError), user_errors(verbose=True):
        list(DataLoader(Damaged(DataError("7.jpg: cut off")), num_workers=num_workers))
    with pytest.raises(ValueError, match="a bug"), user_errors():
        list(DataLoader(Damaged(ValueError("a bug")), num_workers=num_workers))


FALL = """
import os, sys, time
from torch.distributed.elastic.multiprocessing.errors import record
from detr_nb.distributed import UserError, barrier, start, user_errors

@record
def main():
    with user_errors():
        process = start("cpu")
        barrier()
        if process.rank in RANKS:
            ERROR
        time.sleep(600)

main()
"""


def test_the_same_fault_on_all_ranks_is_said_once():
    program = FALL.replace("RANKS", "(0, 1)").replace("ERROR", "raise UserError('no such folder: data')")
    processes = [open_process(slurm_environ(rank, 2, os.getpid() + 5), "-c", program) for rank in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert said.count("UserError: no such folder: data") == 1 and "Traceback" not in said


BY_ACCELERATE = (*ACCELERATE, str(ROOT / "configs/accelerate/two_cpu.yaml"))


@pytest.mark.parametrize(
    ("launcher", "error"),
    [
        pytest.param(TORCHRUN, "raise KeyError('a label')", marks=pytest.mark.slow),
        (TORCHRUN, "raise UserError('no folder')"),
        pytest.param(TORCHRUN, "os.kill(os.getpid(), 9)", marks=pytest.mark.slow),
        (BY_ACCELERATE, "raise KeyError('a label')"),
    ],
)
def test_when_one_falls_the_launcher_ends_the_others_and_names_it(launcher, error, tmp_path):
    script = tmp_path / "fall.py"
    script.write_text(FALL.replace("RANKS", "(1,)").replace("ERROR", error))
    process = open_process(clean_environ(), *launcher, str(script))
    _, said = process.communicate(timeout=100)  # rank 0 would sleep for ten minutes
    assert process.returncode == 1
    root_cause = said.split("Root Cause")[1]
    assert "(local_rank: 1)" in root_cause and "(local_rank: 0)" not in root_cause
    if "KeyError" in error:
        assert "KeyError: 'a label'" in said.split("Root Cause")[0] and "KeyError: 'a label'" in root_cause
    elif "UserError" in error:
        assert said.count("UserError: no folder") == 1
    else:
        assert "SIGKILL" in root_cause


# --- together


def fail_on_one(process):
    "For the test below: rank 1 fails while rank 0 waits for it."
    if process.rank == 1:
        raise KeyError("a label that nobody knows")
    torch.distributed.barrier()


def test_a_failure_on_one_rank_ends_all_and_is_shown_with_its_traceback():
    with pytest.raises(Exception, match=r"Process 1 terminated(.|\n)*fail_on_one(.|\n)*a label that nobody knows"):
        spawn(fail_on_one, 2, timeout_s=90)


def wait_long(process):
    "For the test below: once both have met, rank 0 is done, rank 1 hangs."
    torch.distributed.barrier()
    time.sleep(600 * process.rank)


def test_a_process_that_hangs_is_named_and_ended():
    with pytest.raises(TimeoutError, match=r"ranks \[(0, )?1\]"):
        spawn(wait_long, 2, timeout_s=8)


class Stubborn(Exception):
    "For the test below: an error that cannot be unpickled."

    def __init__(self, text: str, number: int):
        super().__init__(text)


def raise_stubborn() -> None:
    raise Stubborn("on rank zero", 7)


def gather_many(process: Process) -> dict:
    "For the test below: tensors of several types and lengths, and an error of rank 0."
    rank, kinds = process.rank, (torch.float32, torch.int64, torch.uint8, torch.float64, torch.bool)
    found = {"rows": [gather_tensors(torch.full((2 * rank, 3), rank).to(kind)) for kind in kinds]}
    found["flat"] = gather_tensors(torch.arange(3 - rank))
    found["nothing"] = gather_tensors(torch.zeros(0, 6))
    try:
        on_main(raise_stubborn)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["after"] = on_main(lambda: {"scores": torch.ones(2)})["scores"].tolist()
    return found


def test_tensors_of_any_length_are_gathered_and_errors_of_rank_zero_reach_all():
    results = spawn(gather_many, 3)
    for result in results:
        for kind, parts in zip((torch.float32, torch.int64, torch.uint8, torch.float64, torch.bool), result["rows"]):
            assert [tuple(part.shape) for part in parts] == [(0, 3), (2, 3), (4, 3)]
            for rank, part in enumerate(parts):
                assert part.dtype == kind and (part == torch.tensor(rank).to(kind)).all()
        assert [part.tolist() for part in result["flat"]] == [[0, 1, 2], [0, 1], [0]]
        assert [tuple(part.shape) for part in result["nothing"]] == [(0, 6)] * 3
        assert "on rank zero" in result["error"] and result["after"] == [1.0, 1.0]
    assert results[0]["error"].startswith("Stubborn") and results[1]["error"].startswith("RuntimeError: Stubborn")


def git(folder: Path, *arguments: str) -> str:
    "Run git as somebody, in a folder."
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_version_is_that_of_the_code_and_not_of_the_folder_one_stands_in(tmp_path):
    source = Path(__file__).resolve().parent.parent / "detr_nb"
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    for folder in (code, elsewhere):
        folder.mkdir()
        (folder / "file.txt").write_text(folder.name)
        git(folder, "init", "--quiet")
        if folder == code:
            shutil.copytree(source, code / "detr_nb", ignore=shutil.ignore_patterns("__pycache__"))
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", "first")

    def version(environ: dict) -> str:
        program = "import detr_nb.config; print(detr_nb.config.code_version())"
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=elsewhere, env=environ, check=True, capture_output=True, text=True).stdout

    environ = clean_environ() | {"PYTHONPATH": str(code)}
    assert version(environ | {"GIT_DIR": str(elsewhere / ".git")}).strip() == git(code, "rev-parse", "HEAD")
    (code / "file.txt").write_text("changed")
    assert version(environ).strip() == git(code, "rev-parse", "HEAD") + "-dirty"
    (elsewhere / ".gitignore").write_text("venv\n")
    shutil.copytree(source, elsewhere / "venv" / "detr_nb", ignore=shutil.ignore_patterns("__pycache__"))
    installed = version(environ | {"PYTHONPATH": str(elsewhere / "venv")}).strip()
    assert git(elsewhere, "rev-parse", "HEAD") not in installed, "an installed copy is not a part of that repository"
