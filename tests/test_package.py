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

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {path.stem.split("_", 1)[1]: int(path.name[:2]) for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
MODULES = sorted(path.stem for path in (ROOT / "detr_nb").glob("*.py") if not path.stem.startswith("_"))
NOTEBOOK_TOOLS = {"nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupytext", "nbformat", "nbclient"}
every_module = pytest.mark.parametrize("name", MODULES)


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


@every_module
def test_imports_only_from_earlier_chapters(name):
    ours = {module.split(".")[1] for module in imports_of(ROOT / f"detr_nb/{name}.py") if module.startswith("detr_nb.")}
    later = {module for module in ours & NUMBERS.keys() if NUMBERS[module] >= NUMBERS[name]}
    assert not later


@every_module
def test_does_not_import_the_notebook_tools(name):
    assert not {module.split(".")[0] for module in imports_of(ROOT / f"detr_nb/{name}.py")} & NOTEBOOK_TOOLS


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


@every_module
def test_every_exported_name_says_what_it_is(name):
    module = importlib.import_module(f"detr_nb.{name}")
    defined = {key: value for key in module.__all__ if (value := getattr(module, key)) is not None
               and (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__}
    silent = [key for key, value in defined.items() if not has_own_docstring(value)]
    for key, value in defined.items():
        if inspect.isclass(value):
            silent += [f"{key}.{method}" for method, body in vars(value).items()
                       if inspect.isfunction(body) and not method.startswith("_") and method != "forward"
                       and not inspect.getdoc(body)]
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
            if key != "logger":  # each module has its own
                owners.setdefault(key, []).append(name)
    assert not {key: names for key, names in owners.items() if len(names) > 1}


@every_module
def test_does_not_print(name):
    tree = ast.parse((ROOT / f"detr_nb/{name}.py").read_text(encoding="utf-8"))
    calls = [node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not calls, f"lines {calls}: use logging or warnings"


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
