"""A Sphinx extension that makes the pages open anywhere: without a network, on a phone, with a screen reader.

Formulas become MathML, which browsers draw by themselves. What the theme gets wrong is mended in the finished page.
"""
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from PIL import Image

BARE = r'(<figure[^>]*>\s*)(<img [^>]*src="(_images/[^"]+\.(?:jpg|png))") />'  # pictures of one pixel per pixel
OTHERS_SCRIPTS = re.compile(r"thebe|mathjax", re.IGNORECASE)  # they ask other servers, and declare a constant twice
PARAMETERS = r"(?s)<dl>((?:\s*<dd>(?:(?!</?d[dl]>).)*</dd>)+)\s*</dl>"  # a signature of many lines
MENDS = (
    (PARAMETERS, lambda found: '<span class="sig-lines">' + re.sub("<(/?)dd>", r"<\1span>", found[1]) + "</span>"),
    (r'(<button class="[^"]*search-button-field[^>]*?) aria-label="Search"', r"\1"),  # it is labelled by what it shows
    (r'role="doc-biblioentry"', 'role="listitem"'),  # a list may hold nothing else
    (r'<div (class="sidebar-primary-item">\s*<a class="navbar-brand)', r'<div role="banner" \1'),
    (r"console\.log\(", "void("),  # a reader's console is not ours
    (r"<table(?! tabindex)", '<table tabindex="0"'),  # who has no mouse scrolls by the keyboard
    (r"<th[^>]*>\s*(?:<p>\s*</p>)?\s*</th>", "<td></td>"),  # a header that says nothing
)


def visit_math(self, node: nodes.math) -> None:
    "A formula in a line."
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    "A formula of its own, which scrolls where it is wider than the page."
    name = f' id="{node["ids"][0]}"' if node.get("ids") else ""
    self.body.append(f'<div class="math-block" tabindex="0"{name}>{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def leave_out_buttons(app, config) -> None:
    "A book without an address has no buttons that lead there; the theme would fail."
    if not config.html_theme_options.get("repository_url"):
        for name in ("repository_url", "launch_buttons"):
            config.html_theme_options.pop(name, None)


def leave_out_scripts(app, pagename, templatename, context, doctree) -> None:
    "Keep only the scripts that the page needs without a network."
    scripts = context.get("script_files", [])
    context["script_files"] = [script for script in scripts
                               if not OTHERS_SCRIPTS.search(f"{script.filename} {script.attributes}")]


def mend_pages(app, error) -> None:
    "Put right what the theme's templates and docutils write."
    def with_its_width(found: re.Match) -> str:
        "By its width the style sheet knows whether a picture scrolls on a phone; as a link keys reach it."
        with Image.open(Path(app.outdir, found[3])) as picture:
            width, height = picture.size
        style = f'style="width: {width}px; height: {height}px;"'
        return f'{found[1]}<a class="reference internal image-reference" href="{found[3]}">{found[2]} {style} /></a>'

    for path in [] if error else Path(app.outdir).glob("*.html"):
        page = re.sub(BARE, with_its_width, path.read_text(encoding="utf-8"))
        for wrong, right in MENDS:
            page = re.sub(wrong, right, page)
        path.write_text(page, encoding="utf-8")
    for name in [] if error else ("scripts/pydata-sphinx-theme.js", "togglebutton.js"):
        path = Path(app.outdir, "_static", name)
        path.write_text(path.read_text(encoding="utf-8").replace("console.log(", "void("), encoding="utf-8")


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("config-inited", leave_out_buttons, priority=100)
    app.connect("html-page-context", leave_out_scripts, priority=900)
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
