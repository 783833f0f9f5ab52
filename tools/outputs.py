"""What notebooks have saved: is it still what their cells say, how large is it, and when was it made?"""
import base64
import importlib.metadata
import io
import os
import platform
import re
import time

import numpy as np
from PIL import Image

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
TIME = re.compile(rf"{NUMBER.pattern}(?= ?(?:ms|s|seconds?|minutes?|hours?)\b)", re.IGNORECASE)
RELATIVE = 1e-3  # what another processor's order of adding may change, in a number that is printed with its digits
ROUNDING = 1e-5  # below it a number tells how far two results are apart; only that it is small can be repeated


def text_of(outputs: list[dict]) -> str:
    "All that a cell has printed or shown as text, but for warnings: those are the machine's, and name its folders."
    texts = []
    for output in (output for output in outputs if output.get("name") != "stderr"):
        data = output.get("data", {})
        is_picture = any(kind.startswith("image/") for kind in data)  # its textual twin says nothing
        shown = "" if is_picture else data.get("text/plain", "")
        texts.append("".join(output.get("text", "")) + "".join(shown))
    return "\n".join(texts)


def close(saved: str, found: str) -> bool:
    "Whether two printed numbers are the same but for what another processor may change."
    a, b = (float(number.replace(",", "")) for number in (saved, found))
    if max(abs(a), abs(b)) < ROUNDING:
        return True
    mantissa, _, power = saved.lower().partition("e")
    last_digit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    whole = "." not in saved + found and "e" not in (saved + found).lower()
    return a == b if whole else abs(a - b) <= max(1.01 * last_digit, RELATIVE * max(abs(a), abs(b)))


def difference(saved: str, found: str, numbers: bool = True) -> str | None:
    "What has changed between two printed texts, in a line; None if they say the same. Without `numbers`, words only."
    saved, found = (TIME.sub("TIME", text) for text in (saved, found))
    words = [" ".join(NUMBER.sub(" # ", text).split()) for text in (saved, found)]
    if words[0] != words[1]:
        place = next((i for i, (a, b) in enumerate(zip(*words)) if a != b), min(map(len, words)))
        start = max(0, place - 20)
        return f"saved ...{words[0][start:place + 60]!r}, now ...{words[1][start:place + 60]!r}"
    pairs = zip(NUMBER.findall(saved), NUMBER.findall(found))
    apart = [f"{a}, now {b}" for a, b in pairs if numbers and not close(a, b)]
    return f"saved {'; '.join(apart[:4])}" if apart else None


def shrink_picture(png: bytes) -> bytes:
    "A PNG in the fewest colours, 32 to 256, with which one sees no difference; as it was where that saves nothing."
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P" or (picture.mode == "RGBA" and picture.getextrema()[3][0] < 255):
        return png  # it was made small before, or one sees through it
    picture = picture.convert("RGB")
    drawn = picture.getcolors(6000) is not None  # lines and areas, with the mixtures at their edges; else a photograph
    for colours in (32, 64, 128, 256) if drawn else (160, 256):
        small = picture.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
        apart = np.abs(np.asarray(small.convert("RGB"), np.int16) - np.asarray(picture, np.int16)).max(-1)
        levels = min(8, colours / 20)  # of 255: few colours are for lines on white
        if apart.mean() < levels and np.percentile(apart, 99.5) < 32:
            file = io.BytesIO()
            small.save(file, "PNG", optimize=True)
            return file.getvalue() if len(file.getvalue()) < 0.95 * len(png) else png
    return png


def shrink_photo(jpeg: bytes) -> bytes:
    "A JPEG in quality 68; as it was where it has that, or a lower one, or nothing is saved."
    picture, file = Image.open(io.BytesIO(jpeg)), io.BytesIO()
    picture.save(file, "JPEG", quality=68, optimize=True, progressive=True)
    made = Image.open(io.BytesIO(file.getvalue()))
    finer = sum(picture.quantization[0]) < sum(made.quantization[0])
    return file.getvalue() if finer and len(file.getvalue()) < len(jpeg) else jpeg


def shrink(notebook) -> None:
    "Every saved picture with no more bytes than one sees."
    for cell in notebook["cells"]:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            for kind, smaller in (("image/png", shrink_picture), ("image/jpeg", shrink_photo)):
                if kind in data:
                    saved = base64.b64decode("".join(data[kind]))
                    if (small := smaller(saved)) is not saved:
                        data[kind] = base64.b64encode(small).decode()


def made_with() -> dict[str, str]:
    "What one must know to judge outputs: the day, the versions, and a machine without its name."
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "numpy"))
    return {"date": time.strftime("%Y-%m-%d"), "versions": f"Python {platform.python_version()}, {versions}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
