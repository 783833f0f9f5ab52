"""Figures that a reader can touch: a still picture, and a script that takes its place where scripts run.

    touch("matching", "fig-matcher-game", data, still=figure, alt="Six boxes ...")

shows `touch/matching.js`, which stands on `touch/touch.js`. All of it, with the data, goes into the cell's output: the
page needs no network and no other file. Caption and number are the cell's `#| fig-cap` and `#| label`, as ever.
"""
import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "touch"
LARGEST = 300_000  # bytes of a figure


def _shorten(source: str) -> str:
    "JavaScript or CSS of ours without comments that stand on lines of their own, indentation and the library's import."
    source = re.sub(r'^import [^;]*? from "\./touch\.js";\n', "", source, flags=re.MULTILINE)
    source = re.sub(r"^\s*/\*.*?\*/\n", "", source, flags=re.MULTILINE | re.DOTALL)
    lines = (re.sub(r"^//.*|  // .*", "", line.strip()) for line in source.splitlines())
    return "\n".join(line for line in lines if line)


def script(name: str) -> str:
    "A figure's source and the library's, as one module that defines `render`."
    return "\n".join(_shorten((SOURCES / f"{part}.js").read_text(encoding="utf-8")) for part in ("touch", name))


def style() -> str:
    "The style sheet of all figures."
    return _shorten((SOURCES / "touch.css").read_text(encoding="utf-8"))


def _address(kind: str, data: bytes) -> str:
    "Bytes as an address that holds them."
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: UInt8[Tensor, "3 H W"], quality: int = 90) -> str:
    "An image as an address, for an <image> of a figure."
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "webp", quality=quality)
    return _address("image/webp", data.getvalue())


def _plain(value: Any) -> Any:
    "Tensors and arrays as lists of whole numbers, or of numbers of six digits."
    if value.ndim:
        return [_plain(row) for row in value]
    return value.item() if isinstance(value.item(), int) else float(f"{value.item():.6g}")


class Touch:
    "One figure, as a notebook shows it."

    def __init__(self, text: str, alt: str):
        self.text, self.alt = text, alt

    def _repr_html_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"A figure to touch: {self.alt}"


def touch(
    name: str,  # of the script in `touch/`
    label: str,  # of the cell, `fig-...`
    data: dict[str, Any],  # what the script reads: numbers, texts, lists, tensors
    still: Figure,  # seen where scripts do not run, and before they do
    alt: str,  # what the still picture shows
) -> Touch:
    "Make a figure one can touch; raises `ValueError` where it would be larger than 300 kB."
    drawn = io.BytesIO()
    still.savefig(drawn, format="webp", dpi=100, bbox_inches="tight", pil_kwargs={"quality": 80})
    plt.close(still)
    width, height = Image.open(drawn).size
    numbers = json.dumps(data, default=_plain, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    text = f"""<style>{style()}</style>
<div class="touch" id="touch-{label}"><img alt="{html.escape(alt)}" src="{_address("image/webp", drawn.getvalue())}"\
 width="{width}" height="{height}"></div>
<script type="application/json" id="touch-{label}-data">{numbers}</script>
<script type="module">{script(name)}
start("touch-{label}", render);</script>"""
    if len(text.encode()) > LARGEST:
        raise ValueError(f"the figure {label} has {len(text.encode())} bytes, more than {LARGEST}: give it less data")
    return Touch(text, alt)
