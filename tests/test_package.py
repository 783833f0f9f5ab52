"""What must hold for the package as a whole, and no chapter alone can show."""
import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {path.stem.split("_", 1)[1]: int(path.name[:2]) for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
MODULES = sorted(path.stem for path in (ROOT / "detr_nb").glob("*.py") if not path.stem.startswith("_"))
NOTEBOOK_TOOLS = {"nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupytext", "nbformat", "nbclient"}


def imports_of(path: Path) -> set[str]:
    "Every module that a file imports, ours as `detr_nb.name`."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "detr_nb" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "detr_nb" else {module}
    return found


def test_each_module_has_a_chapter_and_each_chapter_a_module():
    assert MODULES == sorted(NUMBERS)


def test_modules_import_only_from_earlier_chapters_and_no_notebook_tools():
    wrong = []
    for name in MODULES:
        found = imports_of(ROOT / f"detr_nb/{name}.py")
        ours = {module.split(".")[1] for module in found if module.startswith("detr_nb.")}
        wrong += [f"{name} imports {other}" for other in ours & NUMBERS.keys() if NUMBERS[other] >= NUMBERS[name]]
        wrong += [f"{name} imports {tool}" for tool in {module.split(".")[0] for module in found} & NOTEBOOK_TOOLS]
    assert not wrong


def test_no_module_is_longer_than_one_reads_in_one_go():
    counts = {name: len((ROOT / f"detr_nb/{name}.py").read_text(encoding="utf-8").splitlines()) for name in MODULES}
    assert not {name: count for name, count in counts.items() if count > 400}


# 9,000 lines and 300 names held a DETR that trains, scores, predicts and exports. What came since has its own room:
# other backbones and settings chosen for a data set; runs one can watch; data as they come; models that travel; a
# matching cost of fewer passes over memory. After DETR: six modules of at most 250 lines, 680 together, the seams that
# they need, and norms that are folded into their convolutions.
# Conditional DETR and DAB-DETR in transformers' layout, there and back, 91 lines: their names, and what has none there.
# Several answers for an object in all layers but the last, and what the worse ones count, 79.
# Denoising, and its seams, 200. Deformable attention and its DETR, and their seams, 389.
# A lesson of the backbone that asks for boxes and whole objects too, 34; check pictures that one can read, 8.
# The same lesson for the proposals of a detector that has some, 46, and queries that begin with what those saw, 9.
# Images that begin small and a rate that stays, 33; rows of all heads that have one for each class, 4; scoring, 4.
LINES, NAMES = 9000 + 1480 + 825 + 91 + 79 + 200 + 389 + 34 + 8 + 46 + 9 + 41, 300 + 35 + 26 + 3 + 3 + 9 + 11


def test_the_package_has_no_more_lines_than_what_it_can_do_was_given():
    paths = [path for path in (ROOT / "detr_nb").glob("*.py") if path.name != "_modidx.py"]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= LINES


def test_the_package_has_no_more_public_names_than_it_was_given():
    counts = {name: len(importlib.import_module(f"detr_nb.{name}").__all__) for name in MODULES}
    assert sum(counts.values()) <= NAMES, counts


def test_imports_where_the_notebook_tools_are_missing():
    "Also what the dependencies import in turn must not need them; an exported `main()` must not run on import."
    program = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(NOTEBOOK_TOOLS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in {MODULES}:
    importlib.import_module("detr_nb." + name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "importing the package prints"


def run_python(program: str) -> None:
    "Run a program of its own, which must end well."
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_imports_where_there_is_no_unix():
    "Windows has none of these; the libraries know that for themselves, so they are imported first."
    run_python(f"""
import importlib, os, sys
import accelerate, matplotlib.pyplot, psutil, pycocotools.mask, scipy.optimize, torch.utils.tensorboard, tyro
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # from now on, to import it is an error
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
for name in {MODULES}:
    importlib.import_module("detr_nb." + name)
""")


def test_what_loader_workers_import_brings_neither_pyplot_nor_tyro():
    run_python("""
import sys
import detr_nb.batching
assert not {"matplotlib.pyplot", "tyro"} & sys.modules.keys()
""")


def test_every_exported_name_says_what_it_is():
    silent = []
    for name in MODULES:
        module = sys.modules.get(f"detr_nb.{name}") or importlib.import_module(f"detr_nb.{name}")
        for key in module.__all__:
            value = getattr(module, key)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__ != module.__name__:
                continue
            silent += [] if has_own_docstring(value) else [f"{name}.{key}"]
            methods = vars(value).items() if inspect.isclass(value) else ()
            silent += [f"{name}.{key}.{method}" for method, body in methods if inspect.isfunction(body)
                       and not method.startswith("_") and method != "forward" and not inspect.getdoc(body)]
    assert not silent


def has_own_docstring(value) -> bool:
    "A docstring written for it; `dataclass` and `NamedTuple` put in a generated one, the signature."
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    return bool(doc) and not doc.startswith(f"{value.__name__}(")


def test_a_name_is_exported_by_one_module_only():
    owners = {}
    for name in MODULES:
        module = importlib.import_module(f"detr_nb.{name}")
        for key in module.__all__:
            if key != "main":  # each command has its own
                owners.setdefault(key, []).append(name)
    shared = {key: names for key, names in owners.items() if len(names) > 1}
    assert shared.pop("evaluate", []) in ([], ["detector", "evaluation"])  # of a detector's folder or a model's batches
    assert not shared


def test_no_module_prints():
    calls = [f"{name}, line {node.lineno}" for name in MODULES
             for node in ast.walk(ast.parse((ROOT / f"detr_nb/{name}.py").read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not calls, "use logging or warnings"


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder, pattern in (("nbs", "*.ipynb"), ("detr_nb", "__init__.py")):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob(pattern):
            shutil.copy(path, tmp_path / folder)
    program = "from nbdev.doclinks import nbdev_export; nbdev_export(procs=[])"
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
    text = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "detr_nb").glob("[!_]*.py")}
    assert sorted(text) == [f"{name}.py" for name in MODULES]
    differing = [name for name in text if text[name] != (ROOT / "detr_nb" / name).read_text(encoding="utf-8")]
    assert not differing, "run `make export`, and commit the modules with their notebooks"


def test_the_versions_agree():
    written = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert importlib.import_module("detr_nb").__version__ == written


def test_the_pins_name_no_address():
    assert not re.search(r"://|file:|^-|@", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
