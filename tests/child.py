"Programs in processes of their own that need not import torch again: a server has done so, and forks them."
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class Child:
    "What `subprocess.Popen([sys.executable, *command])` gives, as far as tests ask for it; with a session of its own."

    def __init__(
        self,
        command: Sequence[str],  # ("-c", code), ("-m", module, ...) or (script, ...)
        environ: Mapping[str, str],
        output: Path | None = None,  # what the program prints is added to it; None: `communicate` tells
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["detr_nb.train"])
        self.folder = tempfile.TemporaryDirectory()
        self.files = [output, output] if output else [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        task = list(command), dict(environ), [str(path) for path in self.files]
        self.process = context.Process(target=_run, args=task)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        "The exit code, less than zero for a signal; None while the program runs."
        return self.process.exitcode

    def poll(self) -> int | None:
        "The exit code, or None."
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        "Wait for the end; returns the exit code."
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the program", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        "Wait for the end; returns what was printed to standard output and to standard error."
        self.wait(timeout)
        return tuple(path.read_text() for path in self.files)

    def send_signal(self, number: int) -> None:
        "Send a signal to the program alone."
        os.kill(self.pid, number)

    def kill(self) -> None:
        "End the program at once."
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)


def clean_environ(**more: str) -> dict[str, str]:
    "The environment without what a launcher may have left there, and more."
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("SLURM_", "ACCELERATE_"))}
    return kept | more


def pair_environs(**more: str) -> list[dict[str, str]]:
    "What a launcher would tell two processes of one run, in order of rank."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    return [clean_environ(**more, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def _run(command: list[str], environ: dict[str, str], files: list[str]) -> None:
    "Be the program."
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as in any program
    os.environ.clear()
    os.environ.update(environ)
    for number, path in zip((1, 2), files):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
