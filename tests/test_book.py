"""The pages of the book as a browser shows them: `make test-book` builds them and runs this.

It takes the Chromium named by `BROWSER`, else one that is installed, and says so where there is none.
"""
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

PAGES = Path(__file__).resolve().parent.parent / "nbs/_build/html"
BROWSER = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SIZES = {"desk": (1280, 900), "phone": (390, 844), "dark": (1280, 900)}  # in CSS pixels
pytestmark = [
    pytest.mark.book,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium found: install one, or name it in BROWSER"),
]

# a page has thousands of coloured words of code, at which axe-core looks for minutes; the theme's colours are its own;
# the reference shows 300 names by one template, so that the first modules stand for all
LOOKED_AT = {"exclude": [["div.highlight"], ["#the-package-by-name > section:nth-of-type(n+6)"]]}
RULES = {"desk": {}, "phone": {"runOnly": ["color-contrast", "target-size", "scrollable-region-focusable"]},
         "dark": {"runOnly": ["color-contrast"]}}  # the same elements in another place, and in other colours
LOOK = """() => {
    const box = element => element.getBoundingClientRect();
    const padding = element => 2 * parseFloat(getComputedStyle(element).padding);  // the same on all sides
    const shape = i => (box(i).width - padding(i)) / (box(i).height - padding(i));
    const name = element => (element.getAttribute('src') || element.textContent).slice(0, 80);
    const prose = document.querySelector('main').cloneNode(true);
    prose.querySelectorAll('pre, code, script, style').forEach(element => element.remove());
    const pictures = [...document.querySelectorAll('main img')];
    return {
        broken: pictures.filter(i => !i.complete || !i.naturalWidth).map(name),
        bent: pictures.filter(i => i.naturalWidth && box(i).width > 0 && Math.abs(
            shape(i) * i.naturalHeight / i.naturalWidth - 1) > 0.02).map(name),
        nameless: pictures.filter(i => !i.getAttribute('alt')).map(name),
        sideways: Math.max(0, document.scrollingElement.scrollWidth - innerWidth),
        cut: [...document.querySelectorAll('div.cell_input pre')].filter(
            p => p.scrollWidth > p.clientWidth + 1 && box(p).width > 0 && !(innerWidth < 600
                && getComputedStyle(p).overflowX == 'auto')).map(name),  // on a phone code scrolls, else it wraps
        tex: (prose.innerText.match(/\\\\(?:\\(|\\[|frac|mathbb|mathcal|sum)|\\$\\$/g) || []),
        links: [...document.querySelectorAll('a[href]')].map(a => a.href),
        names: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    };
}"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not (PAGES / "index.html").exists():
        pytest.fail(f"no pages in {PAGES}: run `make test-book`, which builds them first")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def visit(browser, path: Path, kind: str) -> dict:
    "What a page shows, asks for and says, and what axe-core finds, on a desk, a phone or in the dark."
    from axe_playwright_python.sync_playwright import Axe

    (width, height), scheme = SIZES[kind], "dark" if kind == "dark" else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri(), wait_until="load")
    page.evaluate("async () => { for (const i of document.images) i.loading = 'eager';"
                  " await Promise.allSettled([...document.images].map(i => i.decode())); }")
    seen = page.evaluate(LOOK)
    seen["console"] = list(said)  # axe-core, which comes last, has its own to say
    seen["network"] = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    seen["axe"] = [f"{found['impact']}: {found['id']}: {found['nodes'][0]['html'][:160]}"
                   for found in Axe().run(page, LOOKED_AT, RULES[kind] | {"preload": False}).response["violations"]]
    context.close()
    return seen


@pytest.mark.parametrize("kind", SIZES)
def test_every_page_opens_without_a_network_and_without_a_fault(browser, kind):
    pages = sorted(PAGES.glob("*.html"))
    seen = {path.name: visit(browser, path, kind) for path in pages}
    names = {page: set(found["names"]) for page, found in seen.items()}
    for found in seen.values():
        found["dead"] = [link for link in found.pop("links") if is_dead(link, names)]
        del found["names"]
    faults = {page: {kind: what for kind, what in found.items() if what} for page, found in seen.items()}
    faults = {page: found for page, found in faults.items() if found}
    assert not faults, "\n".join(f"{page}: {kind}: {what}" for page, found in faults.items()
                                 for kind, what in found.items())


def is_dead(link: str, names: dict[str, set[str]]) -> bool:
    "Whether a link into the book leads nowhere."
    if not link.startswith("file:"):
        return False
    address, anchor = urldefrag(link)
    path = Path(unquote(address.removeprefix("file://").partition("?")[0]))
    if not path.exists():
        return True
    return bool(anchor) and path.name in names and unquote(anchor) not in names[path.name]


def public_names() -> set[str]:
    "Every exported name, with its module's."
    found = set()
    for path in (PAGES.parents[2] / "detr_nb").glob("[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {f"detr_nb.{path.stem}.{name}" for name in ast.literal_eval(node.value)}
    return found


def test_the_search_index_has_every_public_name():
    text = (PAGES / "searchindex.js").read_text(encoding="utf-8")
    objects = json.loads(text[text.index("{"):text.rindex("}") + 1])["objects"]
    indexed = {f"{prefix}.{entry[4]}" for prefix, entries in objects.items() for entry in entries}
    names = public_names()
    assert len(names) > 300 and names - indexed == set()


@pytest.mark.parametrize("name", ["generalized_box_iou", "SetCriterion", "collate"])
def test_who_searches_for_a_function_is_led_to_it(browser, name):
    page = browser.new_page()
    page.goto((PAGES / "search.html").as_uri() + f"?q={name}")
    links = page.locator("#search-results li a")
    links.first.wait_for(timeout=20_000)
    targets = [link.get_attribute("href") for link in links.all()]
    assert any(target.startswith("api.html#detr_nb.") and target.endswith(f".{name}") for target in targets), targets
    page.close()


def test_in_the_dark_theme_figures_lie_on_white_in_their_own_colours(browser):
    context = browser.new_context(color_scheme="dark")
    page, wrong = context.new_page(), []
    for path in sorted(PAGES.glob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        wrong += page.evaluate("""() => [...document.querySelectorAll('main img')]
            .map(i => [getComputedStyle(i), i.alt])
            .filter(([s]) => s.backgroundColor !== 'rgb(255, 255, 255)' || /contrast|invert|hue/.test(s.filter))
            .map(([s, alt]) => `${location.pathname}: ${alt}: ${s.backgroundColor} ${s.filter}`)""")
    context.close()
    assert not wrong, wrong[:5]


def test_a_book_with_an_address_has_a_button_for_colab_on_every_notebook(tmp_path):
    book, tools = tmp_path / "nbs", PAGES.parents[2] / "tools"
    book.mkdir()
    shutil.copytree(tools, tmp_path / "tools")
    shutil.copytree(PAGES.parents[1] / "_static", book / "_static")
    config = (PAGES.parents[1] / "_config.yml").read_text().replace('&address ""', "&address https://github.com/someone/book")
    (book / "_config.yml").write_text(config.replace("bibtex_bibfiles: [references.bib]", ""))
    (book / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# A page"]}]
    cells += [{"cell_type": "code", "execution_count": None, "id": "b", "metadata": {}, "outputs": [],
               "source": [source]} for source in ("#| hide\nsecret = 1", "shown = 2")]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    (book / "page.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4,
                                                 "nbformat_minor": 5}))
    build = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(book), "-q"]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    page = (book / "_build/html/page.html").read_text()
    assert "https://colab.research.google.com/github/someone/book/blob/main/nbs/page.ipynb" in page
    assert "shown" in page and "secret" not in page
