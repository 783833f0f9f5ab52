"""Bring chapters up to date: sync the percent script, export the module, execute, clean.

    python tools/chapter.py 02_boxes 03_plots        # all steps
    python tools/chapter.py --export-only 02_boxes   # sync and export, do not execute
    python tools/chapter.py --flags slow -- 36_train # also run the cells marked `#| slow`
    python tools/chapter.py --check                  # run all as tests: what they say must be what is saved

Cells whose flag is not named keep the outputs they were saved with. `slow` cells read runs that `make test-slow`
trains; `external` ones need images that are not part of the project. `--check` writes nothing. It fails where a cell
fails, and where a cell says other words than it has saved, or numbers that another processor does not explain; times
are not compared, nor are numbers of a cell marked `#| varies`, nor anything of one marked `#| varies: all`. Where a
page was run a minute ago and still differs, `--check --mark` marks those cells in which only numbers do.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp()  # for checkpoints that chapters write, gone at the end
Finalize(None, shutil.rmtree, (tempfile.tempdir,), {"ignore_errors": True}, exitpriority=-200)  # after its own folders
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
COLAB = """#| hide
import sys

if "google.colab" in sys.modules:  # fetch the book and install its package; elsewhere both are here
    get_ipython().system("git clone -q --depth 1 -b {branch} {url} /content/book && pip install -q /content/book")
    get_ipython().run_line_magic("cd", "-q /content/book/nbs")"""
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}

import outputs as saved_outputs  # noqa: E402
import yaml  # noqa: E402
from execnb.nbio import read_nb, write_nb  # noqa: E402
from execnb.shell import CaptureShell  # noqa: E402
from nbdev.clean import clean_nb, nbdev_clean  # noqa: E402
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


def set_colab(path: Path) -> None:
    "Begin a notebook with a cell for Colab where `_config.yml` names a repository, and without one where it does not."
    config = yaml.safe_load((ROOT / "nbs/_config.yml").read_text(encoding="utf-8"))
    repository = {"url": None, "branch": "main"} | (config.get("repository") or {})
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["id"] != "colab"]
    if repository["url"]:
        source = COLAB.format(**repository).splitlines(keepends=True)
        cells.insert(0, {"cell_type": "code", "execution_count": None, "id": "colab", "metadata": {}, "outputs": [],
                         "source": source})
    if cells != notebook["cells"]:
        notebook["cells"] = cells
        path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def run(path: Path, flags: tuple[str, ...]):
    "A notebook with what its cells say now; a cell with a flag that is not in `flags` is left as it was saved."
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
    return notebook


def execute(path: Path, flags: tuple[str, ...]) -> None:
    "Run a notebook in place, its pictures no larger than one sees, and note when and with what it was run."
    notebook = run(path, flags)
    saved_outputs.shrink(notebook)
    notebook.metadata["outputs_made"] = saved_outputs.made_with()
    write_nb(notebook, path)


def check(name: str, flags: tuple[str, ...], mark: bool = False) -> tuple[float, list[str]]:
    "Run a notebook and compare what its cells say with what they have saved; seconds, and what is wrong."
    path, start, wrong = ROOT / f"nbs/{name}.ipynb", time.perf_counter(), []
    os.environ["IN_TEST"] = "1"  # as nbdev_test sets it
    sys.path.insert(0, str(ROOT))
    try:
        saved, found = read_nb(path), run(path, flags)
        clean_nb(found)
        for old, new in zip(saved.cells, found.cells):
            marked = extract_directives(old, remove=False) if old.cell_type == "code" else {}
            texts = [saved_outputs.text_of(cell.get("outputs", [])) for cell in (old, new)]
            change = saved_outputs.difference(*texts, numbers="varies" not in marked)
            if change and marked.get("varies:") != ["all"]:
                wrong.append(f"cell {old.id}: {change}")
                if mark and saved_outputs.difference(*texts, numbers=False) is None:
                    old.source = f"#| varies\n{old.source}"
        if mark and wrong:
            write_nb(saved, path)
    except (SystemExit, Exception) as error:
        wrong.append(str(error) if isinstance(error, SystemExit) else traceback.format_exc())
    return time.perf_counter() - start, wrong


def send_check(end, *arguments) -> None:
    "Check in a process of its own."
    end.send(check(*arguments))


def check_all(names: list[str], flags: tuple[str, ...], workers: int, mark: bool) -> None:
    "Check notebooks, `workers` at a time, each in a process of its own."
    import torchvision  # noqa: F401  once, for all of them
    from matplotlib import pyplot  # noqa: F401

    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            answer, end = context.Pipe(duplex=False)
            running[answer] = waiting[0]
            context.Process(target=send_check, args=(end, waiting.pop(0), flags, mark)).start()
            end.close()
        for answer in wait(list(running)):
            name = running.pop(answer)
            try:
                seconds, wrong = answer.recv()
            except EOFError:
                seconds, wrong = 0, ["its process died"]
            print(f"{name}: {seconds:.0f} s" + "".join(f"\n  {what}" for what in wrong), flush=True)
            failed += [name] * bool(wrong)
    if failed:
        sys.exit(f"stale or failing: {' '.join(sorted(failed))}; run tools/chapter.py on them, or mark what varies")


def bring_up_to_date(name: str, flags: tuple[str, ...], export_only: bool) -> None:
    "All steps for one chapter."
    path, start = ROOT / f"nbs/{name}.ipynb", time.perf_counter()
    sync(name)
    nb_export(path)
    if not export_only:
        execute(path, flags)
    name_kernel(path)
    set_colab(path)
    nbdev_clean(fname=path)
    sync(name)
    print(f"{path.relative_to(ROOT)}: {'exported' if export_only else 'exported and executed'}"
          f" in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="notebook names, with or without the folder and the ending")
    parser.add_argument("--flags", nargs="*", default=(), help="also run cells with these flags (slow, external)")
    parser.add_argument("--export-only", action="store_true", help="do not execute")
    parser.add_argument("--check", action="store_true", help="run, compare and write nothing; without names, all")
    parser.add_argument("--mark", action="store_true", help="with --check: mark cells in which only numbers differ")
    parser.add_argument("--shrink", action="store_true", help="only make saved pictures smaller; without names, all")
    parser.add_argument("--colab", action="store_true", help="only put in, or take out, the cell for Colab")
    parser.add_argument("--workers", type=int, default=1, help="notebooks checked at the same time")
    args = parser.parse_args()
    names = [Path(name).stem for name in args.chapters]
    alone = args.check or args.shrink or args.colab
    if not names and not alone:
        parser.error("name a chapter")
    every = names or sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))
    if args.check:
        check_all(every, tuple(args.flags), args.workers, args.mark)
    elif args.shrink:
        for path in (ROOT / f"nbs/{name}.ipynb" for name in every):
            before, notebook = path.stat().st_size, read_nb(path)
            saved_outputs.shrink(notebook)
            write_nb(notebook, path)
            print(f"{path.name}: {before / 1000:.0f} kB, now {path.stat().st_size / 1000:.0f} kB")
    elif args.colab:
        for name in every:
            set_colab(ROOT / f"nbs/{name}.ipynb")
    for name in () if alone else names:
        if len(names) == 1:
            bring_up_to_date(name, tuple(args.flags), args.export_only)
        else:  # each in a process of its own, as a reader would run it
            options = ["--export-only"] * args.export_only + ["--flags", *args.flags] * bool(args.flags)
            if subprocess.run([sys.executable, __file__, name, *options]).returncode:
                sys.exit(f"{name} failed; the chapters after it were left alone")


if __name__ == "__main__":
    main()
