"""Bring chapters up to date: sync the percent script, export the module, execute, clean.

    python tools/chapter.py 02_boxes 03_plots        # all steps
    python tools/chapter.py --export-only 02_boxes   # sync and export, do not execute
    python tools/chapter.py --flags slow -- 18_train # also run the cells marked `#| slow`

Cells whose flag is not named keep the outputs they were saved with.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")

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


def execute(path: Path, flags: tuple[str, ...]) -> None:
    "Run a notebook in place; a cell with a flag that is not in `flags` is left as it was saved."
    skipped = set(get_config().tst_flags.split()) - set(flags)
    notebook, shell = read_nb(path), CaptureShell(path)

    def skip(cell) -> bool:
        if cell.cell_type != "code":
            return True
        directives = extract_directives(cell, remove=False)
        return bool(skipped & directives.keys()) or directives.get("eval:", [""])[0].lower() == "false"

    os.chdir(path.parent)
    try:
        shell.run_all(notebook, exc_stop=True, preproc=skip)
    finally:
        os.chdir(ROOT)
    write_nb(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="+", help="notebook names without the folder and the ending")
    parser.add_argument("--flags", nargs="*", default=(), help="also run cells with these flags (slow, gpu, dist)")
    parser.add_argument("--export-only", action="store_true", help="do not execute")
    args = parser.parse_args()
    for name in args.chapters:
        name = Path(name).stem
        path = ROOT / f"nbs/{name}.ipynb"
        sync(name)
        nb_export(path)
        if not args.export_only:
            execute(path, tuple(args.flags))
        nbdev_clean(fname=path)
        sync(name)


if __name__ == "__main__":
    main()
