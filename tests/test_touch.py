"""The figures one can touch, driven in Chromium as a reader would: mouse, finger, keys; wide, narrow; light, dark.

`make test-book` builds the pages first. The library's own tests look at no page of the book.
"""
import json
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from book_touch import SOURCES, _shorten
from matplotlib import colormaps
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment
from test_book import PAGES, SIZES, browser, pytestmark  # noqa: F401  (the fixture; the mark that skips without a browser)

from detr_nb.batching import Targets
from detr_nb.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from detr_nb.criterion import SetCriterion
from detr_nb.detr import Predictions
from detr_nb.evaluation import score
from detr_nb.matcher import match, matching_cost
from detr_nb.position_encoding import SinePositionEncoding

LIBRARY = (SOURCES / "touch.js").read_text(encoding="utf-8")
NAMES = re.findall(r"^export (?:function|const) (\w+)", LIBRARY, re.MULTILINE)


@pytest.fixture(scope="module")
def library(browser):  # noqa: F811
    "An empty page that knows the library as `touch`."
    page = browser.new_page()
    page.set_content("<!doctype html><html lang=en><title>t</title><body style='margin: 0'></body></html>")
    page.add_script_tag(type="module", content=f"{_shorten(LIBRARY)}\nwindow.touch = {{ {', '.join(NAMES)} }};")
    page.wait_for_function("window.touch")
    yield page
    page.close()


def test_the_library_is_small_enough_to_stand_in_each_figure():
    texts = [_shorten((SOURCES / f"touch.{kind}").read_text(encoding="utf-8")) for kind in ("js", "css")]
    assert sum(len(text.encode()) for text in texts) < 12_000


def test_the_assignment_is_scipys(library):
    rng, tables = np.random.default_rng(0), [[[3.0, 4, 6], [2, 6, 7], [1, 3, 6]]]
    for _ in range(300):
        rows, columns = rng.integers(1, 8, 2)
        tables.append(rng.normal(size=(rows, columns)).tolist())
    tables += [rng.integers(0, 3, (5, 6)).tolist() for _ in range(50)]  # with many ties: the sums must agree
    for table, found in zip(tables, library.evaluate("tables => tables.map(touch.assign)", tables)):
        array = np.array(table)
        rows = [row for row, column in enumerate(found) if column >= 0]
        columns = [found[row] for row in rows]
        assert len(set(columns)) == len(rows) == min(array.shape)
        assert abs(array[rows, columns].sum() - array[linear_sum_assignment(array)].sum()) < 1e-9
    assert library.evaluate("touch.assign([])") == []


def test_the_overlaps_are_the_packages(library):
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = library.evaluate("boxes => boxes.map(a => boxes.map(b => { const o = touch.overlap(touch.corners(a),"
                             " touch.corners(b)); return [o.iou, o.giou]; }))", boxes.tolist())
    wanted = [function(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(boxes)) for function in (box_iou, generalized_box_iou)]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), torch.stack(wanted, -1))
    nothing = library.evaluate("touch.overlap([0, 0, 0, 0], [0, 0, 0, 0])")
    assert nothing == {"iou": 0, "giou": 0}  # no area at all is no division by zero


@pytest.mark.parametrize("name, call", [("cividis", "touch.ramp(t)"), ("RdBu_r", "touch.signed(2 * t - 1)")])
def test_the_colours_are_matplotlibs(library, name, call):
    shares = np.linspace(0, 1, 41)
    found = library.evaluate(f"shares => shares.map(t => {call})", shares.tolist())
    assert np.abs(np.array(found) - 255 * colormaps[name](shares)[:, :3]).max() < 10  # of 255


def test_numbers_and_softmax(library):
    assert library.evaluate("[-1.254, -0.001, 2].map(x => touch.fixed(x))") == ["\u22121.25", "0.00", "2.00"]
    logits = [1.0, -2.0, 1000.0, 999.0]
    found = library.evaluate(f"touch.softmax({json.dumps(logits)})")
    np.testing.assert_allclose(found, torch.tensor(logits, dtype=torch.float64).softmax(0), atol=1e-12)
    assert library.evaluate("['#0072B2', '#F0E442', [0, 0, 0]].map(touch.inkOn)") == ["#fff", "#000", "#fff"]


def test_a_handle_follows_mouse_and_keys_and_says_where_it_is(library):
    library.set_viewport_size({"width": 400, "height": 300})
    library.evaluate("""() => {
        window.at = [50, 50]; window.told = [];
        const knob = touch.svg("circle", { cx: 50, cy: 50, r: 5, id: "knob" });
        const tell = touch.handle(knob, {
            label: "knob", get: () => at, say: () => `at ${at[0]}`, now: () => at[0], step: 2,
            put: to => { at = to.map(v => touch.clamp(v, 0, 100)); touch.set(knob, { cx: at[0], cy: at[1] }); } });
        const stage = touch.stage(100, 100, "a square", knob);
        stage.style.width = "200px";
        const slide = touch.slider("sure", {
            min: 0, max: 10, value: 3, say: v => `${v} of 10`, input: v => told.push(v) });
        const choice = touch.choice("says", ["disc", "ring"], 1, v => told.push(v));
        document.body.replaceChildren(stage, slide, choice, touch.button("again", () => told.push("again")));
    }""")
    library.mouse.move(100, 100)
    library.mouse.down()
    library.mouse.move(120, 90, steps=3)
    assert library.evaluate("at.map(Math.round)") == [60, 45]  # a unit of the picture is two pixels of the screen
    library.mouse.move(399, 299)  # beyond the edge, and back: it keeps to the pointer
    library.mouse.move(100, 100)
    library.mouse.up()
    library.mouse.move(10, 10)
    assert library.evaluate("at.map(Math.round)") == [50, 50]
    library.keyboard.press("ArrowRight")
    library.keyboard.press("Shift+ArrowUp")
    assert library.evaluate("at.map(Math.round)") == [52, 30]
    assert library.get_by_role("slider", name="knob").get_attribute("aria-valuetext") == "at 52"
    library.get_by_role("slider", name="sure").focus()
    library.keyboard.press("ArrowRight")
    assert library.get_by_role("slider", name="sure").get_attribute("aria-valuetext") == "4 of 10"
    library.get_by_role("combobox", name="says").select_option("disc")
    library.get_by_role("button", name="again").click()
    assert library.evaluate("told") == [4, 0, "again"]


# ---- the figures in the pages of the book

FIGURES = sorted(
    (path.stem, name) for path in (SOURCES.parent).glob("*.ipynb")
    for name in re.findall(r'^ *"touch\(\\"\w+\\", \\"(fig-[\w-]+)\\"', path.read_text(encoding="utf-8"), re.MULTILINE))
WAYS = [("desk", "light"), ("phone", "dark")]  # mouse and finger, each with the keyboard
SIDEWAYS = """figure => {
    const edge = figure.getBoundingClientRect().right + 1;
    return [...figure.querySelectorAll('.touch-view *')].filter(e => !e.closest('svg svg, .touch-hidden')
        && !(e.ownerSVGElement) && e.getBoundingClientRect().right > edge
        || e.matches('td, th') && e.scrollWidth > e.clientWidth).map(e => e.outerHTML.slice(0, 80));
}"""


@pytest.fixture
def visit(browser):  # noqa: F811
    "Open a page at a figure: `visit(page, label, width, mode)`; in the end no network was asked, nothing complained."
    contexts, faults = [], []

    def open_at(page_name: str, label: str, width: str = "desk", mode: str = "light", scripts: bool = True):
        contexts.append(browser.new_context(
            viewport=dict(zip(("width", "height"), SIZES[width])), color_scheme=mode, has_touch=width == "phone",
            java_script_enabled=scripts))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or faults.append(asked.url))
        page.set_default_timeout(120_000)
        page.goto((PAGES / f"{page_name}.html").as_uri(), wait_until="load")
        page.locator(f"#{label}").scroll_into_view_if_needed()
        return page, page.locator(f"#touch-{label}")

    yield open_at
    for context in contexts:
        context.close()
    assert not faults


def ask(figure, question: str):
    "What a figure returns when asked."
    return figure.evaluate(f"element => element.figure.{question}")


def middle_of(locator) -> tuple[float, float]:
    "The centre of what is drawn, in pixels of the window."
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page, start, way, width: str, steps: int = 4) -> None:
    "Press at a point, move by a way in pixels and let go: by mouse at the desk, by finger on the phone."
    places = [(start[0] + way[0] * step / steps, start[1] + way[1] * step / steps) for step in range(steps + 1)]
    if width == "desk":
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place)
        page.mouse.up()
        return
    wire = page.context.new_cdp_session(page)
    for kind, (x, y) in [("touchStart", places[0]), *(("touchMove", place) for place in places[1:])]:
        wire.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    wire.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_there_are_figures_to_touch():
    assert {name for _, name in FIGURES} >= {"fig-matcher-game", "fig-position-touch", "fig-evaluation-threshold"}


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name, label", FIGURES)
def test_a_figure_starts_fits_and_is_accessible(visit, name, label, width, mode):
    page, figure = visit(name, label, width, mode)
    assert figure.locator(".touch-view").is_visible() and not figure.locator("> img").count()
    assert figure.locator("xpath=ancestor::figure//figcaption").inner_text().startswith("Figure ")
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    assert figure.evaluate(SIDEWAYS) == []
    found = Axe().run(page, {"include": [[f"#touch-{label}"]]}, {"preload": False}).response["violations"]
    assert not found, [(fault["id"], fault["nodes"][0]["html"][:160]) for fault in found]


@pytest.mark.parametrize("name, label", FIGURES)
def test_without_scripts_a_figure_is_a_picture(visit, name, label):
    _, figure = visit(name, label, scripts=False)
    picture = figure.locator("> img")
    assert picture.is_visible() and picture.bounding_box()["width"] > 200 and len(picture.get_attribute("alt")) > 20


@pytest.mark.parametrize("width, mode", WAYS)
def test_the_matching_game_counts_as_the_package_does(visit, width, mode):
    page, figure = visit("14_matcher", "fig-matcher-game", width, mode)
    data = json.loads(page.locator("#touch-fig-matcher-game-data").text_content())
    sizes = torch.tensor([[data["height"], data["width"]]])
    targets = Targets(torch.tensor(data["labels"]), torch.tensor(data["wanted"], dtype=torch.float64),
                      torch.tensor([len(data["labels"])]), torch.tensor([0]), sizes, sizes)

    def agrees() -> list[int]:
        "Compare costs, pairs and loss with the package's; the query of each object."
        logits, boxes = (torch.tensor(ask(figure, f"{what}()"), dtype=torch.float64) for what in ("logits", "boxes"))
        predictions = Predictions(logits[None, None], boxes[None, None])
        shown = [[float(cell.replace("\u2212", "-").partition(",")[0]) for cell in row]
                 for row in figure.locator("table").first.evaluate(
                     "t => [...t.tBodies[0].rows].map(r => [...r.cells].slice(1).map(c => c.textContent))")]
        assert (torch.tensor(shown, dtype=torch.float64) - matching_cost(predictions, targets)[0]).abs().max() < 0.0051
        pairs = match(predictions, targets)
        assert ask(figure, "chosen()") == pairs.query[pairs.target.argsort()].tolist()
        losses = SetCriterion(num_classes=len(data["names"]))(predictions, targets)
        wanted = [float(losses[name]) * weight for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2))]
        assert np.abs(np.array(ask(figure, "losses()")) - wanted).max() < 1e-9
        assert f"{sum(wanted):.2f}" in figure.get_by_text("The loss:").inner_text()
        return ask(figure, "chosen()")

    before = agrees()
    query = figure.get_by_role("slider", name="query 4", exact=True)
    picture, was = figure.locator(".touch-stage").bounding_box(), ask(figure, "boxes()")[4]
    scale = picture["width"] / data["width"]
    start = [picture[x] + was[at] * picture[side] + (12, 20)[at] * scale
             for at, (x, side) in enumerate((("x", "width"), ("y", "height")))]  # there no other box lies on it
    drag(page, start, (-10 * scale, -10 * scale), width)
    moved = ask(figure, "boxes()")[4]
    assert abs(moved[0] - was[0] + 10 / data["width"]) < 0.01 and abs(moved[1] - was[1] + 10 / data["height"]) < 0.01
    after = agrees()
    assert before[0] == 0 and after[0] == 4  # the disc goes to the query that was moved onto it
    page.wait_for_timeout(500)
    assert "The disc goes from query 0 to query 4." in figure.get_by_role("status").inner_text()
    for _ in range(5):
        query.press("Shift+ArrowRight")
    assert agrees()[0] == 0 and "answers for nothing" in query.get_attribute("aria-valuetext")
    corner = figure.get_by_role("slider", name="lower right corner of the picked query")
    sides = ask(figure, "boxes()")[4][2:]
    drag(page, middle_of(corner), (-20 * scale, -15 * scale), width)
    assert all(now < side - 0.1 for now, side in zip(ask(figure, "boxes()")[4][2:], sides))
    corner.press("ArrowLeft")
    figure.get_by_role("combobox", name="Class").select_option("star")
    figure.get_by_role("slider", name="Its probability").press("End")
    assert abs(torch.tensor(ask(figure, "logits()")[4]).softmax(0)[3] - 0.99) < 1e-6
    agrees()
    loss = sum(ask(figure, "losses()"))
    for _ in range(10):
        figure.get_by_role("button", name="A step of learning").press("Enter")
    assert sum(ask(figure, "losses()")) < loss - 0.3
    agrees()
    figure.get_by_role("button", name="Start again").click()
    assert agrees() == before


@pytest.mark.parametrize("width, mode", WAYS)
def test_the_likeness_under_the_finger_is_the_encodings(visit, width, mode):
    page, figure = visit("11_position_encoding", "fig-position-touch", width, mode)
    data = json.loads(page.locator("#touch-fig-position-touch-data").text_content())
    rows, columns = data["rows"], data["columns"]

    def agrees() -> None:
        encode = SinePositionEncoding(2 * data["size"], ask(figure, "temperature()"))
        grid = encode(torch.zeros(1, 1, rows, columns, dtype=torch.float64))[0].unflatten(0, (rows, columns))
        row, column = ask(figure, "here()")
        wanted = grid @ grid[row, column] / grid[row, column].square().sum()
        assert np.abs(np.array(ask(figure, "values()")) - wanted.flatten().numpy()).max() < 1e-5
        there = wanted[tuple(ask(figure, "there()"))]
        assert f"likeness {there:.2f}," in figure.locator(".touch-view p").nth(2).inner_text()

    agrees()
    assert ask(figure, "here()") == data["here"]
    image, hill = (figure.locator(".touch-stage").nth(number).bounding_box() for number in (0, 1))
    cell = image["width"] / columns
    drag(page, (image["x"] + 2.5 * cell, image["y"] + 9.5 * cell), (3 * cell, -4 * cell), width)
    assert ask(figure, "here()") == [5, 5]  # from row 9, column 2: up by four, right by three
    agrees()
    drag(page, (hill["x"] + 1.5 * cell, hill["y"] + 1.5 * cell), (cell, 0), width)
    assert ask(figure, "there()") == [1, 2]
    seen = figure.get_by_role("slider", name="the cell one points at")
    for key in ("ArrowUp", "ArrowLeft", "Shift+ArrowRight", "Shift+ArrowDown"):
        seen.press(key)
    assert ask(figure, "here()") == [rows - 1, 14] and seen.get_attribute("aria-valuetext") == f"row {rows}, column 15"
    figure.get_by_role("slider", name="Temperature").press("End")
    assert ask(figure, "temperature()") == 20
    agrees()
    least = figure.locator(".touch-row.touch-quiet span").first
    assert least.inner_text() == f"{min(ask(figure, 'values()')):.2f}"
    figure.get_by_role("checkbox").check()
    assert least.inner_text() == "0.00"


def average_precisions(images: list[dict], lowest: float) -> np.ndarray:
    "AP at ten thresholds of the IoU, by the package, of the detections that score `lowest` or more."
    truth, rows = [], []
    for number, image in enumerate(images, 1):
        for x1, y1, x2, y2 in image["objects"]:
            truth.append({"id": len(truth) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                          "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        rows += [[number, x1, y1, x2 - x1, y2 - y1, found, 1]
                 for (x1, y1, x2, y2), found in zip(image["boxes"], image["scores"]) if found >= lowest]
    coco, ids = COCO(), list(range(1, len(images) + 1))
    coco.dataset = {"info": {}, "images": [{"id": number, "height": 96, "width": 160} for number in ids],
                    "categories": [{"id": 1, "name": "shape"}], "annotations": truth}
    coco.createIndex()
    return score(coco, np.array(rows), ids).eval["precision"][:, :, 0, 0, -1].mean(1)


@pytest.mark.parametrize("width, mode", WAYS)
def test_precision_and_recall_are_pycocotools(visit, width, mode):
    page, figure = visit("16_evaluation", "fig-evaluation-threshold", width, mode)
    images = json.loads(page.locator("#touch-fig-evaluation-threshold-data").text_content())["images"]
    whole = average_precisions(images, 0.0)
    strict, bar = (figure.get_by_role("slider", name=name) for name in ("IoU threshold", "Score threshold"))
    for level in range(10):
        averages, lowest = ask(figure, "averages()"), ask(figure, "threshold()")
        cut = average_precisions(images, lowest)
        np.testing.assert_allclose(averages, [whole[level], cut[level], whole.mean()], atol=1e-12)
        assert [f"{value:.3f}" for value in averages] == figure.locator("table td").all_inner_texts()
        strict.press("ArrowRight")
        for _ in range(4):
            bar.press("ArrowDown")
    assert abs(ask(figure, "threshold()") - 0.1) < 1e-9
    strict.press("Home")
    counts = ask(figure, "counts()")
    total, above = sum(len(image["objects"]) for image in images), len(counts["above"])
    assert counts["right"] + counts["missed"] == total and above == sum(s >= 0.1 for i in images for s in i["scores"])
    assert f"Precision {counts['right']}/{above}" in figure.locator(".touch-view p").first.inner_text()
    knob, handle = figure.locator("circle").last, figure.get_by_role("slider", name="the place on the curve")
    drag(page, middle_of(knob), (-0.6 * handle.bounding_box()["width"], 0), width)
    after = ask(figure, "counts()")
    assert after["recall"] < counts["recall"] - 0.3 and len(after["above"]) < above
    handle.press("ArrowRight")
    assert len(ask(figure, "counts()")["above"]) > len(after["above"])  # one more, or two that score alike
    bar.press("End")
    assert "Precision has no value yet" in handle.get_attribute("aria-valuetext")
    assert ask(figure, "averages()")[1] == 0
