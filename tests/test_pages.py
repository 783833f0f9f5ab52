"""What is written about the package must be true of it: legend, reference, differences, saved outputs.

The built pages themselves are looked at in test_book.py.
"""
import ast
import csv
import importlib
import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_nb.batching import Targets
from detr_nb.detr import Predictions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book_reference  # noqa: E402
import outputs  # noqa: E402

MODULES = sorted(path.stem for path in (ROOT / "detr_nb").glob("[!_]*.py"))
LEGEND = (ROOT / "nbs/legend.md").read_text(encoding="utf-8")


def shape_letters(annotation: str) -> set[str]:
    "The letters in the shapes of an annotation; words of two small letters or more say what they count."
    shapes = re.findall(r"\[[\w.]+, ['\"]([^'\"]*)['\"]\]", annotation)
    words = [word for shape in shapes for token in shape.split() for word in re.findall(r"[A-Za-z_]+", token)]
    return {letter for word in words if len(word) == 1 or word.isupper() for letter in word}


def exported_letters() -> set[str]:
    found = set()
    for name in MODULES:
        tree = ast.parse((ROOT / f"detr_nb/{name}.py").read_text(encoding="utf-8"))
        public = set(importlib.import_module(f"detr_nb.{name}").__all__)
        for node in tree.body:
            if getattr(node, "name", None) in public:
                annotations = [part.annotation for part in ast.walk(node) if isinstance(part, ast.arg | ast.AnnAssign)]
                annotations += [part.returns for part in ast.walk(node) if isinstance(part, ast.FunctionDef)]
                found |= {letter for part in filter(None, annotations) for letter in shape_letters(ast.unparse(part))}
    return found


def test_every_letter_of_an_exported_shape_is_in_the_legend_and_the_legend_has_no_other():
    table = LEGEND.split("## Letters of shapes")[1].split("## Symbols")[0]
    legend = {letter for cells in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
              for letter in re.findall("`(.)`", cells)}
    used = exported_letters()
    assert used >= {"B", "Q", "L", "D"}, "no annotations were read"
    assert used - legend == set(), "these letters are in no line of nbs/legend.md"
    assert legend - used == set(), "nbs/legend.md explains letters that no exported shape has"


def test_each_word_of_the_glossary_links_to_a_chapter_that_uses_it():
    entries = re.findall(r"^(\w[^\n]*)\n  (.+)$", LEGEND.split("```{glossary}")[1].split("```")[0], re.MULTILINE)
    assert len(entries) >= 35 and [word for word, _ in entries] == sorted((word for word, _ in entries), key=str.lower)
    wrong = []
    for word, text in entries:
        links = re.findall(r"\[Chapter (\d\d)\]\((\S+?)\.ipynb\)", text)
        path = ROOT / f"nbs/{links[0][1]}.ipynb" if len(links) == 1 else None
        if path is None or not path.exists() or not path.name.startswith(links[0][0]):
            wrong.append(f"{word}: {links}")
            continue
        prose = " ".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                         if cell["cell_type"] == "markdown").lower()
        stem = re.sub(r"(ing|ic|ed|y)$", "", word.lower().split()[0])
        wrong += [f"{word}: {path.name} does not use it"] * (stem not in prose)
    assert not wrong


def test_the_page_of_differences_has_every_row_of_every_chapters_table():
    page = book_reference.differences()
    rows = 0
    for name, (title, prose) in book_reference.chapters().items():
        inside = False
        for line in "\n".join(prose).splitlines():
            if re.match("##? ", line):
                inside = bool(re.match("## Where .*differ", line))
            if inside and line.startswith("| "):
                rows += 1
                assert line in page, f"{name}: {line}"
                assert f"## {title}\n" in page
    assert rows > 100
    departures = list(csv.reader((ROOT / "nbs/parity_departures.csv").open(encoding="utf-8", newline="")))
    assert len(departures) > 5 and "parity_departures.csv" in (ROOT / "nbs/parity.md").read_text(encoding="utf-8")


def test_a_chapter_that_says_where_it_differs_says_it_under_a_heading_that_the_page_finds():
    for name, (_, prose) in book_reference.chapters().items():
        headings = re.findall(r"^#+ .*\bdiffers?\b.*", "\n".join(prose), re.MULTILINE)
        assert all(re.match(r"## Where ", heading) for heading in headings), name


def test_the_reference_describes_every_public_name_with_its_shapes_and_units():
    text = book_reference.reference()
    silent = [f"{name}.{key}" for name in MODULES for key in importlib.import_module(f"detr_nb.{name}").__all__
              if not re.search(rf"\}} detr_nb\.{name}\.{key}\b", text)]
    assert not silent
    start = text.index("{py:function} detr_nb.boxes.box_iou(")
    entry = text[start:text.index("```\n", start)]
    assert "(a: Float[Tensor, '*batch N 4'], b: Float[Tensor, '*batch M 4']) -> Float[Tensor, '*batch N M']" in entry
    assert ":param a: xyxy, any unit" in entry and ":param b: xyxy, the unit of `a`" in entry
    assert ":returns: in [0, 1]" in entry and "Intersection over union" in entry


def test_a_comment_belongs_to_the_last_parameter_of_its_line_and_self_is_not_passed(tmp_path):
    (tmp_path / "made.py").write_text('''
__all__ = ["Thing", "LIMIT"]
LIMIT = 5  # pixels
class Thing:
    "A thing."
    def __init__(self, a: int, b: int = 2,  # cells
                 *, c: float = 1.0,  # in (0, 1]
                 ): ...
    def grow(
        self,
        by: int = 1,  # levels
    ) -> "Thing":  # itself
        "Grow."
    def _hidden(self): ...
''')
    entries = dict(book_reference.described(tmp_path / "made.py"))
    assert "detr_nb.made.Thing(a: int, b: int=2, *, c: float=1.0)" in entries["Thing"]
    assert ":param b: cells" in entries["Thing"] and ":param a:" not in entries["Thing"]
    assert ":param c: in (0, 1]" in entries["Thing"] and "_hidden" not in entries["Thing"]
    assert "{py:method} detr_nb.made.Thing.grow(by: int=1) -> Thing" in entries["Thing"]
    assert ":param by: levels" in entries["Thing"] and ":returns: itself" in entries["Thing"]
    assert "pixels" in entries["LIMIT"]


@pytest.mark.parametrize(("saved", "found"), [
    ("AP 0.4351", "AP 0.4352"),  # one in the last digit
    ("loss 12.345678", "loss 12.35"),  # within a thousandth
    ("largest difference 2.9e-08", "largest difference 0"),  # rounding, and none
    ("took 7.1 ms of one core", "took 93 ms of one core"),
    ("300 images in 12 seconds", "300 images in 9 seconds"),
    ("a   1,000\n", "a 1,000"),
    ("tensor([0.1000, 2.0000])", "tensor([0.1000,  2.0000])"),
])
def test_what_another_processor_changes_is_no_difference(saved, found):
    assert outputs.difference(saved, found) is None


@pytest.mark.parametrize(("saved", "found", "named"), [
    ("AP 0.435", "AP 0.438", "0.435, now 0.438"),
    ("128 images", "127 images", "128, now 127"),
    ("difference 2.9e-08", "difference 3e-04", "2.9e-08, now 3e-04"),
    ("it is a disc", "it is a ring", "ring"),
    ("a\nb\n", "a\n", "b"),
    ("", "warning: 3", "warning"),
    ("loss -0.5", "loss 0.5", "-0.5, now 0.5"),
])
def test_what_has_changed_is_named(saved, found, named):
    assert named in outputs.difference(saved, found)


def test_numbers_of_a_marked_cell_may_vary_but_not_its_words():
    assert outputs.difference("AP 0.1 of 3", "AP 0.9 of 4", numbers=False) is None
    assert outputs.difference("AP 0.1", "AR 0.1", numbers=False)


def test_a_picture_is_made_smaller_so_that_nobody_sees_it_and_only_once():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :160]
    photograph = np.stack([x + y // 2, 40 + y, 200 - x], -1) + rng.integers(0, 6, (120, 160, 1))
    photograph[20:40, 30:60] = (200, 30, 40)  # a box in a colour that is rare
    file = io.BytesIO()
    Image.fromarray(photograph.clip(0, 255).astype(np.uint8)).convert("RGBA").save(file, "PNG")
    small = outputs.shrink_picture(file.getvalue())
    assert len(small) < 0.5 * len(file.getvalue()) and outputs.shrink_picture(small) is small
    seen = np.asarray(Image.open(io.BytesIO(small)).convert("RGB"), int)
    assert np.abs(seen - photograph.clip(0, 255)).mean() < 6 and np.abs(seen[25, 40] - (200, 30, 40)).max() <= 8
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(noise, "PNG")
    assert outputs.shrink_picture(noise.getvalue()) == noise.getvalue()  # 256 colours are not enough for it


def test_a_page_says_which_commit_it_is_of_and_what_its_outputs_were_made_with(tmp_path):
    made = outputs.made_with()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"]) and "torch " in made["versions"]
    assert "outputs_made" in (ROOT / "settings.ini").read_text(), "nbdev_clean would take it out"
    said = book_reference.record_of({"metadata": {"outputs_made": made}}, ("abc1234", "2026-01-02"))
    assert "abc1234" in said and made["versions"] in said and made["machine"] in said and made["date"] in said
    assert book_reference.record_of({"metadata": {}}, None) == ""
    assert book_reference.commits(tmp_path) == {}


def notebook(*cells: tuple[str, str]) -> dict:
    "A notebook of code cells with what they have printed."
    return {"cells": [{"cell_type": "code", "execution_count": None, "id": f"cell{i}", "metadata": {}, "source": [code],
                       "outputs": [{"name": "stdout", "output_type": "stream", "text": [text]}] if text else []}
                      for i, (code, text) in enumerate(cells)],
            "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
            "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def project(tmp_path):
    "A copy of the project in which there is no chapter yet; returns a function that writes notebooks and checks them."
    for folder in ("nbs", "tools", "detr_nb"):
        (tmp_path / folder).mkdir()
    for name in ("settings.ini", "pyproject.toml", "tools/chapter.py", "tools/outputs.py", "nbs/_config.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "detr_nb/__init__.py").write_text('__version__ = "0.1.0"\n')

    def check(*options: str, **notebooks: dict) -> subprocess.CompletedProcess:
        for name, content in notebooks.items():
            (tmp_path / f"nbs/{name}.ipynb").write_text(json.dumps(content))
        task = [] if "--colab" in options else ["--check"]
        return subprocess.run([sys.executable, "tools/chapter.py", *task, *options], cwd=tmp_path, timeout=900,
                              capture_output=True, text=True)
    return check


def test_a_page_whose_outputs_are_true_passes_and_a_stale_one_fails(project):
    true = notebook(("print('a', 1 + 1)", "a 2\n"), ("#| slow\nprint(open('no such file').read())", "kept\n"),
                    ("#| varies\nimport os\nprint('process', os.getpid())", "process 1\n"),
                    ("#| varies: all\nprint(os.getpid() % 2 or 'even')", "perhaps\n"))
    stale = notebook(("print('AP', 0.5)", "AP 0.3\n"), ("print('same')", "same\n"))
    failing, dying = notebook(("1 / 0", "")), notebook(("import os; os._exit(3)", ""))
    done = project("--workers", "2", true=true, stale=stale, failing=failing, dying=dying)
    assert done.returncode == 1 and "stale or failing: dying failing stale;" in done.stderr.replace("\n", " ")
    assert "cell cell0: saved 0.3, now 0.5" in done.stdout and "ZeroDivisionError" in done.stdout
    assert "its process died" in done.stdout and re.search(r"^true: \d+ s$", done.stdout, re.MULTILINE)
    done = project("--workers", "1", "true")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_slow_cell_is_compared_when_its_flag_is_named(project):
    page = notebook(("#| slow\nprint(2)", "1\n"))
    assert project("page", page=page).returncode == 0
    done = project("page", "--flags", "slow", page=page)
    assert done.returncode == 1 and "saved 1, now 2" in done.stdout


def test_cells_are_marked_where_only_numbers_differ_and_then_pass(project, tmp_path):
    page = notebook(("print('process', 2)", "process 1\n"), ("print('a disc')", "a ring\n"))
    done = project("page", "--mark", page=page)
    cells = json.loads((tmp_path / "nbs/page.ipynb").read_text())["cells"]
    assert done.returncode == 1 and ["".join(cell["source"]).startswith("#| varies") for cell in cells] == [True, False]
    done = project("page")
    assert "cell0" not in done.stdout and "cell1: saved" in done.stdout


def test_git_shows_a_notebook_as_text_without_its_pictures(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("Makefile", ".gitattributes"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    page = notebook(("print(1)", ""))
    page["cells"][0]["outputs"] = [{"data": {"image/png": 4000 * "A"}, "metadata": {}, "output_type": "display_data"}]
    (tmp_path / "page.ipynb").write_text(json.dumps(page, indent=1))
    for command in (["git", "init", "-q"], ["make", "-s", "diffs", f"VENV={sys.prefix}"], ["git", "add", "."],
                    [*git, "commit", "-qm", "one"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    page["cells"][0] |= {"source": ["print(2)"], "outputs": [{"data": {"image/png": 4000 * "B"}, "metadata": {},
                                                              "output_type": "display_data"}]}
    (tmp_path / "page.ipynb").write_text(json.dumps(page, indent=1))
    shown = subprocess.run(["git", "diff"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "-print(1)" in shown and "+print(2)" in shown and "BBB" not in shown and shown.count("\n") < 25


def test_a_published_notebook_begins_with_a_cell_that_does_something_on_colab_alone(project, tmp_path):
    config, path = tmp_path / "nbs/_config.yml", tmp_path / "nbs/page.ipynb"
    text = config.read_text()
    config.write_text(text.replace('&address ""', "&address https://example.org/someone/book"))
    assert project("--colab", page=notebook(("print('a')", "a\n"))).returncode == 0
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert "https://example.org/someone/book" in first and first.startswith("#| hide") and len(cells) == 2
    assert project("--colab").returncode == 0 and len(json.loads(path.read_text())["cells"]) == 2
    done = project("page")  # runs it
    assert done.returncode == 0, done.stdout
    config.write_text(text)
    assert project("--colab").returncode == 0 and [cell["id"] for cell in json.loads(path.read_text())["cells"]] == [
        "cell0"]


def test_notebooks_have_that_cell_if_and_only_if_the_book_has_an_address():
    address = re.search(r'^  url: &address "?([^"\n]*)', (ROOT / "nbs/_config.yml").read_text(), re.MULTILINE)[1]
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        ids = [cell["id"] for cell in cells]
        assert "colab" not in ids[1:] and (ids[0] == "colab") == bool(address), f"{path.name}: tools/chapter.py --colab"
        assert not address or address in "".join(cells[0]["source"])


def test_the_map_of_the_code_has_every_module_once_and_every_target_and_file_that_is_named_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|`]+ \| (`[^|]+) \|$", text.split("## A map of the code")[1], re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row))]
    assert sorted(listed) == MODULES
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) - {"it"} <= targets
    paths = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    paths += re.findall(r"`((?:tools|tests|benchmarks|nbs)/(?!_py)[\w./]+\.(?:py|yml|ipynb))`", text)
    assert len(paths) > 8 and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_worked_example_of_contributing_does_what_it_says():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    loss, check = (textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    box, size = torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.tensor([[128, 128]])
    names = {"one": Targets(torch.tensor([0]), box, torch.tensor([1]), torch.tensor([7]), size, size),
             "answer": Predictions(torch.zeros(1, 1, 1, 2), box.view(1, 1, 1, 4))}
    exec(loss + check, names)
    assert names["losses"][1.0] == pytest.approx(np.log(2) + 0.5)


def test_the_book_weighs_less_than_14_megabytes():
    files = [path for path in (ROOT / "nbs").rglob("*") if path.is_file()
             and not {"_build", "_py", "runs", ".ipynb_checkpoints", "__pycache__"} & set(path.parts)]
    weight = sum(path.stat().st_size for path in files)
    assert weight < 14e6, f"{weight / 1e6:.1f} MB: python tools/chapter.py --shrink makes saved pictures smaller"
