"""What must hold for every committed notebook. The cells themselves are run by `nbdev_test`."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.name[:2].isdigit()]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == kind]


def directive(source: str, name: str) -> str | None:
    "The value of a `#| name: value` or `#| name value` line; None when there is no such line."
    match = re.search(rf"^#\|\s*{name}\b:?[ \t]*(.*)$", source, re.MULTILINE)
    return match and match[1].strip().strip("\"'")


def test_there_are_chapters():
    assert len(CHAPTERS) >= 16


@every_notebook
def test_is_saved_with_outputs_and_without_errors(path):
    outputs = [output for cell in cells_of(path, "code") for output in cell["outputs"]]
    assert outputs, "no saved outputs: the book would show none; run tools/chapter.py"
    errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
    assert not errors


@every_notebook
def test_saved_outputs_name_no_folder_of_the_author(path):
    outputs = [output for cell in cells_of(path, "code") for output in cell["outputs"]]
    for output in outputs:  # in a picture's letters anything may stand by chance
        output["data"] = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
    text = json.dumps(outputs)
    places = re.findall(r"(?:/home/|/Users/|/root/|/tmp/|site-packages/)[\w./-]*", text)
    assert not places and str(ROOT) not in text, places


@every_notebook
def test_is_smaller_than_a_megabyte(path):
    assert path.stat().st_size < 1_000_000


@every_notebook
def test_names_its_kernel_and_has_unique_cell_ids(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))


@every_notebook
def test_begins_with_one_title(path):
    titles = [line for cell in cells_of(path, "markdown")
              for line in re.sub(r"```.*?```", "", cell["source"], flags=re.DOTALL).splitlines()
              if line.startswith("# ")]
    assert len(titles) == 1, titles


@every_notebook
def test_a_captioned_cell_has_one_picture_with_a_name_and_an_alternative_text(path):
    for cell in cells_of(path, "code"):
        caption = directive(cell["source"], "fig-cap")
        if caption is None:
            continue
        shown = [output for output in cell["outputs"] if "data" in output]
        pictures = [output for output in shown if any(kind.startswith("image/") for kind in output["data"])]
        assert len(pictures) == len(shown) == 1, f"{caption!r}: {len(shown)} outputs; end its last line with ';'"
        assert directive(cell["source"], "fig-alt"), f"{caption!r} has no #| fig-alt"
        assert (directive(cell["source"], "label") or "").startswith("fig-"), f"{caption!r} has no #| label: fig-..."


@every_notebook
def test_code_has_at_most_120_columns(path):
    lines = [line for cell in cells_of(path, "code") for line in cell["source"].splitlines()]
    assert not [line for line in lines if len(line) > 120 and not line.startswith("#|")]


def test_figure_labels_are_unique_in_the_book():
    labels = [label for path in NOTEBOOKS for cell in cells_of(path, "code")
              if (label := directive(cell["source"], "label"))]
    assert sorted(labels) == sorted(set(labels))


@every_chapter
def test_exports_the_module_it_is_named_after(path):
    modules = [module for cell in cells_of(path, "code") if (module := directive(cell["source"], "default_exp"))]
    assert modules == [path.stem.split("_", 1)[1]]


def test_the_contents_list_every_notebook_in_reading_order():
    listed = re.findall(r"(?:file|root): (\S+)", (ROOT / "nbs/_toc.yml").read_text(encoding="utf-8"))
    assert [name for name in listed if name[:2].isdigit()] == [path.stem for path in CHAPTERS]
    assert "index" in listed


def test_every_cited_work_is_in_the_references():
    known = set(re.findall(r"@\w+\{([^,\s]+),", (ROOT / "nbs/references.bib").read_text(encoding="utf-8")))
    cited = {key.strip() for path in NOTEBOOKS for cell in cells_of(path, "markdown")
             for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", cell["source"]) for key in keys.split(",")}
    assert cited <= known, cited - known
