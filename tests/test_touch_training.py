"The figure that slides through a training, on its page, driven as a reader would: keys, mouse, finger; no scripts."
import base64
import json
from pathlib import Path

import pytest
from test_book import PAGES, SIZES, browser, pytestmark  # noqa: F401  (the fixture, and the mark `book`)

RECORD = Path(__file__).resolve().parent.parent / "nbs/slow.json"


def numbers(text: str) -> list[int]:
    return list(base64.b64decode(text))


def open_page(browser, width: str, **how):  # noqa: F811
    "The page, and what goes wrong on it."
    size, faults = SIZES[width], []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **how)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((PAGES / "slow.html").as_uri())
    return context, page, faults


def owners(figure) -> list[int]:
    return [int(text) for text in figure.locator("tbody td:nth-child(2)").all_inner_texts()]


@pytest.mark.parametrize("width, mode", [("desk", "light"), ("phone", "dark")])
def test_one_slides_through_the_training_by_keys_mouse_and_finger(browser, width, mode):  # noqa: F811
    context, page, faults = open_page(browser, width, has_touch=True, color_scheme=mode)
    figure = page.locator("#touch-fig-slow-touch")
    figure.scroll_into_view_if_needed()
    slide = figure.get_by_role("slider", name="training step")
    run = json.loads(RECORD.read_text())["runs"]["DETR"]
    looks, counts = run["looks"], run["counts"]
    first = sum(counts[:8])  # of the objects of the image that is shown at first

    def recorded(at: int) -> list[int]:
        return numbers(looks[at]["query"])[first : first + counts[8]]

    assert owners(figure) == recorded(0)
    slide.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert slide.get_attribute("aria-valuetext") == str(looks[3]["step"]) and owners(figure) == recorded(3)
    assert f"step {looks[3]['step']}:" in figure.get_by_role("group").nth(1).get_attribute("aria-label")
    page.wait_for_function("document.querySelector('.touch-hidden').textContent.includes('Since step')")
    box = slide.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert owners(figure) == recorded(len(looks) - 1)
    assert figure.locator("rect.owner").count() == counts[8]
    page.touchscreen.tap(box["x"] + 3, box["y"] + box["height"] / 2)
    assert owners(figure) == recorded(0)
    figure.get_by_role("combobox", name="image").select_option(index=1)
    assert len(owners(figure)) == counts[3]
    everyone = figure.locator("circle").count()
    figure.get_by_role("combobox", name="queries").select_option(index=1)
    assert figure.locator("circle").count() - 1 == (everyone - 1) / 6  # one of six clouds; the other dot is the curve's
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0 and not faults
    context.close()


def test_a_still_picture_stands_where_scripts_do_not_run(browser):  # noqa: F811
    context, page, _ = open_page(browser, "desk", java_script_enabled=False)
    still = page.locator("#touch-fig-slow-touch > img")
    assert still.is_visible() and len(still.get_attribute("alt")) > 40
    context.close()
