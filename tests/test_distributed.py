"""Real processes, started the ways that a user starts them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detr_nb.distributed import Launch, Process, read_launcher, spawn, start

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
    "The environment without any launcher's variables, and a path to the package."
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("SLURM_", "ACCELERATE_"))}
    root = Path(__file__).resolve().parent.parent
    return kept | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""} | more


def slurm_environ(rank: int, tasks: int, job: int, **more: str) -> dict[str, str]:
    "What srun gives to one task of a step on one host."
    given = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0}
    given |= {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks}
    given |= {"SLURM_STEP_NODELIST": "node07", "SLURM_JOB_NODELIST": "node07"}
    return clean_environ(**{name: str(value) for name, value in given.items()}, **more)


def open_process(environ: dict[str, str], *command: str) -> subprocess.Popen:
    "A process whose output we read; the caller waits for it."
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


def test_torchrun_starts_two_processes_and_accelerate_takes_the_group_over(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), "accelerate")
    process = open_process(clean_environ(), *torchrun)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reports = sorted((json.loads(line) for line in output.splitlines()), key=lambda report: report["process"])
    check_reports(reports, "torchrun")
    assert errors.count("LOGGED once") == 1, "rank 0 logs, rank 1 does not"


def test_slurm_starts_two_processes_and_accelerate_takes_the_group_over(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    processes = [open_process(slurm_environ(rank, 2, os.getpid()), str(script), "accelerate") for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_reports([json.loads(output) for output, _ in outputs], "slurm")
    assert ["LOGGED once" in errors for _, errors in outputs] == [True, False]


@pytest.mark.parametrize(("absent", "seconds"), [(1, 6), (0, 2)])
def test_who_did_not_come_is_named(absent, seconds):
    code = f"from detr_nb.distributed import start; start('cpu', timeout_s={seconds})"
    environs = [slurm_environ(rank, 3, os.getpid() + 1 + absent) for rank in range(3) if rank != absent]
    processes = [open_process(environ, "-c", code) for environ in environs]
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    if absent:
        assert "rank 0 of 3" in outputs[0] and "waited 6 s for rank 1, who did not come" in outputs[0]
    else:
        assert all("found nobody at 127.0.0.1:" in output and "was rank 0 started" in output for output in outputs)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_NTASKS": "4"},  # salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc that opens a step; srun --pty
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # the script given to sbatch
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"},
    ],
)
def test_a_slurm_shell_without_srun_is_one_process_and_not_a_hang(monkeypatch, shell):
    for name in [name for name in os.environ if name not in clean_environ()]:
        monkeypatch.delenv(name)
    for name, value in ({"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[01-02]"} | shell).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    assert start("cpu", timeout_s=30) == Process(0, 1, 0, torch.device("cpu"), "alone")
    assert time.monotonic() - began < 5 and not torch.distributed.is_initialized()


def test_torchrun_inside_slurm_wins():
    environ = slurm_environ(0, 2, 5, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="7")
    assert read_launcher(environ) == Launch(3, 4, 1, 2, "127.0.0.1", 7, "torchrun")


def fail_on_one(process):
    "For the test below: rank 1 fails while rank 0 waits for it."
    if process.rank == 1:
        raise KeyError("a label that nobody knows")
    torch.distributed.barrier()


def test_a_failure_on_one_rank_ends_all_and_is_shown_with_its_traceback():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 failed(.|\n)*fail_on_one(.|\n)*a label that nobody knows"):
        spawn(fail_on_one, 2, timeout_s=90)
    assert time.monotonic() - began < 45, "not by time-out"


@pytest.mark.parametrize("end", ["raise KeyError('a label')", "raise SystemExit(3)"])
def test_without_any_launcher_a_failing_rank_does_not_leave_the_other_waiting(end):
    code = "from detr_nb.distributed import *; process = start('cpu', timeout_s=300)\n"
    codes = [code + "barrier(); barrier()", code + f"barrier(); {end}"]
    processes = [open_process(slurm_environ(rank, 2, os.getpid() + 7), "-c", codes[rank]) for rank in range(2)]
    began = time.monotonic()
    outputs = [process.communicate(timeout=100)[1] for process in processes]
    assert time.monotonic() - began < 60, "not by the time-out of 300 s"
    assert all(process.returncode for process in processes), outputs
    assert "SystemExit" in end or "a label" in outputs[1]


def wait_long(process):
    "For the test below: rank 0 is done, rank 1 hangs."
    time.sleep(600 * process.rank)


def test_a_process_that_hangs_is_named_and_ended():
    with pytest.raises(TimeoutError, match=r"rank (0, )?1"):
        spawn(wait_long, 2, timeout_s=8)


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
        program = "import detr_nb.distributed as d; print(d.code_version())"
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
