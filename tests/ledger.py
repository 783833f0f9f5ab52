"""The parity ledger: how far detr_nb is from independent implementations, row by row.

`nbs/parity.csv` holds the largest differences that were measured when it was last written, and the book shows it. A
test that compares with a reference calls `ledger.compare`, which fails when the difference is beyond what the project
promises, or more than ten times the committed one. To write the file anew, after looking at why it changed:

    WRITE_LEDGER=1 pytest tests/test_parity*.py tests/test_evaluation.py tests/test_export.py
"""
import csv
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DIFFERENCES, DEPARTURES = ROOT / "nbs/parity.csv", ROOT / "nbs/parity_departures.csv"
WRITE = bool(os.environ.get("WRITE_LEDGER"))


def with_version(package: str, name: str | None = None) -> str:
    "How the ledger calls a reference."
    try:
        return f"{name or package} {version(package)}"
    except PackageNotFoundError:  # its tests are skipped
        return f"{name or package} missing"


TRANSFORMERS, PLAIN = with_version("transformers"), with_version("torch", "plain torch")
PILLOW, PYCOCOTOOLS = with_version("pillow", "Pillow"), with_version("pycocotools")
ONNXRUNTIME, TORCH = with_version("onnxruntime"), with_version("torch")


class Component(NamedTuple):
    "What is compared, how, and the largest difference that the project promises."
    measure: str  # "absolute"; "relative" to the reference's largest value; "norm" of the difference over that of it
    promised: dict[str, float]  # by precision; the name "" where there is only one
    references: tuple[str, ...] = ("transformers", "plain torch")


def each(measure: str, float32: float, float64: float = 1e-10) -> Component:
    "In both precisions, against both references."
    return Component(measure, {"float32": float32, "float64": float64})


COMPONENTS = {
    "backbone features": each("relative", 1e-5),
    "position encoding, sine": each("absolute", 1e-5),
    "position encoding, learned": each("absolute", 1e-5),
    "encoder memory": each("relative", 1e-5),
    "decoder layers": each("relative", 1e-5),
    "logits": each("absolute", 1e-5),
    "boxes": each("absolute", 1e-5),
    "last layer, no auxiliary outputs": each("absolute", 1e-5),
    "matching, pairs that differ": each("absolute", 0, 0),
    "loss_ce": each("relative", 1e-6),
    "loss_bbox": each("relative", 1e-6),
    "loss_giou": each("relative", 1e-6),
    "cardinality_error": Component("absolute", {"": 0}, ("transformers", "plain torch")),
    "class_error": Component("absolute", {"": 0}, ("plain torch",)),
    "gradient of loss_ce": each("relative", 1e-5),
    "gradient of loss_bbox": each("relative", 1e-5),
    "gradient of loss_giou": each("relative", 1e-5),
    "gradient, all weights together": each("norm", 1e-5),
    # in float32 some gradients are further than 1e-5 from themselves in double precision, ours, the reference's alike:
    # of the first queries' and keys' matrices 1.2e-5, 1.2e-5, of the mask head 1.0e-5, 0.9e-5 (on an Intel Xeon)
    "gradient, each weight by itself": each("norm", 2e-5),
    "mask logits": Component("absolute", {"float32": 1e-4, "float64": 1e-10}, ("transformers",)),
    "loss_mask": Component("relative", {"float32": 1e-6, "float64": 1e-10}, ("transformers",)),
    "loss_dice": Component("relative", {"float32": 1e-6, "float64": 1e-10}, ("transformers",)),
    "gradient of the mask losses": Component("norm", {"float32": 2e-5, "float64": 1e-10}, ("transformers",)),
    "post-processing, scores": each("absolute", 1e-5),
    "post-processing, boxes": each("relative", 1e-5),
    "resized images, grey levels": Component("absolute", {"": 1}, ("Pillow",)),
    "resized images, mean grey levels": Component("absolute", {"": 0.2}, ("Pillow",)),
    "resized images, exact mode": Component("absolute", {"": 0}, ("Pillow",)),
    "sizes after resizing, pixels": Component("absolute", {"": 0}, ("plain torch",)),
    "boxes after transforms": Component("relative", {"": 1e-6}, ("plain torch",)),
    "COCO metrics": Component("absolute", {"": 0}, ("pycocotools",)),
    "exported program": Component("absolute", {"": 1e-5}, ("torch",)),
    "ONNX, logits and boxes": Component("absolute", {"": 1e-4}, ("onnxruntime",)),
    **{f"{model}, {what}": Component(measure, {"float64": 1e-10}, ("transformers",))
       for model in ("conditional", "dab") for what, measure in (
           ("logits and boxes", "absolute"), ("losses", "relative"), ("gradient of all weights", "norm"))},
    **{f"class_loss {name}": Component("relative", {"float64": 1e-10}, ("transformers",))
       for name in ("focal", "ia_bce", "vfl", "mal")},
    **{f"deformable, {kind}, {what}": Component(measure, {"float64": 1e-10}, ("transformers",))
       for kind in ("one level", "four levels", "refined", "two stages") for what, measure in (
           ("logits and boxes", "absolute"), ("losses", "relative"), ("gradient of all weights", "norm"))},
    "deformable attention": Component("absolute", {"float64": 1e-10}, ("plain torch",)),
    "groups, pairs that differ": Component("absolute", {"float64": 0}, ("transformers",)),
    "groups, losses": Component("relative", {"float64": 1e-10}, ("plain torch",)),
    "repeated targets, losses": Component("relative", {"float64": 1e-10}),
    "repeated targets, gradients": Component("relative", {"float64": 1e-10}, ("transformers",)),
    "box_bias, attention": Component("absolute", {"float64": 1e-10}, ("plain torch",)),
    "denoising, labels and boxes": Component("absolute", {"float64": 1e-10}, ("transformers", "plain torch")),
    "denoising, mask and places": Component("absolute", {"float64": 0}, ("transformers",)),
    "denoising, losses": Component("relative", {"float64": 1e-10}, ("plain torch",)),
    "denoising, gradients": Component("relative", {"float64": 1e-10}, ("plain torch",)),
}
COLUMNS = ("component", "reference", "float32, absolute", "float32, relative", "float64, absolute", "float64, relative",
           "promised")


class Row(NamedTuple):
    "The largest differences over all comparisons of one component with one reference in one precision."
    reference: str  # with its version
    absolute: float = 0.0
    relative: float = 0.0


def difference(ours: Tensor, theirs: Tensor, measure: str) -> tuple[float, float, float]:
    "The absolute and the relative difference, and what the relative one is relative to."
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    if not ours.numel():
        return 0.0, 0.0, 0.0
    ours, theirs = ours.detach().double().flatten(), theirs.detach().double().flatten()
    order = 2 if measure == "norm" else float("inf")
    distance, scale = float((ours - theirs).norm(order)), float(theirs.norm(order))
    relative = distance / scale if scale else float("inf") if distance else 0.0
    return float((ours - theirs).abs().max()), relative, scale


class Ledger:
    "Measures, compares with what is committed, and writes it anew when told."

    def __init__(self):
        self.measured: dict[tuple[str, str, str], Row] = {}
        self.departures: dict[str, list[str]] = {}
        self.committed: dict[tuple[str, str, str], Row] = {}
        for component, reference, *numbers, _ in read_table(DIFFERENCES):
            single = component in COMPONENTS and "" in COMPONENTS[component].promised
            measured = {"" if single else "float32": numbers[:2], "float64": numbers[2:]}
            for precision, (absolute, relative) in measured.items():
                if absolute:
                    key = component, reference.rsplit(" ", 1)[0], precision
                    self.committed[key] = Row(reference, float(absolute), float(relative or "inf"))

    def compare(
        self,
        component: str,  # a key of COMPONENTS
        ours: Tensor | Sequence[Tensor],
        theirs: Tensor | Sequence[Tensor],
        reference: str,  # name and version
    ) -> None:
        "Fail when ours is too far from theirs, each tensor for itself; note how far it is."
        pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
        measure, promised, _ = COMPONENTS[component]
        precision = str(pairs[0][0].dtype).removeprefix("torch.") if "" not in promised else ""
        key = component, reference.rsplit(" ", 1)[0], precision
        assert key[:2] in expected_rows() and precision in promised, f"the ledger has no row for {key}"
        for mine, other in pairs:
            absolute, relative, scale = difference(mine, other, measure)
            before = self.measured.get(key, Row(reference))
            self.measured[key] = Row(reference, max(before.absolute, absolute), max(before.relative, relative))
            found = absolute if measure == "absolute" else relative
            limit = self.limit(key, scale)
            assert found <= limit, f"{component}: {measure} difference {found:.1e} to {reference}, allowed {limit:.1e}"

    def limit(self, key: tuple[str, str, str], scale: float) -> float:
        "What is promised, or ten times what is committed if that is less; rounding is always allowed."
        component, _, precision = key
        measure, promised, _ = COMPONENTS[component]
        if WRITE or key not in self.committed:
            return promised[precision]
        committed = self.committed[key].absolute if measure == "absolute" else self.committed[key].relative
        rounding = 32 * torch.finfo(getattr(torch, precision or "float32")).eps
        return min(promised[precision], max(10 * committed, rounding * (scale if measure == "absolute" else 1)))

    def depart(self, what: str, released: str, transformers: str, ours: str, measured: str) -> None:
        "Note a place where one of the three does something else; the test that calls has shown it."
        self.departures[what] = [what, released, transformers, ours, measured]
        if not WRITE:
            assert self.departures[what] in read_table(DEPARTURES), f"{what}: the committed row says something else"

    def write(self) -> None:
        "The measured rows take the places of the committed ones."
        rows, lines = self.committed | self.measured, []
        for component, reference in expected_rows():
            measure, promised, _ = COMPONENTS[component]
            found = [rows.get((component, reference, precision)) for precision in ("float32", "float64")]
            found[0] = rows.get((component, reference, ""), found[0])
            if any(found):
                numbers = [show(number) if row else "" for row in found for number in (row or Row(""))[1:]]
                limits = " / ".join(f"{limit:g}".replace("e-0", "e-") for limit in promised.values()) + f" {measure}"
                name = next(row.reference for row in found if row)
                lines.append([component, name, *numbers, limits if any(promised.values()) else "equal"])
        write_table(DIFFERENCES, COLUMNS, lines)
        kept = {line[0]: line for line in read_table(DEPARTURES)} | self.departures
        header = ("where", "released code", TRANSFORMERS, "detr_nb", "measured")
        write_table(DEPARTURES, header, sorted(kept.values()))


def show(number: float) -> str:
    "Two digits; nothing for a share of nothing."
    if number == float("inf"):
        return ""
    return f"{number:.2g}" if number == 0 or 0.01 <= number < 100 else f"{number:.1e}".replace("e-0", "e-")


def expected_rows() -> list[tuple[str, str]]:
    "Component and reference without version: every row that the ledger must have."
    return [(name, reference) for name, kind in COMPONENTS.items() for reference in kind.references]


def read_table(path: Path) -> list[list[str]]:
    "The lines of a CSV file without its header; none when there is no such file."
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def write_table(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])
