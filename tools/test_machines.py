"""The tests that another machine could fail, in settings that make this one behave like it.

    python tools/test_machines.py            # every setting, minutes each
    python tools/test_machines.py default    # one of them, or several

`default`, `avx2` and `native` are the instructions that torch and oneDNN may use; `threads-1`, `threads-2` and
`threads-4` how many threads share a sum; in `spawn` loader workers are new Pythons, as on macOS and Windows;
`oldest` has the oldest Python, torch and torchvision that we promise, in an environment of its own.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = {"python": "3.10", "torch": "2.11.*", "torchvision": "0.26.*"}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "native": {},
    "threads-1": {"OMP_NUM_THREADS": "1"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
    "threads-4": {"OMP_NUM_THREADS": "4"},
    "spawn": {},
    "oldest": {},
}
SPAWN = "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"


def answers(*command: str) -> str | None:
    "What a command prints; None where it fails or is not there."
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def find_python(version: str) -> str | None:
    "An interpreter of that version: on the path, of uv, or of pyenv."
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [f"python{version}", answers("uv", "python", "find", version)]
    candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))
    for python in filter(None, candidates):
        if (answers(python, "--version") or "").startswith(f"Python {version}."):
            return python
    return None


def make_oldest() -> str:
    "The environment of the oldest versions, made from pyproject.toml unless it is there; returns its Python."
    folder = ROOT / ".venv-oldest"
    done, own = folder / ".installed", folder / "bin/python"
    wanted = f"{OLDEST}\n{(ROOT / 'pyproject.toml').read_text()}"
    if done.exists() and done.read_text() == wanted:
        return str(own)
    if (python := find_python(OLDEST["python"])) is None:
        raise SystemExit(f"oldest: there is no Python {OLDEST['python']} here, so this setting was NOT tested. "
                         f"Install one, for instance by `uv python install {OLDEST['python']}`")
    print(f"oldest: installing into {folder.name}, with {python}", flush=True)
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pins = [f"{name}=={version}" for name, version in OLDEST.items() if name != "python"]
    pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[test]"], check=True)
    done.write_text(wanted)
    return str(own)


def run(setting: str, arguments: list[str]) -> bool:
    "The sensitive tests in one setting; whether all passed."
    python = make_oldest() if setting == "oldest" else sys.executable
    environ = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"} | os.environ | SETTINGS[setting]
    if not setting.startswith("threads"):  # two processes of one thread each
        arguments = ["-n", "2", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), environ.get("PYTHONPATH", "")]
        if "ONEDNN_MAX_CPU_ISA" in SETTINGS[setting]:  # instructions change sums, not what processes exchange
            arguments = ["-k", "not two_processes", *arguments]
        if setting == "spawn":  # every Python imports it first, those that tests start as well
            Path(folder, "sitecustomize.py").write_text(SPAWN)
            paths.insert(0, folder)
            arguments = ["-k", "not parity", *arguments]  # those have no workers
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        tests = [python, "-m", "pytest", "-q", "-m", "machines and not slow", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(tests, cwd=ROOT, env=environ).returncode == 0


def main() -> None:
    "Run the settings named on the command line, or all; what follows `--` goes to pytest."
    given, _, more = " ".join(sys.argv[1:]).partition("-- ")
    names = given.split() or list(SETTINGS)
    if unknown := set(names) - SETTINGS.keys():
        raise SystemExit(f"no setting {', '.join(sorted(unknown))}: choose from {', '.join(SETTINGS)}")
    report = []
    for name in names:
        print(f"\n== {name}: {' '.join(f'{key}={value}' for key, value in SETTINGS[name].items())}", flush=True)
        began = time.monotonic()
        try:
            passed = "passed" if run(name, more.split()) else "FAILED"
        except SystemExit as missing:
            print(missing, flush=True)
            passed = "NOT TESTED"
        report.append(f"{name:>10}: {passed} in {time.monotonic() - began:.0f} s")
    print("\n" + "\n".join(report))
    sys.exit(not all("passed" in line for line in report))


if __name__ == "__main__":
    main()
