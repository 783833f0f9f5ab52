"""Bring chapters up to date: sync the percent script, export the module, execute, clean.

    python tools/chapter.py 02_boxes 03_plots        # all steps
    python tools/chapter.py --export-only 02_boxes   # sync and export, do not execute
    python tools/chapter.py --flags slow -- 36_train # also run the cells marked `#| slow`

Cells whose flag is not named keep the outputs they were saved with. `slow` cells read runs that `make test-slow`
trains; `external` ones need images that are not part of the project.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}

from execnb.nbio import read_nb, write_nb  # noqa: E402
from execnb.shell import CaptureShell  # noqa: E402
from nbdev.clean import nbdev_clean  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.export import nb_export  # noqa: E402
from nbdev.process import extract_directives  # noqa: E402


def sync(name: str) -> None:
    "Bring `nbs/NAME.ipynb` and `nbs/_py/NAME.py` to the newer of the two."
    notebook, script = ROOT / f"nbs/{name}.ipynb", ROOT / f"nbs/_py/{name}.py"
    if not notebook.exists() and not script.exists():
        raise SystemExit(f"no chapter {name}: neither {notebook} nor {script} exists")
    first = ["--to", "ipynb", "--output", str(notebook), str(script)] if not notebook.exists() else None
    jupytext = [sys.executable, "-m", "jupytext", "--quiet"]
    if first:
        subprocess.run(jupytext + first, check=True)
    subprocess.run(jupytext + ["--sync", str(script if script.exists() else notebook)], check=True)


def name_kernel(path: Path) -> None:
    "Name the notebook's kernel, so that Jupyter does not ask and the book knows the language."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if notebook["metadata"].get("kernelspec") != KERNEL:
        notebook["metadata"]["kernelspec"] = KERNEL
        path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def execute(path: Path, flags: tuple[str, ...]) -> None:
    "Run a notebook in place; a cell with a flag that is not in `flags` is left as it was saved."
    skipped = set(get_config().tst_flags.split()) - set(flags)
    notebook, shell = read_nb(path), CaptureShell(path)

    def skip(cell) -> bool:
        if cell.cell_type != "code":
            return True
        directives = extract_directives(cell, remove=False)
        return bool(skipped & directives.keys()) or directives.get("eval:", [""])[0].lower() == "false"

    for cell in notebook.cells:
        if not skip(cell):  # execnb leaves the old outputs of a cell that shows nothing now
            cell.outputs = []
    os.chdir(path.parent)
    try:
        shell.run_all(notebook, exc_stop=True, preproc=skip)
    except Exception:
        sys.exit(shell.prettytb(fname=path))
    finally:
        os.chdir(ROOT)
    write_nb(notebook, path)


def bring_up_to_date(name: str, flags: tuple[str, ...], export_only: bool) -> None:
    "All steps for one chapter."
    path, start = ROOT / f"nbs/{name}.ipynb", time.perf_counter()
    sync(name)
    nb_export(path)
    if not export_only:
        execute(path, flags)
    name_kernel(path)
    nbdev_clean(fname=path)
    sync(name)
    print(f"{path.relative_to(ROOT)}: {'exported' if export_only else 'exported and executed'}"
          f" in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="+", help="notebook names, with or without the folder and the ending")
    parser.add_argument("--flags", nargs="*", default=(), help="also run cells with these flags (slow, external)")
    parser.add_argument("--export-only", action="store_true", help="do not execute")
    args = parser.parse_args()
    names = [Path(name).stem for name in args.chapters]
    for name in names:
        if len(names) == 1:
            bring_up_to_date(name, tuple(args.flags), args.export_only)
        else:  # each in a process of its own, as a reader would run it
            options = ["--export-only"] * args.export_only + ["--flags", *args.flags] * bool(args.flags)
            if subprocess.run([sys.executable, __file__, name, *options]).returncode:
                sys.exit(f"{name} failed; the chapters after it were left alone")


if __name__ == "__main__":
    main()
