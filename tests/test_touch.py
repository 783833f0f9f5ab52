"""The figures one can touch, driven in Chromium as a reader would: mouse, finger, keys; wide, narrow; light, dark.

`make test-book` builds the pages first. The library's own tests look at no page of the book.
"""
import json
import re

import numpy as np
import pytest
import torch
from book_touch import SOURCES, _shorten
from matplotlib import colormaps
from scipy.optimize import linear_sum_assignment
from test_book import browser, pytestmark  # noqa: F401  (the fixture, and the mark `book` that skips without a browser)

from detr_nb.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou

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
