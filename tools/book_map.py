"""Draw the map of DETR that chapters open with, once for each part: nbs/images/map-PART.png, and map.png with none.

    python tools/book_map.py

Three columns, so that its words can be read on a phone as well.
"""
import math
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from PIL import Image

from detr_nb.plots import CLASS_COLORS

IMAGES = Path(__file__).resolve().parent.parent / "nbs/images"
INK, QUIET, ACCENT = "#2B2F36", "#8A93A0", "#C44601"  # text and lines; what stands back; the part we are at


def picture_scene(ax: Axes) -> None:
    "A landscape with a ball and a tent, standing for any photograph."
    ax.add_patch(Rectangle((0, 0.35), 1, 0.65, color="#CFE6F5"))
    ax.add_patch(Rectangle((0, 0), 1, 0.4, color="#CBDDB3"))
    ax.add_patch(Polygon([(0.5, 0.2), (0.72, 0.82), (0.94, 0.2)], color=CLASS_COLORS[3]))
    ax.scatter([0.26], [0.36], s=170, color=CLASS_COLORS[0])


def picture_features(ax: Axes) -> None:
    "Feature maps that shrink in size while they grow in channels."
    for x, height, depth in ((0.0, 1.0, 0.04), (0.17, 0.78, 0.08), (0.38, 0.56, 0.14), (0.66, 0.36, 0.26)):
        low = 0.5 - height / 2
        ax.add_patch(Rectangle((x, low), depth, height, color=CLASS_COLORS[4]))
        top = [(x, low + height), (x + 0.07, low + height + 0.07), (x + depth + 0.07, low + height + 0.07)]
        ax.add_patch(Polygon([*top, (x + depth, low + height)], color="#9AD3F0"))


def picture_waves(ax: Axes) -> None:
    "Sines of falling frequency."
    x = np.linspace(0, 1, 120)
    for place, waves in enumerate((4.0, 2.0, 1.0)):
        wave = 0.84 - 0.34 * place + 0.13 * np.sin(2 * np.pi * waves * x)
        ax.plot(x, wave, color=CLASS_COLORS[place], linewidth=1.8)


def picture_self_attention(ax: Axes) -> None:
    "Every token looks at every token."
    places = np.linspace(0.06, 0.94, 5)
    for start in places:
        for end in places:
            ax.plot([start, end], [0.14, 0.86], color=QUIET, linewidth=0.6)
    token = {"s": 48, "marker": "s", "color": CLASS_COLORS[4], "edgecolor": INK, "linewidth": 0.6, "zorder": 3}
    for height in (0.14, 0.86):
        ax.scatter(places, [height] * 5, **token)


def picture_queries(ax: Axes) -> None:
    "A few queries look at all tokens of the image."
    tokens, queries = np.linspace(0.06, 0.94, 5), np.linspace(0.2, 0.8, 3)
    for query, color in zip(queries, (CLASS_COLORS[0], CLASS_COLORS[1], CLASS_COLORS[3])):
        for token in tokens:
            ax.plot([query, token], [0.14, 0.86], color=color, linewidth=0.7, alpha=0.8)
        ax.scatter([query], [0.14], s=70, color=color, edgecolor=INK, linewidth=0.6, zorder=3)
    ax.scatter(tokens, [0.86] * 5, s=48, marker="s", color=CLASS_COLORS[4], edgecolor=INK, linewidth=0.6, zorder=3)


def picture_heads(ax: Axes) -> None:
    "A distribution over classes, and a box."
    ax.bar([0.1, 0.3, 0.5, 0.7, 0.9], [0.06, 0.32, 0.08, 0.04, 0.1], width=0.14, bottom=0.6, color=CLASS_COLORS[0])
    ax.plot([0, 1], [0.6, 0.6], color=INK, linewidth=0.8)
    ax.add_patch(Rectangle((0.2, 0.02), 0.6, 0.4, fill=False, linewidth=2, edgecolor=CLASS_COLORS[0]))
    ax.scatter([0.5], [0.22], s=14, color=CLASS_COLORS[0])


def picture_matching(ax: Axes) -> None:
    "Four queries on the left, two objects on the right, two pairs."
    queries, objects = np.linspace(0.92, 0.08, 4), (0.72, 0.28)
    for query in queries:
        for thing in objects:
            ax.plot([0.15, 0.85], [query, thing], color=QUIET, linewidth=0.5)
    for query, thing, color in ((queries[0], objects[1], CLASS_COLORS[0]), (queries[2], objects[0], CLASS_COLORS[3])):
        ax.plot([0.15, 0.85], [query, thing], color=color, linewidth=2.6)
    ax.scatter([0.15] * 4, queries, s=46, color="white", edgecolor=INK, zorder=3)
    ax.scatter([0.85] * 2, objects, s=64, marker="s", color=[CLASS_COLORS[3], CLASS_COLORS[0]], edgecolor=INK, zorder=3)


def picture_loss(ax: Axes) -> None:
    "A loss that falls."
    x = np.linspace(0, 1, 60)
    ax.plot([0, 0, 1], [1, 0, 0], color=INK, linewidth=1)
    ax.plot(x, 0.12 + 0.8 * np.exp(-4 * x) + 0.03 * np.sin(45 * x), color=CLASS_COLORS[3], linewidth=2)


def picture_precision(ax: Axes) -> None:
    "Precision over recall, and the area under it."
    recall, precision = [0, 0.35, 0.35, 0.6, 0.6, 0.85, 0.85], [0.95, 0.95, 0.75, 0.75, 0.5, 0.5, 0]
    ax.fill_between(recall, precision, color=CLASS_COLORS[2], alpha=0.35)
    ax.plot(recall, precision, color=CLASS_COLORS[2], linewidth=2)
    ax.plot([0, 0, 1], [1, 0, 0], color=INK, linewidth=1)


WIDTH, HEIGHT, X, Y = 2.3, 1.75, (0.35, 3.15, 5.95), (5.0, 2.65, 0.3)  # size of a part; columns; rows
PARTS = {  # column, row, title, what it is, picture
    "data": (0, 0, "data", "image", picture_scene),
    "backbone": (1, 0, "backbone", "CNN, shrinks by 32", picture_features),
    "position_encoding": (2, 0, "position encoding", "where is each token?", picture_waves),
    "encoder": (0, 1, "encoder", "tokens meet tokens", picture_self_attention),
    "decoder": (1, 1, "decoder", "queries ask the image", picture_queries),
    "heads": (2, 1, "heads", "class and box", picture_heads),
    "matcher": (0, 2, "matcher", "who answers for what?", picture_matching),
    "criterion": (1, 2, "criterion", "the set loss", picture_loss),
    "evaluation": (2, 2, "evaluation", "average precision", picture_precision),
}


def draw_part(ax: Axes, part: str, here: str | None) -> None:
    "One part of the map: the one we are at stands out, the others then stand back behind a veil."
    column, row, title, caption, picture = PARTS[part]
    x, y = X[column], Y[row]
    face, edge = ("#FFF1DC", ACCENT) if part == here else ("#F6F7F9", "#B4BBC5")
    frame = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": face, "edgecolor": edge}
    ax.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, linewidth=2.6 if part == here else 1.0, **frame))
    inset = ax.inset_axes((x + 0.35, y + 0.42, WIDTH - 0.7, HEIGHT - 0.85), transform=ax.transData)
    inset.set(xlim=(-0.02, 1.02), ylim=(0, 1.05))
    inset.set_axis_off()
    picture(inset)
    if here not in (None, part):
        inset.add_patch(Rectangle((-0.1, -0.1), 1.2, 1.25, color=face, alpha=0.55, zorder=9, clip_on=False))
    middle, ink = x + WIDTH / 2, ACCENT if part == here else INK
    ax.text(middle, y + HEIGHT - 0.22, title, ha="center", va="center", weight="bold", color=ink, fontsize=11.5)
    ax.text(middle, y + 0.2, caption, ha="center", va="center", color=INK, fontsize=10)


def draw_arrow(ax: Axes, *corners: tuple[float, float], color: str = INK) -> None:
    "A line through the corners that ends in an arrow head."
    (x1, y1), (x2, y2) = corners[-2:]
    ax.plot(*zip(*corners), color=color, linewidth=1.5, solid_joinstyle="round", zorder=1)
    head = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    length = math.dist((x1, y1), (x2, y2))
    neck = (x2 - 0.2 * (x2 - x1) / length, y2 - 0.2 * (y2 - y1) / length)
    ax.annotate("", (x2, y2), neck, arrowprops=head, zorder=1)


def draw_flow(ax: Axes) -> None:
    "What travels between the parts: the image, its tokens, the guesses, and the true objects."
    rows, middles = [y + HEIGHT / 2 for y in Y], [x + WIDTH / 2 for x in X]
    for row in range(3):
        for column in range(2 if row < 2 else 1):
            draw_arrow(ax, (X[column] + WIDTH, rows[row]), (X[column + 1], rows[row]))
    for row in range(2):  # the end of a row goes on at the beginning of the next
        between = (Y[row] + Y[row + 1] + HEIGHT) / 2
        draw_arrow(ax, (middles[2], Y[row]), (middles[2], between), (middles[0], between),
                   (middles[0], Y[row + 1] + HEIGHT))
    draw_arrow(ax, (middles[1], (Y[1] + Y[2] + HEIGHT) / 2), (middles[1], Y[2] + HEIGHT))
    draw_arrow(ax, (middles[2], (Y[1] + Y[2] + HEIGHT) / 2), (middles[2], Y[2] + HEIGHT))
    draw_arrow(ax, (X[0], rows[0]), (0.1, rows[0]), (0.1, rows[2]), (X[0], rows[2]), color=QUIET)
    draw_arrow(ax, (0.1, rows[2]), (0.1, 0.08), (middles[2], 0.08), (middles[2], Y[2]), color=QUIET)
    label = {"fontsize": 9.5, "color": "#5B6470", "style": "italic"}
    ax.text(middles[1], 4.75, "tokens, each with its place", ha="center", **label)
    ax.text((middles[0] + middles[1]) / 2, 2.4, "all guesses", ha="center", **label)
    ax.text(0.45, -0.16, "true objects", va="center", **label)


def draw_map(here: str | None = None) -> Figure:
    "DETR from the image to the boxes, with the part that a chapter is about marked `you are here`."
    figure = Figure(figsize=(6.6, 5.5))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 8.4), ylim=(-0.3, 6.98))
    ax.set_axis_off()
    for part in PARTS:
        draw_part(ax, part, here)
    draw_flow(ax)
    if here is not None:
        column, row, *_ = PARTS[here]
        flag = {"boxstyle": "round,pad=0.25", "facecolor": ACCENT, "edgecolor": "none"}
        ax.text(X[column] + WIDTH - 0.03, Y[row] + HEIGHT + 0.04, "you are here", color="white", fontsize=9,
                ha="right", va="center", bbox=flag, zorder=9)
    return figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in (None, *PARTS):
        file = IMAGES / (f"map-{name}.png" if name else "map.png")
        pixels = BytesIO()
        draw_map(name).savefig(pixels, dpi=110)
        Image.open(pixels).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
