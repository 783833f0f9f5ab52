"""The page on which a DETR runs in the browser: its weights, its JavaScript beside Python, what a reader does with it.

The tests marked `book` need Chromium; those that open the page need it built, as `make test-book` does.
"""
import base64
import json
from functools import reduce

import numpy as np
import pytest
import torch
from book_live import LIMIT, WEIGHTS, in_eight_bits, pack, unpack
from test_book import PAGES, browser  # noqa: F401  (a fixture)
from test_book import pytestmark as marks

from detr_nb.batching import Targets, pad_images
from detr_nb.coco import CocoDataset
from detr_nb.detr import Predictions, build_detr
from detr_nb.distributed import UserError
from detr_nb.evaluation import CocoEvaluator, postprocess
from detr_nb.layouts import architecture
from detr_nb.matcher import match, matching_cost
from detr_nb.shapes import CATEGORIES, _blend, _Pose, _signed_distance, boxes_around, draw_scene, texture
from detr_nb.transformer import record_attention

KINDS = list(CATEGORIES.values())
STATIC = WEIGHTS.parent
MODES = {"desk, light": ((1280, 900), "light"), "desk, dark": ((1280, 900), "dark"),
         "phone, light": ((390, 844), "light"), "phone, dark": ((390, 844), "dark")}


def in_browser(test):
    "Mark a test as one that needs Chromium."
    return reduce(lambda test, mark: mark(test), marks, test)


@pytest.fixture(scope="module")
def packed():
    return unpack(WEIGHTS.read_text(encoding="utf-8"))


def checkpoint_of(model, names) -> dict:
    "What a run saves of its model, as far as `pack` reads it."
    return {"format": "detr_nb", "version": 1, "model": model.state_dict(), "architecture": architecture(model),
            "preprocessing": {"short_side": None, "max_size": 160},
            "classes": {"ids": list(range(len(names))), "names": names}}


def test_eight_bits_are_off_by_half_a_step_at_most():
    matrix = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0
    scales, bits = in_eight_bits(matrix)
    assert bits.dtype == torch.int8 and bits.shape == matrix.shape
    off = (bits * scales[:, None, None, None] - matrix).abs().flatten(1).amax(1)
    assert (off <= 0.501 * matrix.flatten(1).abs().amax(1) / 127).all()


def test_the_packed_weights_can_be_packed_again(packed):
    model, names = packed
    script = pack(checkpoint_of(model, names))
    assert len(script) <= LIMIT
    again, names_again = unpack(script)
    assert names_again == names == KINDS
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_model_that_the_page_cannot_run_is_refused():
    other = build_detr(6, "small", position_embedding="learned", hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1,
                       dim_feedforward=32)
    with pytest.raises(UserError, match="sine positions"):
        pack(checkpoint_of(other, KINDS))


# ---- the JavaScript beside Python

@pytest.fixture(scope="module")
def scripts(browser):  # noqa: F811
    "An empty page with the three scripts, and the model as `model`."
    page = browser.new_page()
    page.set_content("<!doctype html><html lang=en><title>t</title></html>")
    for name in ("detr.js", "scene.js", "weights.js"):
        page.add_script_tag(path=STATIC / name)
    page.evaluate("async () => { const { unpack, build } = liveDetr(); model = build(await unpack(liveWeights));"
                  " artist = liveScene(); }")
    yield page
    page.close()


def in_javascript(scripts, image: torch.Tensor) -> dict:
    "What the page's model answers for one image."
    pixels = torch.cat([image, torch.full_like(image[:1], 255)]).permute(1, 2, 0).contiguous().numpy()
    return scripts.evaluate("""([data, width, height]) => {
        const pixels = Uint8ClampedArray.from(atob(data), letter => letter.charCodeAt(0));
        const answer = model(pixels, width, height);
        return Object.fromEntries(Object.entries(answer).map(([key, value]) =>
            [key, Array.isArray(value) ? value.map(layer => Array.from(layer)) : value]));
    }""", [base64.b64encode(pixels.tobytes()).decode(), image.shape[2], image.shape[1]])


@in_browser
def test_logits_boxes_and_every_attention_are_those_of_python(scripts, packed, record_property):
    model, _ = packed
    largest = dict.fromkeys(("logits", "boxes", "attended", "talked", "looked"), 0.0)
    names = {"attended": "encoder.layers.{}.self_attn", "talked": "decoder.layers.{}.self_attn",
             "looked": "decoder.layers.{}.multihead_attn"}
    shapes = set()
    for index in range(8):
        image = draw_scene(0, index, "val").image
        shapes.add(tuple(image.shape))
        with torch.no_grad(), record_attention(model.transformer) as attention:
            answer = model(pad_images([image])[0])
        wanted = {"logits": answer.logits, "boxes": answer.boxes}
        found = in_javascript(scripts, image)
        for key, name in names.items():
            wanted[key] = torch.stack([attention[name.format(layer)] for layer in range(len(found[key]))])
        for key, values in wanted.items():
            off = (torch.tensor(found[key]).view_as(values) - values).abs().max().item()
            largest[key] = max(largest[key], off)
    record_property("largest difference", largest)
    print("largest difference:", {key: f"{value:.1e}" for key, value in largest.items()})
    assert len(shapes) >= 4
    assert max(largest.values()) < 1e-3, largest


class _Told:
    "A generator of random numbers that gives what it is told."

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def uniform(self, *_):
        return self.numbers.pop(0)


@in_browser
def test_shapes_are_drawn_as_the_set_draws_them(scripts):
    height, width, rng = 112, 144, np.random.default_rng(0)
    ys, xs = np.ogrid[:height, :width]
    picture = np.full((height, width, 3), 90, dtype=np.float64)
    owner, shapes = np.zeros((height, width), dtype=int), []
    for index, kind in enumerate(KINDS):
        pose = _Pose(*rng.uniform([20, 20], [width - 20, height - 20]), rng.uniform(12, 30), rng.uniform(0.65, 1), 0.0)
        pose = pose._replace(angle=rng.uniform(0, 6.28) if index < 4 else 0.0)
        name = ["stripes", "checks", "dots", None, "checks", "dots"][index]
        color, second, edge = rng.uniform(20, 235, (3, 3))
        period, turn, first, other = 9.0, 0.7, 1.1, 2.3
        distance = _signed_distance(kind, pose, xs + 0.5, ys + 0.5)
        fill = np.broadcast_to(color, picture.shape)
        if name:  # the page's texture has its origin in the shape, and turns with it
            angle, frequency = turn + pose.angle, 2 * np.pi / period
            first_here = first - frequency * (np.cos(angle) * pose.x + np.sin(angle) * pose.y)
            other_here = other - frequency * (np.cos(angle) * pose.y - np.sin(angle) * pose.x)
            share = texture(name, height, width, _Told(period, angle, first_here, other_here), (5, 12))
            fill = _blend(share, color, second)
        thickness = 1.7 if index % 2 else 0.0
        fill = np.where((distance > -thickness)[..., None] & (thickness > 0), edge, fill)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture += cover * (fill - picture)
        owner[distance <= 0] = index + 1
        shapes.append({"kind": kind, **pose._asdict(), "color": color.tolist(), "second": second.tolist(),
                       "pattern": name and {"kind": name, "period": period, "angle": turn, "phases": [first, other]},
                       "outline": {"thickness": thickness, "color": edge.tolist()} if thickness else None})
    light = 1 + np.linspace(-1, 1, width) * 0.1 - np.linspace(-1, 1, height)[:, None] * 0.05
    plain = {"kind": "stripes", "period": 9, "angle": 0, "phases": [0, 0], "seed": 0}
    scene = {"width": width, "height": height, "tilt": [0.1, -0.05], "noise": 0, "seed": 1, "shapes": shapes,
             "ground": [{"first": [90] * 3, "second": [90] * 3, "pattern": plain, "border": None}]}
    found = scripts.evaluate("scene => { const { pixels, owner, boxes } = artist.paint(scene);"
                             " return { pixels: Array.from(pixels), owner: Array.from(owner), boxes }; }", scene)
    pixels = np.array(found["pixels"]).reshape(height, width, 4)[..., :3]
    off = np.abs(pixels - np.clip(picture * light[..., None], 0, 255).round())
    assert off.max() <= 1, off.max()
    assert (np.array(found["owner"]).reshape(height, width) == owner).all()
    masks = owner == np.arange(1, len(KINDS) + 1)[:, None, None]
    seen = [index for index, mask in enumerate(masks) if mask.any()]
    assert [index for index, box in enumerate(found["boxes"]) if box] == seen and len(seen) > 3
    assert [found["boxes"][index] for index in seen] == boxes_around(masks[seen]).tolist()


@in_browser
def test_grain_is_as_coarse_and_as_strong_as_the_sets(scripts):
    rng = np.random.default_rng(0)
    ours = np.stack([texture("grain", 112, 144, rng, (9, 9)) for _ in range(20)])
    theirs = np.array(scripts.evaluate("""[...Array(20).keys()].map(i => {
        const pattern = { kind: "grain", period: 9, seed: i * 7919 }, pixels = [];
        for (let y = 0; y < 112; y++) for (let x = 0; x < 144; x++) pixels.push(artist.texture(pattern, x, y));
        return pixels; })""")).reshape(20, 112, 144)
    for measure in (np.mean, np.std, lambda x: np.abs(np.diff(x, axis=2)).mean()):
        assert measure(theirs) == pytest.approx(measure(ours), rel=0.05)


def precision(model, scenes: list[tuple], folder) -> float:
    "COCO's AP of the model on images with boxes and labels."
    height, width = scenes[0][0].shape[1:]
    images = [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(1, len(scenes) + 1)]
    annotations = [{"image_id": i, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0,
                    "area": (x2 - x1) * (y2 - y1)} for i, (_, boxes, labels) in enumerate(scenes, 1)
                   for (x1, y1, x2, y2), label in zip(boxes, labels)]
    file = folder / "scenes.json"
    file.write_text(json.dumps({"images": images, "categories": [{"id": i + 1, "name": n} for i, n in enumerate(KINDS)],
                                "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)]}))
    for image in images:
        (folder / image["file_name"]).touch()
    evaluator = CocoEvaluator(CocoDataset(folder, file))
    with torch.no_grad():
        for i, (image, *_) in enumerate(scenes, 1):
            answer = model(pad_images([image])[0])
            evaluator.update(torch.tensor([i]), postprocess(answer.logits[-1], answer.boxes[-1],
                                                            torch.tensor([[height, width]])))
    return evaluator.compute()["coco_eval_bbox"][0]


@in_browser
def test_the_model_is_as_good_on_the_pages_scenes_as_on_the_sets(scripts, packed, tmp_path):
    model, count = packed[0], 120
    found = scripts.evaluate("""count => [...Array(count).keys()].map(i => {
        const scene = artist.randomScene(1000 + i, 144, 112), { pixels, boxes } = artist.paint(scene);
        return [btoa(Array.from(pixels, x => String.fromCharCode(x)).join("")), boxes, scene.shapes.map(s => s.kind)];
    })""", count)
    theirs = []
    for data, boxes, kinds in found:
        pixels = np.frombuffer(base64.b64decode(data), np.uint8).reshape(112, 144, 4)[..., :3].copy()
        seen = [(box, KINDS.index(kind)) for box, kind in zip(boxes, kinds) if box]
        theirs.append((torch.from_numpy(pixels).permute(2, 0, 1), *map(list, zip(*seen) if seen else ([], []))))
    of_set = (draw_scene(5, index, "val") for index in range(10_000))
    fitting = (scene for scene in of_set if scene.image.shape[1:] == (112, 144) and not scene.crowd.any())
    ours = [(scene.image, scene.boxes.tolist(), scene.labels.tolist()) for scene, _ in zip(fitting, range(count))]
    on_page, on_set = precision(model, theirs, tmp_path), precision(model, ours, tmp_path)
    print(f"AP on {count} scenes of the page {on_page:.3f}, on {count} of the set {on_set:.3f}")
    assert sum(len(labels) for *_, labels in theirs) > 300
    assert on_page > on_set - 0.08


# ---- what a reader does

class Reader:
    "A reader of the page, with a window of a size in a mode."

    def __init__(self, browser, mode: str):  # noqa: F811
        (width, height), self.theme = MODES[mode]
        self.context = browser.new_context(viewport={"width": width, "height": height}, has_touch=True)
        self.context.add_init_script(f"localStorage.setItem('mode', '{self.theme}');"
                                     f" localStorage.setItem('theme', '{self.theme}');")
        self.page, self.said = self.context.new_page(), []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto((PAGES / "live.html").as_uri(), wait_until="load")
        self.page.wait_for_selector(".live-picture", timeout=120_000)
        self.page.locator(".live-picture").scroll_into_view_if_needed()
        self.settle()

    def settle(self) -> None:
        "Wait until the model has answered for what is drawn now."
        self.page.wait_for_timeout(60)
        self.page.wait_for_function("document.querySelector('.live').live.settled", timeout=120_000)

    def state(self, path: str):
        return self.page.evaluate(f"document.querySelector('.live').live.{path}")

    def begin(self, name: str) -> None:
        self.page.get_by_role("combobox", name="Scene").select_option(name)
        self.page.locator(".live-picture").scroll_into_view_if_needed()
        self.settle()

    def place(self, x: float, y: float) -> tuple[float, float]:
        "Where a pixel of the picture is in the window."
        box = self.page.locator(".live-picture").bounding_box()
        return box["x"] + x / 144 * box["width"], box["y"] + y / 112 * box["height"]

    def found(self) -> list[str]:
        "The classes that queries say with one half or more, by the list beside the picture."
        rows = self.page.locator(".live-queries button").all()
        labels = [row.get_attribute("aria-label").split(": ")[1].split(",")[0] for row in rows]
        return sorted(label for label in labels if label != "nothing")


@pytest.fixture(params=MODES)
def reader(browser, request):  # noqa: F811
    if not (PAGES / "live.html").exists():
        pytest.fail(f"no pages in {PAGES}: run `make test-book`, which builds them first")
    reader = Reader(browser, request.param)
    yield reader
    reader.context.close()


@in_browser
def test_a_reader_drags_draws_and_looks_by_mouse_finger_and_keys(reader):
    page = reader.page
    assert page.evaluate("document.documentElement.dataset.theme") == reader.theme
    reader.begin("one star")
    assert reader.found() == ["star"]
    x, y = reader.state("scene.shapes[0].x"), reader.state("scene.shapes[0].y")

    page.mouse.move(*reader.place(x, y))
    page.mouse.down()
    page.mouse.move(*reader.place(x + 50, y - 10), steps=4)
    page.mouse.up()
    reader.settle()
    assert reader.state("scene.shapes[0].x") == pytest.approx(x + 50, abs=1)
    box = reader.state("answer.layers.at(-1).queries.find(q => q.score > 0.5).box")
    assert box[0] * 144 == pytest.approx(x + 50, abs=4)  # the box came along
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('found: star')")

    finger = page.context.new_cdp_session(page)

    def touch(kind: str, *at: float) -> None:
        points = [{"x": x, "y": y} for x, y in [reader.place(*at)]] if at else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = page.evaluate("scrollY")
    touch("touchStart", x + 50, y - 10)
    for share in (0.3, 0.6, 1):
        touch("touchMove", x + 50 - 40 * share, y - 10 + 20 * share)
    touch("touchEnd")
    reader.settle()
    assert reader.state("scene.shapes[0].x") == pytest.approx(x + 10, abs=1.5)
    assert page.evaluate("scrollY") == before  # the finger moved the star and not the page

    star = page.get_by_role("slider", name="star", exact=True)
    star.focus()
    for key in ("ArrowRight", "Shift+ArrowRight", "+", "r"):
        page.keyboard.press(key)
    reader.settle()
    assert reader.state("scene.shapes[0].x") == pytest.approx(x + 32, abs=1.5)
    assert reader.state("scene.shapes[0].radius") > 17
    assert "across" in star.get_attribute("aria-valuetext")

    page.get_by_role("button", name="add a ring").click()
    page.mouse.move(*reader.place(120, 20))
    page.mouse.down()
    page.mouse.move(*reader.place(132, 24), steps=4)
    page.mouse.up()
    reader.settle()
    assert [shape["kind"] for shape in reader.state("scene.shapes")] == ["star", "ring", "ring"]
    page.keyboard.press("Delete")
    reader.settle()
    assert len(reader.state("scene.shapes")) == 2


@in_browser
def test_layers_attention_and_costs_can_be_looked_at(reader):
    page = reader.page
    reader.begin("two discs")
    answers = [reader.state(f"answer.layers[{layer}].queries.map(q => q.box)") for layer in range(2)]
    assert np.abs(np.subtract(*answers)).max() > 0.01
    slider = page.get_by_role("slider", name="layer", exact=True).first
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext").startswith("1 of")
    query = reader.state("answer.layers[0].matched[0]")
    page.locator(".live-queries button").nth(query).click()
    assert page.locator(".live-veil").is_visible()
    shares = page.locator(".live-shares").first.inner_text()
    assert "the ground" in shares and "A disc" in shares

    page.get_by_role("button", name="encoder", exact=True).click()
    page.mouse.move(*reader.place(100, 56))
    page.mouse.move(*reader.place(104, 56))
    assert page.get_by_text("From column 7, row 4").is_visible()
    page.get_by_role("slider", name="cell", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_text("From column 6, row 4").is_visible()

    page.get_by_role("button", name="matching", exact=True).click()
    text = page.locator(".live-costs").locator("xpath=preceding-sibling::p").inner_text()
    assert text.startswith("Query ") and text.endswith("matched.")
    page.get_by_role("slider", name="query and shape").focus()
    page.keyboard.press("ArrowDown")
    assert "matched." not in page.locator(".live-costs").locator("xpath=preceding-sibling::p").inner_text()


@in_browser
def test_the_costs_and_the_assignment_are_the_matchers(reader, packed):
    reader.begin("five shapes")
    layers = reader.state("answer.logits.length")
    logits, boxes = (torch.tensor(reader.state(f"answer.{name}")) for name in ("logits", "boxes"))
    targets = reader.state("answer.targets")
    corners = torch.tensor([target["corners"] for target in targets])
    wanted = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    labels, size = torch.tensor([KINDS.index(target["kind"]) for target in targets]), torch.tensor([[112, 144]])
    truth = Targets(labels, wanted, torch.tensor([len(labels)]), torch.tensor([1]), size, size)
    found = Predictions(logits.view(layers, 1, -1, len(KINDS) + 1), boxes.view(layers, 1, -1, 4))
    costs = torch.tensor(reader.state("answer.layers.map(l => l.costs.map(row => row.map(c => c.total)))"))
    torch.testing.assert_close(costs, matching_cost(found, truth), atol=1e-4, rtol=1e-4)
    pairs = match(found, truth)
    ours = [[int(q) for _, q in sorted(zip(pairs.of_layer(i).target, pairs.of_layer(i).query))] for i in range(layers)]
    assert reader.state("answer.layers.map(l => l.matched)") == ours


@in_browser
def test_the_figure_fits_is_silent_and_has_no_fault_for_axe(reader):
    "The page around it is looked at with all others, in `test_book`."
    from axe_playwright_python.sync_playwright import Axe
    page = reader.page
    for tab in ("answers", "encoder", "matching"):
        page.get_by_role("button", name=tab, exact=True).click()
        assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
        violations = Axe().run(page, {"include": [["#touch-fig-live"]]}, {"preload": False}).response["violations"]
        assert not [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in violations], tab
    assert not [text for text in reader.said if "axe" not in text]
