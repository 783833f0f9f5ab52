"""What must hold for every committed notebook. The cells themselves are run by `tools/chapter.py --check`."""
import json
import re
from pathlib import Path

from book_touch import LARGEST, script, style

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.name[:2].isdigit()]


def cells_of(path: Path, kind: str) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == kind]


def directive(source: str, name: str) -> str | None:
    "The value of a `#| name: value` or `#| name value` line; None when there is no such line."
    match = re.search(rf"^#\|\s*{name}\b:?[ \t]*(.*)$", source, re.MULTILINE)
    return match and match[1].strip().strip("\"'")


def test_there_are_chapters():
    assert len(CHAPTERS) >= 16


def faults(check, paths=NOTEBOOKS) -> list[str]:
    "What `check` finds in any of the notebooks, with its name."
    return [f"{path.name}: {fault}" for path in paths for fault in check(path)]


def exported(source: str) -> bool:
    return bool(re.search(r"^#\|\s*exporti?\b", source, re.MULTILINE))


def code_lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def pictures_of(cell: dict) -> list[dict]:
    "Pictures, and figures one can touch, which hold a still one with an alternative text."
    still = '<div class="touch"[^>]*><img alt="[^"]+"'
    return [output for output in cell["outputs"] if any(kind.startswith("image/") or re.search(still, "".join(content))
                                                        for kind, content in output.get("data", {}).items())]


def test_every_notebook_is_saved_with_outputs_and_without_errors():
    def check(path):
        outputs = [output for cell in cells_of(path, "code") for output in cell["outputs"]]
        errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
        return errors if outputs else ["no saved outputs: the book would show none; run tools/chapter.py"]

    assert not faults(check)


def test_saved_outputs_name_no_folder_of_the_author():
    def check(path):
        outputs = [output for cell in cells_of(path, "code") for output in cell["outputs"]]
        for output in outputs:  # in a picture's letters anything may stand by chance
            output["data"] = {kind: data for kind, data in output.get("data", {}).items() if "image/" not in kind}
        return re.findall(rf"(?:/home/|/Users/|/root/|/tmp/|site-packages/|{ROOT})[\w./-]*", json.dumps(outputs))

    assert not faults(check)


def test_every_notebook_is_smaller_than_a_megabyte_names_its_kernel_and_has_unique_cell_ids():
    def check(path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        ids = [cell["id"] for cell in notebook["cells"]]
        kernel = notebook["metadata"].get("kernelspec", {}).get("name")
        size = path.stat().st_size
        return [what for what, wrong in {f"{size} bytes": size >= 1_000_000, f"kernel {kernel}": kernel != "python3",
                                         "cell ids twice": len(ids) > len(set(ids))}.items() if wrong]

    assert not faults(check)


def test_every_notebook_begins_with_one_title():
    def check(path):
        titles = [line for cell in cells_of(path, "markdown")
                  for line in re.sub(r"```.*?```", "", cell["source"], flags=re.DOTALL).splitlines()
                  if line.startswith("# ")]
        return [] if len(titles) == 1 else [str(titles)]

    assert not faults(check)


def test_a_captioned_cell_has_one_picture_with_a_name_and_an_alternative_text():
    def check(path):
        for cell in cells_of(path, "code"):
            caption = directive(cell["source"], "fig-cap")
            if caption is None:
                continue
            shown = [output for output in cell["outputs"] if "data" in output]
            if not len(pictures_of(cell)) == len(shown) == 1:
                yield f"{caption!r}: {len(shown)} outputs; end its last line with ';'"
            if not directive(cell["source"], "fig-alt"):
                yield f"{caption!r} has no #| fig-alt"
            if not (directive(cell["source"], "label") or "").startswith("fig-"):
                yield f"{caption!r} has no #| label: fig-..."

    assert not faults(check)


def test_figures_to_touch_are_small_and_hold_the_scripts_as_they_are():
    def check(path):
        for cell in cells_of(path, "code"):
            if call := re.search(r'^touch\("(\w+)", "(fig-[\w-]+)"', cell["source"], re.MULTILINE):
                shown = "".join(text for output in cell["outputs"] for text in output["data"].get("text/html", ""))
                if len(shown.encode()) > LARGEST:
                    yield f"{call[2]}: {len(shown.encode())} bytes"
                if not all(text in shown for text in (script(call[1]), style(), f'start("touch-{call[2]}", render)')):
                    yield f"{call[2]} was saved with another script: run tools/chapter.py"

    assert not faults(check)


def test_code_has_at_most_120_columns():
    def check(path):
        lines = [line for cell in cells_of(path, "code") for line in cell["source"].splitlines()]
        return [line for line in lines if len(line) > 120 and not line.startswith("#|")]

    assert not faults(check)


def test_a_cell_has_at_most_45_lines_of_code_but_for_the_model():
    def check(path):
        sources = [cell["source"] for cell in cells_of(path, "code") if "\nclass DETR(" not in cell["source"]]
        counts = [len(code_lines(source)) for source in sources]
        return [f"a cell of {count} lines" for count in counts if count > 45]

    assert not faults(check, CHAPTERS)


def test_a_chapter_shows_at_least_half_as_many_lines_as_it_exports():
    def check(path):
        lines = dict.fromkeys((True, False), 0)
        for cell in cells_of(path, "code"):
            lines[exported(cell["source"])] += len(code_lines(cell["source"]))
        return [f"exports {lines[True]}, shows {lines[False]}"] if lines[True] > 2 * lines[False] else []

    assert not faults(check, CHAPTERS)


def test_a_chapter_has_at_least_two_pictures():
    def check(path):
        count = sum(len(pictures_of(cell)) for cell in cells_of(path, "code"))
        count += sum(cell["source"].count("](images/") for cell in cells_of(path, "markdown"))
        return [f"{count} pictures"] if count < 2 else []

    assert not faults(check, CHAPTERS)


def test_figure_labels_are_unique_in_the_book():
    labels = [label for path in NOTEBOOKS for cell in cells_of(path, "code")
              if (label := directive(cell["source"], "label"))]
    assert sorted(labels) == sorted(set(labels))


def test_every_chapter_exports_the_module_it_is_named_after():
    def check(path):
        modules = [module for cell in cells_of(path, "code") if (module := directive(cell["source"], "default_exp"))]
        return [] if modules == [path.stem.split("_", 1)[1]] else [str(modules)]

    assert not faults(check, CHAPTERS)


def test_the_contents_list_every_notebook_in_reading_order():
    listed = re.findall(r"(?:file|root): (\S+)", (ROOT / "nbs/_toc.yml").read_text(encoding="utf-8"))
    assert [name for name in listed if name[:2].isdigit()] == [path.stem for path in CHAPTERS]
    assert "index" in listed


def test_every_cited_work_is_in_the_references():
    known = set(re.findall(r"@\w+\{([^,\s]+),", (ROOT / "nbs/references.bib").read_text(encoding="utf-8")))
    cited = {key.strip() for path in NOTEBOOKS for cell in cells_of(path, "markdown")
             for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", cell["source"]) for key in keys.split(",")}
    assert cited <= known, cited - known
