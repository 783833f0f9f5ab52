"The pictures of the book's chapters, of images, boxes and matrices; each one call. Chapter 03 shows them."
import math
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from detr_nb.plots import class_color, text_color


def _to_array(image: Tensor) -> np.ndarray:
    "A (3, H, W) tensor as the (H, W, 3) array that matplotlib draws; raises `ValueError` for another shape."
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image to draw is a tensor of shape (3, H, W), got {tuple(image.shape)}")
    image = image.detach().cpu()
    image = image if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    return image.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def show_image(
    image: Tensor,  # (3, H, W), uint8, or float in [0, 1]
    ax: Axes | None = None,  # a new figure when None
    title: str | None = None,
) -> Axes:
    "Draw one image with the pixel (x, y) at the coordinates (x, y), so that boxes in pixels fit on it."
    array = _to_array(image)
    ax = ax or plt.subplots(figsize=(4, 4 * array.shape[0] / array.shape[1]))[1]
    height, width = array.shape[:2]
    ax.imshow(array, extent=(0, width, height, 0), interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax


def show_images(
    images: Sequence[Tensor],  # each (3, H, W); sizes may differ
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> Figure:
    "Draw images in a grid; draw more on `figure.axes`, one for each image. End the cell with a semicolon."
    if not len(images):
        raise ValueError("no images to draw")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    ratio = max(image.shape[-2] / image.shape[-1] for image in images)
    width = min(10.0, 3.4 * columns)
    figure = plt.figure(figsize=(width, rows * (width / columns * min(ratio, 2.0) + 0.25)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, image in enumerate(images):
        show_image(image, axes[index], titles[index] if titles is not None else None)
    for ax in axes[len(images) :]:
        ax.remove()
    return figure


def _caption(
    index: int,  # of the box
    labels: Int[Tensor, " N"] | None,
    names: Sequence[str] | None,
    scores: Float[Tensor, " N"] | None,
) -> str:
    "What stands at a box: the name of its class, or its number, and the score when there is one."
    parts = []
    if labels is not None:
        label = int(labels[index])
        parts.append(names[label] if names is not None and label < len(names) else str(label))
    if scores is not None:
        parts.append(f"{float(scores[index]):.2f}")
    return " ".join(parts)


def _write_caption(ax: Axes, box: Sequence[float], caption: str, color: tuple[float, float, float] | str) -> None:
    "The caption on a plate of the box's colour, at the corner where there is room for it."
    x1, y1, x2, _ = box
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    near_right = x1 - left > 0.7 * (right - left)
    near_top = y1 - top < 0.08 * (bottom - top)
    plate = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
    ax.text(min(x2, right) if near_right else max(x1, left), max(y1, top), caption, color=text_color(color), fontsize=8,
            ha="right" if near_right else "left", va="top" if near_top else "bottom", bbox=plate)


def draw_boxes(
    ax: Axes,
    boxes: Float[Tensor, "N 4"],  # xyxy, pixels of the image drawn
    labels: Int[Tensor, " N"] | None = None,
    names: Sequence[str] | None = None,  # names[label]
    scores: Float[Tensor, " N"] | None = None,
    colors: Sequence | None = None,  # one for each box; the colour of its class when None
    linestyle: str = "-",
) -> Axes:
    "Draw boxes in the colours of their classes, each with its name and score where given."
    for index, box in enumerate(torch.as_tensor(boxes).detach().cpu().tolist()):
        color = colors[index] if colors is not None else class_color(int(labels[index]) if labels is not None else 0)
        x1, y1, x2, y2 = box
        for edge, width, style in ((text_color(color), 3.2, "-"), (color, 1.8, linestyle)):
            outline = {"edgecolor": edge, "linewidth": width, "linestyle": style, "alpha": 0.5 if width > 3 else 1.0}
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **outline))
        caption = _caption(index, labels, names, scores)
        if caption:
            _write_caption(ax, box, caption, color)
    return ax


def show_matrix(
    matrix: Float[Tensor, "R C"],
    ax: Axes | None = None,
    rows: Sequence[str] | None = None,  # names of the rows
    columns: Sequence[str] | None = None,
    fmt: str = ".2f",
    limits: tuple[float | None, float | None] = (None, None),  # what the ends of the colours stand for
) -> Axes:
    "A heat map with the number written in every cell."
    values = torch.as_tensor(matrix).detach().float().cpu().numpy()
    ax = ax or plt.subplots(figsize=(1.2 + 0.62 * values.shape[1], 0.9 + 0.42 * values.shape[0]))[1]
    image = ax.imshow(values, aspect="auto", vmin=limits[0], vmax=limits[1])
    for (row, column), value in np.ndenumerate(values):
        ink = text_color(image.cmap(image.norm(value))[:3])
        ax.text(column, row, format(float(value), fmt), ha="center", va="center", color=ink, fontsize=9)
    ax.set_xticks(range(values.shape[1]), columns if columns is not None else range(values.shape[1]))
    ax.set_yticks(range(values.shape[0]), rows if rows is not None else range(values.shape[0]))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def frame_cells(
    ax: Axes,  # of `show_matrix`
    cells: Iterable[tuple[int, int]],  # (row, column)
    color: str = "crimson",
) -> Axes:
    "Draw a frame around some cells of a heat map."
    for row, column in cells:
        ax.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, fill=False, edgecolor=color, linewidth=2.5))
    return ax


def in_two_rows(figure: Figure) -> Figure:
    "The panels of `plot_log`, which its file has side by side, two above one: as large as a page can show them."
    figure.set_size_inches(7.3, 5)
    grid = figure.add_gridspec(2, 2)
    for ax, place in zip(figure.axes, (grid[0, 0], grid[0, 1], grid[1, :])):
        ax.set_subplotspec(place)
    return figure
