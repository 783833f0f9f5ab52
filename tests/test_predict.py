"Prediction on real files: what cameras, scanners and the web bring, and the command from the outside."

import contextlib
import copy
import fcntl
import functools
import http.server
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_nb import drawing
from detr_nb import predict as predict_module
from detr_nb.backbone import FrozenBatchNorm2d
from detr_nb.batching import one_thread
from detr_nb.checkpoints import CheckpointError, save_checkpoint
from detr_nb.coco import Sample, read_image
from detr_nb.detr import build_detr
from detr_nb.distributed import UserError
from detr_nb.drawing import PictureError, Result, draw_objects, find_font, read_picture
from detr_nb.layouts import to_released
from detr_nb.panoptic_data import read_map, read_panoptic_index
from detr_nb.predict import find_pictures, main, predict
from detr_nb.pretrained import LoadedDetector, Preprocessing, load_detector
from detr_nb.segmentation import build_segmentation
from detr_nb.shapes import STUFF, draw_scene
from detr_nb.shapes_set import RUNNING_INDEX
from detr_nb.transforms import Resize

ROOT = Path(__file__).resolve().parent.parent
NAMES, IDS = ("disc", "rectangle", "triangle", "star", "ring", "cross"), (1, 2, 4, 7, 8, 11)
SMALL = dict(num_classes=6, backbone="small", norm="group", temperature=20, hidden_dim=32, nheads=4, enc_layers=1,
             dec_layers=1, dim_feedforward=64, dropout=0.0, num_queries=8, pre_norm=True)  # fmt: skip
EXIF_ORIENTATION = 0x0112


def make_detector(short_side: int | None = None, max_size: int | None = 160, **changes) -> LoadedDetector:
    "A model with random weights: its answers depend on every pixel, which is all that these tests need."
    torch.manual_seed(0)
    model = build_detr(**SMALL | changes)
    model.bbox_embed.layers[-1].weight.data.mul_(4)  # boxes that differ from query to query
    for part in model.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.bias.normal_(std=0.1)
    return LoadedDetector(model, NAMES, IDS, Preprocessing(short_side, max_size))


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    "As the command, which is started with one thread here: sums of several threads round differently."
    with one_thread():
        yield


@pytest.fixture(scope="module")
def detector() -> LoadedDetector:
    return make_detector()


@pytest.fixture(scope="module")
def weights(detector, tmp_path_factory) -> Path:
    "The detector as a checkpoint of ours."
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    save_checkpoint(path, {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "model": detector.model.state_dict(),
        "architecture": SMALL, "preprocessing": {"short_side": None, "max_size": 160},
        "classes": {"ids": list(IDS), "names": list(NAMES)},
    })  # fmt: skip
    return path


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    "The running scene, 160 x 96."
    return Image.fromarray(draw_scene(0, RUNNING_INDEX).image.permute(1, 2, 0).numpy())


def answer(source, detector, **settings):
    "The only result for one source."
    (result,) = predict(source, detector, **{"threshold": 0.0, "device": "cpu"} | settings)
    return result


def assert_alike(a, b, tolerance: float = 1e-4) -> None:
    "The same detections: scores and boxes, as shares of the picture, to a tolerance; the same names."
    scale = torch.tensor([a.size[1], a.size[0]] * 2)
    assert a.size == b.size and a.names == b.names
    torch.testing.assert_close(a.scores, b.scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.boxes / scale, b.boxes / scale, atol=tolerance, rtol=0)


# Colours


def veiled(scene: Image.Image) -> tuple[Image.Image, Image.Image]:
    "The scene with a transparent left half under which red is hidden; and how it looks on white."
    pixels, seen = np.array(scene), np.array(scene)
    pixels[:, :80], seen[:, :80] = (255, 0, 0), 255
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[:, :80] = 0
    return Image.fromarray(np.dstack([pixels, alpha])), Image.fromarray(seen)


def flat_grey(scene: Image.Image) -> np.ndarray:
    "The grey levels with black and white among them, so that stretching them changes nothing."
    levels = np.array(scene.convert("L"))
    levels[0, :2] = 0, 255
    return levels


def save_mode(mode: str, scene: Image.Image, folder: Path) -> tuple[Path, Image.Image]:
    "A file of that mode, and the RGB picture that people see in it."
    grey = flat_grey(scene)
    as_rgb = Image.fromarray(grey).convert("RGB")
    few = scene.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    bits = scene.convert("1")
    see_through, on_white = veiled(scene)
    red = np.array(few.getpalette()[:3], np.uint8)  # the first colour of the palette will be transparent
    holes = np.array(few.convert("RGB"))
    holes[np.array(few) == 0] = 255
    assert (np.array(few) == 0).any() and (red != 255).any()
    files = {
        "L": (Image.fromarray(grey), "l.png", as_rgb, {}),
        "L-jpeg": (Image.new("L", (160, 96), 100), "l.jpg", Image.new("RGB", (160, 96), (100,) * 3), {}),
        "1": (bits, "1.png", bits.convert("RGB"), {}),
        "RGBA": (see_through, "rgba.png", on_white, {}),
        "LA": (see_through.convert("LA"), "la.png", on_white.convert("L").convert("RGB"), {}),
        "RGBA-webp": (see_through, "rgba.webp", on_white, {"lossless": True, "exact": True}),
        "P": (few, "p.png", few.convert("RGB"), {}),
        "P-transparent": (few, "t.png", Image.fromarray(holes), {"transparency": 0}),
        "P-gif": (few, "p.gif", few.convert("RGB"), {}),
        "CMYK": (scene.convert("CMYK"), "c.tiff", scene, {}),
        "I;16": (Image.fromarray(grey.astype(np.uint16) * 257), "i.png", as_rgb, {}),
        "I;16-shifted": (Image.fromarray(grey.astype(np.uint16) << 8), "s.tiff", as_rgb, {}),
        "I": (Image.fromarray(grey.astype(np.int32) * 1_000_000), "i.tiff", as_rgb, {}),
        "F": (Image.fromarray(grey.astype(np.float32) / 255 - 7), "f.tiff", as_rgb, {}),
    }
    picture, name, seen, options = files[mode]
    picture.save(folder / name, **options)
    return folder / name, seen


MODES = ["L", "L-jpeg", "1", "RGBA", "LA", "RGBA-webp", "P", "P-transparent", "P-gif", "CMYK", "I;16", "I;16-shifted",
         "I", "F"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_any_mode_is_read_as_people_see_it(mode, scene, tmp_path):
    path, seen = save_mode(mode, scene, tmp_path)
    read = np.array(read_picture(path)).astype(int)
    assert np.abs(read - np.array(seen)).max() <= (1 if mode == "L-jpeg" else 0)


def test_an_animation_gives_its_first_frame(scene, tmp_path):
    first = scene.convert("P", palette=Image.Palette.ADAPTIVE)
    later = [Image.new("RGB", scene.size, color) for color in ("red", "green", "blue")]
    first.save(tmp_path / "film.gif", save_all=True, append_images=later)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 4
    assert np.array_equal(read_picture(tmp_path / "film.gif"), first.convert("RGB"))


def test_16_bits_are_read_as_in_training(scene, tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**16, (20, 30)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    ours = np.array(read_picture(tmp_path / "deep.png"))
    assert np.array_equal(ours, read_image(tmp_path / "deep.png").permute(1, 2, 0).numpy())


# Orientation

TURNS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
         7: "TRANSVERSE", 8: "ROTATE_270"}  # what must be stored, for a viewer to show the picture upright  # fmt: skip


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "webp"])
def test_every_orientation_gives_the_boxes_of_the_upright_picture(ending, scene, detector, tmp_path):
    upright = answer(scene, detector)
    for orientation, turn in TURNS.items():
        exif, path = Image.Exif(), tmp_path / f"picture{orientation}.{ending}"
        exif[EXIF_ORIENTATION] = orientation
        stored = scene.transpose(Image.Transpose[turn]) if turn else scene
        stored.save(path, exif=exif, **{"quality": 100, "lossless": True} if ending == "webp" else {"quality": 100})
        if ending == "jpg":  # loses a little, and a turned picture loses something else
            assert np.abs(np.array(read_picture(path)).astype(int) - np.array(scene)).mean() < 4
        else:
            assert np.array_equal(read_picture(path), scene)
    assert_alike(answer(path, detector), upright, 1e-4 if ending != "jpg" else 1)


def test_a_picture_in_memory_keeps_its_own_pixels(scene):
    mine = scene.transpose(Image.Transpose.ROTATE_90)
    mine.getexif()[EXIF_ORIENTATION] = 6
    before = np.array(mine)
    assert read_picture(mine).size == (160, 96)
    assert np.array_equal(mine, before)  # ours was turned, not theirs


# Many pictures


def write_nine(scene: Image.Image, folder: Path) -> list[Path]:
    "Nine pictures of nine shapes."
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(width, height) for width in (160, 150, 90) for height in (96, 131, 70)]
    for number, size in enumerate(sizes):
        scene.resize(size).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("backbone, preprocessing", [("small", (None, 160)), ("resnet18", (96, 160))])
def test_batches_give_what_each_picture_gives_alone(backbone, preprocessing, scene, tmp_path):
    detector = make_detector(*preprocessing, backbone=backbone, norm="frozen", pretrained=None)
    paths = write_nine(scene, tmp_path) * 3  # three of each shape
    together = list(predict(paths, detector, threshold=0.0, batch_size=4, device="cpu"))
    assert [result.source for result in together] == paths  # in the order that was asked for
    for path, result in zip(paths, together):
        assert_alike(result, answer(path, detector))


def test_a_batch_holds_one_shape_and_is_not_padded(scene, detector, monkeypatch):
    shapes = []
    forward = detector.model.forward

    def noted(images, padding):
        shapes.append((tuple(images.shape), padding))
        return forward(images, padding)

    monkeypatch.setattr(detector.model, "forward", noted)
    wide, high = scene, scene.transpose(Image.Transpose.ROTATE_90)
    list(predict([wide, high] * 4, detector, batch_size=4, device="cpu"))
    assert shapes == [((4, 3, 96, 160), None), ((4, 3, 160, 96), None)]


def test_few_pictures_are_in_memory_at_a_time(scene, detector, monkeypatch):
    begun, read = [], predict_module.read_picture
    monkeypatch.setattr(predict_module, "read_picture", lambda source: begun.append(1) or read(source))
    pictures = [scene.resize((160 - n % 40, 96)) for n in range(60)]
    for done, _ in enumerate(predict(pictures, detector, batch_size=2, device="cpu"), start=1):
        assert len(begun) <= done + 4 * 2
    assert done == 60


def test_processes_that_read_ahead_change_nothing(scene, detector, tmp_path):
    "Those of a server too: everything that they need can be pickled."
    paths = [*write_nine(scene, tmp_path), tmp_path / "nowhere.png"]
    alone = list(predict(paths, detector, threshold=0.0, device="cpu"))
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("forkserver", force=True)
    try:
        together = list(predict(paths, detector, threshold=0.0, device="cpu", num_workers=2))
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    for a, b in zip(together[:9], alone):
        assert_alike(a, b)
    assert [result.problem for result in together] == [None] * 9 + ["there is no such file"]


def test_the_boxes_are_in_the_pixels_of_the_large_picture(scene, detector):
    large = scene.resize((1600, 960), Image.Resampling.NEAREST)
    small, result = answer(scene, detector), answer(large, detector)
    assert result.size == (960, 1600)
    assert (result.boxes[:, 2:] <= torch.tensor([1600, 960])).all() and (result.boxes >= 0).all()
    torch.testing.assert_close(result.boxes.sort(0).values / 10, small.boxes.sort(0).values, atol=4, rtol=0)


# What is kept, and its names


def test_the_threshold_keeps_what_scores_as_much_or_more(scene, detector):
    everything = answer(scene, detector)
    assert len(everything.scores) == 8 and (everything.scores.diff() <= 0).all()
    some = float(everything.scores[3])
    assert answer(scene, detector, threshold=some).scores.tolist() == everything.scores[:4].tolist()
    assert len(answer(scene, detector, threshold=1.0).scores) == 0


def test_numbers_that_mean_nothing_are_refused_at_once(scene, detector):
    for numbers in ({"threshold": float("nan")}, {"threshold": 1.5}, {"batch_size": 0}, {"num_workers": -1}):
        with pytest.raises(UserError, match=f"{next(iter(numbers))}.*(between 0 and 1|at least)"):
            predict(scene, detector, **numbers)
    with pytest.raises(ValueError, match="tpu"):
        predict(scene, detector, device="tpu")


def test_arrays_and_tensors_are_pictures_and_double_precision_is_no_obstacle(scene, detector):
    result, tensor = answer(scene, detector), torch.from_numpy(np.array(scene)).permute(2, 0, 1)
    for picture in (np.array(scene), tensor, tensor / 255):
        assert torch.equal(answer(picture, detector).boxes, result.boxes)
    with pytest.raises(PictureError, match="cannot be read"):
        read_picture(torch.zeros(2, 3, 4, 5))
    precise = detector._replace(model=copy.deepcopy(detector.model).double())
    torch.testing.assert_close(answer(scene, precise).scores, result.scores.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [False, True])
def test_an_exact_resize_of_the_training_is_used_and_can_be_asked_for(scene, asked, monkeypatch):
    detector, seen = make_detector(75, 200), []
    if not asked:
        detector = detector._replace(preprocessing=detector.preprocessing._replace(exact=True))
    pad = predict_module.pad_images
    monkeypatch.setattr(predict_module, "pad_images", lambda images: (seen.extend(images), pad(images))[1])
    list(predict(scene, detector, device="cpu", exact_resize=asked))
    sample = Sample(torch.from_numpy(np.array(scene)).permute(2, 0, 1), torch.zeros(0, dtype=torch.int64),
                    torch.zeros(0, 4), 0, scene.size[::-1])  # fmt: skip
    exact, fast = (Resize([75], 200, exact)(sample, np.random.default_rng(0)).image for exact in (True, False))
    assert torch.equal(seen[0], exact) and not torch.equal(exact, fast)


def test_the_mode_of_the_model_is_left_as_it_was(scene, detector):
    detector.model.train()
    answer(scene, detector)
    assert detector.model.training
    detector.model.eval()


# What is said


def test_a_result_prints_as_one_line(scene, detector):
    result = answer(scene, detector)
    assert result.names == tuple(NAMES[label] for label in result.labels)
    assert result.category_ids == tuple(IDS[label] for label in result.labels)
    listed = [f"{name} {score:.2f}" for name, score in zip(result.names, result.scores.tolist())]
    assert str(result) == f"8 objects: {', '.join(listed)}"
    assert str(answer(scene, detector, threshold=1.0)) == "0 objects"
    assert str(Result("a", "a", problem="it is not a picture")) == "left out: it is not a picture"


# Drawing


@pytest.mark.parametrize("size", [(160, 96), (20, 12), (3, 400), (1, 1), (2000, 1500)])
def test_a_picture_of_any_size_can_be_drawn_on(size, scene, detector):
    picture = scene.resize(size)
    drawn = answer(picture, detector).draw()
    assert drawn.size == size and drawn.mode == "RGB"
    if min(size) > 3:
        assert not np.array_equal(drawn, picture)


def test_captions_stay_in_the_picture_and_apart(monkeypatch):
    places, place = [], drawing._caption_place

    def noted(box, size, canvas, taken):
        x, y = place(box, size, canvas, taken)
        places.append((x, y, x + size[0], y + size[1]))
        return x, y

    monkeypatch.setattr(drawing, "_caption_place", noted)
    corners = torch.tensor([[0, 0, 90, 60], [550, 0, 640, 60], [0, 420, 90, 480], [550, 420, 640, 480],
                            [0, 0, 640, 480.0]])
    names = ["a long name", "圆盘", "حلقة", "a name that is longer than its box, and much longer than most", "κύκλος"]
    draw_objects(torch.zeros(3, 480, 640, dtype=torch.uint8), corners, torch.arange(5), names)
    assert len(places) == 5
    for index, (x1, y1, x2, y2) in enumerate(places):
        assert 0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480
        assert all(x2 <= a or c <= x1 or y2 <= b or d <= y1 for a, b, c, d in places[:index])


def make_font(path: Path, letters: str) -> Path:
    "A font that knows these letters only; each is a full square."
    pen = TTGlyphPen(None)
    for step, corner in zip((pen.moveTo, *[pen.lineTo] * 3), ((0, 0), (0, 900), (900, 900), (900, 0))):
        step(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:])})
    font.setupGlyf({name: pen.glyph() for name in names[:1]} | dict.fromkeys(names[1:], pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2(), font.setupPost()
    font.save(path)
    return path


def test_a_font_is_found_for_the_letters_or_asked_for_once(tmp_path, monkeypatch, caplog):
    squares = make_font(tmp_path / "squares.ttf", "圆盘 0123456789.")
    monkeypatch.setattr(drawing, "findSystemFonts", lambda: [])
    monkeypatch.setattr(drawing, "_asked", [])
    find_font.cache_clear()
    plain = find_font("disc 0.98")
    assert find_font("圆盘 0.98") == find_font("环 0.97") == plain  # there is none: drawn as it can be
    assert caplog.text.count("no font here has all letters") == 1 and "--font" in caplog.text
    assert find_font("圆盘 0.98", squares) == str(squares) and find_font("disc", squares) == plain
    monkeypatch.setattr(drawing, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), str(squares)])
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    find_font.cache_clear()
    assert find_font("圆盘 0.98") == str(squares)
    with pytest.raises(UserError, match="broken.ttf is not a font"):
        find_font("disc", tmp_path / "broken.ttf")
    find_font.cache_clear()


# What is not a picture


def test_a_broken_file_says_why_and_the_rest_goes_on(scene, detector, tmp_path, caplog):
    write_nine(scene, tmp_path)
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:2000])
    (tmp_path / "5.jpg").write_text("not a picture")
    (tmp_path / "6.bmp").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture either, and not named like one")
    results = list(predict([tmp_path, tmp_path / "nowhere.png"], detector, threshold=0.0, device="cpu"))
    problems = {result.name: result.problem for result in results if result.problem}
    assert set(problems) == {"4.png", "5.jpg", "6.bmp", "nowhere.png"} and len(results) == 12
    assert "truncated" in problems["4.png"] and "not a picture" in problems["5.jpg"]
    assert "no such file" in problems["nowhere.png"]
    assert all(name in caplog.text for name in problems)
    assert all(len(result.boxes) == 8 for result in results if not result.problem)


def test_no_pictures_is_an_error_that_says_where_it_looked(detector, tmp_path):
    with pytest.raises(ValueError, match=f"no images in {tmp_path}"):
        predict(tmp_path, detector)
    with pytest.raises(ValueError, match="no images"):
        predict([], detector)


def test_a_folder_leaves_out_what_is_hidden_and_what_was_written(scene, tmp_path):
    for name in ("a.JPG", "sub/b.png", ".hidden/c.png", "._d.png", "predictions/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        scene.save(tmp_path / name)
    found = find_pictures(tmp_path, skip=tmp_path / "predictions")
    assert [name for name, _ in found] == ["a.JPG", "sub/b.png"]


def test_a_picture_of_an_iphone_that_pil_cannot_read_is_reported(scene, detector, tmp_path):
    scene.save(tmp_path / "a.jpg")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    results = {result.name: result.problem for result in predict(tmp_path, detector)}
    assert "not a picture, or of a format" in results["IMG_1.HEIC"] and not results["a.jpg"]


# The web


@pytest.fixture
def server(tmp_path):
    "A server of the files in `tmp_path`; gives its address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_a_url_is_fetched_once(server, scene, detector, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    scene.save(tmp_path / "a picture.png")
    address = f"{server}/a%20picture.png?size=large"
    result = answer(address, detector)
    assert result.name == address and isinstance(result.source, bytes)
    assert_alike(result, answer(scene, detector))
    (tmp_path / "a picture.png").unlink()
    assert result.draw().size == scene.size  # from the bytes that came
    with pytest.raises(PictureError, match="404"):
        read_picture(address)


# The command


def run(*arguments: object) -> None:
    "The command, in this process."
    main([*map(str, arguments), "--device", "cpu", "--num_workers", "0"])


def test_the_command_writes_pictures_and_one_coco_file(server, scene, detector, weights, tmp_path):
    "From the outside, once, with a terminal to draw its bar on; the other tests call its function."
    write_nine(scene, tmp_path / "album")
    scene.save(tmp_path / "web.png")
    environ = os.environ | {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "detr_nb.predict", "album", f"{server}/web.png", "--weights", str(weights),
            "--threshold", "0", "--output", "out", "--device", "cpu"]  # fmt: skip
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows and columns
    process = subprocess.Popen(line, stderr=theirs, cwd=tmp_path, env=environ)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that nobody writes to it any more
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert process.wait(timeout=300) == 0, said
    assert b"10/10" in said and b"80 objects" in said  # the bar; eight queries a picture
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == [*(f"{number}.jpg" for number in range(9)), "detections.json", "web.jpg"]
    with Image.open(tmp_path / "out/4.jpg") as picture:
        assert picture.size == (150, 131)

    written = json.loads((tmp_path / "out/detections.json").read_text())
    assert [image["file_name"] for image in written["images"]] == [*(f"{n}.png" for n in range(9)), f"{server}/web.png"]
    assert [image["id"] for image in written["images"]] == list(range(1, 11))
    assert {entry["id"]: entry["name"] for entry in written["categories"]} == dict(zip(IDS, NAMES))
    image = written["images"][4]
    assert (image["width"], image["height"]) == (150, 131)
    expected = answer(tmp_path / "album/4.png", detector)
    found = [entry for entry in written["annotations"] if entry["image_id"] == image["id"]]
    assert [entry["category_id"] for entry in found] == [IDS[label] for label in expected.labels]
    for entry, (x1, y1, x2, y2), score in zip(found, expected.boxes.tolist(), expected.scores.tolist()):
        assert entry["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.0051)
        assert entry["bbox"] == [round(number, 2) for number in entry["bbox"]]
        assert entry["score"] == pytest.approx(score, abs=1e-5)


def test_pycocotools_reads_the_file_as_a_data_set_and_as_results(scene, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("val").mkdir()
    for number in (285, 139):
        scene.save(f"val/{number:012d}.jpg")
    run("val", "--weights", weights, "--threshold", 0, "--output", "out", "--no_pictures")
    assert [path.name for path in Path("out").iterdir()] == ["detections.json"]
    assert "picture/s" not in capsys.readouterr().err  # no bar where nobody looks on
    data = COCO("out/detections.json")
    assert data.getImgIds() == [139, 285] and len(data.anns) == 16  # COCO's ids, from COCO's names
    assert len(data.loadAnns(data.getAnnIds(imgIds=[139]))) == 8
    truth = COCO()
    truth.dataset = {"images": [{"id": 139}, {"id": 285}], "annotations": [], "categories": data.dataset["categories"]}
    truth.createIndex()
    results = truth.loadRes(json.loads(Path("out/detections.json").read_text())["annotations"])
    assert len(results.anns) == 16 and results.anns[1]["score"] > 0


@pytest.mark.parametrize("layout", ["set/valid/_annotations.coco.json", "set/annotations/instances_valid.json",
                                    "annotations/instances_valid.json", "elsewhere.json"])
@pytest.mark.parametrize("text", [False, True])  # ids of images that are text
def test_pictures_of_a_data_set_get_its_ids_and_are_scored_as_they_are(
        layout, text, scene, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set/valid").mkdir(parents=True)
    ids = {f"{stem}.png": f"img-{n}" if text else n for stem, n in (("cat", 900), ("7", 3), ("dog", 12))}
    for name in ids:
        scene.save(Path("set/valid", name))
    boxes = [{"id": n, "image_id": key, "category_id": IDS[0], "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
             for n, key in enumerate(ids.values(), start=1)]
    content = {"images": [{"id": key, "file_name": name, "width": 160, "height": 96} for name, key in ids.items()],
               "annotations": boxes, "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]}
    path = Path(layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    flags = ["--annotations", path] if layout == "elsewhere.json" else []
    run("set/valid", "--weights", weights, "--threshold", 0, "--output", "out", "--no_pictures", *flags)
    written = json.loads(Path("out/detections.json").read_text())
    assert {image["file_name"]: image["id"] for image in written["images"]} == ids
    truth = COCO(layout)
    scorer = COCOeval(truth, truth.loadRes(written["annotations"]), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert len(scorer.cocoDt.anns) == 24 and scorer.stats[0] >= 0


def test_a_picture_that_the_data_set_lacks_gets_a_number_of_its_own(scene, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("set/valid").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        scene.save(Path("set/valid", name))
    path = Path("set/valid/_annotations.coco.json")
    path.write_text(json.dumps({"images": [{"id": 2, "file_name": "b.png"}, {"id": 1, "file_name": "gone.png"}]}))
    run("set/valid", "--weights", weights, "--output", "out", "--no_pictures")
    written = json.loads(Path("out/detections.json").read_text())
    assert [(image["file_name"], image["id"]) for image in written["images"]] == [("a.png", 3), ("b.png", 2)]
    assert "does not list 1 of 2 pictures: a.png" in caplog.text
    others = '{"images": [{"id": 1, "file_name": "x.png"}]}'
    for content, words in ((others, "lists none of the pictures: a.png, b.png"), ("[]", "is no annotation file")):
        Path("other.json").write_text(content)
        with pytest.raises(SystemExit, match=words):
            run("set/valid", "--weights", weights, "--output", "out", "--annotations", "other.json")
    path.write_text('{"images": [{"id": 77, "file_name": "x.png"}]}')  # beside them, and of other pictures
    run("set/valid", "--weights", weights, "--output", "out", "--no_pictures")
    written = json.loads(Path("out/detections.json").read_text())
    assert [image["id"] for image in written["images"]] == [1, 2]


def test_the_command_reports_a_broken_file_and_ends_with_a_status(scene, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_nine(scene, Path("album"))
    Path("album/3.png").write_bytes(b"\x89PNG but not for long")
    with pytest.raises(SystemExit, match="could not be read: 2"):
        run("album", "nowhere.jpg", "--weights", weights, "--threshold", 0)
    assert "left out 3.png" in caplog.text and "left out nowhere.jpg: there is no such file" in caplog.text
    written = json.loads(Path("predictions/detections.json").read_text())
    assert [entry["file_name"] for entry in written["left_out"]] == ["3.png", "nowhere.jpg"]
    assert len(written["images"]) == 8 and len(written["annotations"]) == 64
    assert not Path("predictions/3.jpg").exists() and Path("predictions/4.jpg").exists()


@pytest.mark.parametrize("source", ["album", "album/a.jpg", "link"])
def test_no_picture_is_drawn_over(source, scene, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("album").mkdir()
    scene.save("album/a.jpg")
    Path("link").symlink_to("album")
    before = Path("album/a.jpg").read_bytes()
    with pytest.raises(SystemExit, match="would be drawn over: give another --output|no images in"):
        run(source, "--weights", weights, "--output", "album")
    assert Path("album/a.jpg").read_bytes() == before and len(list(Path("album").iterdir())) == 1


def test_the_command_explains_mistakes(scene, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene.save("a.png")
    Path("empty").mkdir()
    for arguments, message in (
        (("empty", "--weights", weights), "no images in empty"),
        (("a.png", "--weights", "nowhere.pth"), "nowhere.pth"),
        (("a.png", "--weights", "empty"), "empty holds no checkpoint"),
        (("a.png", "--weights", weights, "--threshold", "2"), "threshold is a probability"),
        (("a.png", "--weights", weights, "--font", "a.png"), "a.png is not a font"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
    with pytest.raises(SystemExit):
        run("a.png")
    assert "--weights" in "".join(capsys.readouterr())


def test_a_name_in_any_script_is_drawn_with_a_font_that_has_it(scene, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "findSystemFonts", lambda: [])
    squares, result = make_font(tmp_path / "squares.ttf", "圆盘 0123456789."), answer(scene, detector)
    result.names, result.labels = ("圆盘",) * 8, torch.zeros(8, dtype=torch.int64)
    assert not np.array_equal(result.draw(squares), result.draw())


# Masks and segments

KINDS = {"ids": [*IDS, *STUFF], "names": [*NAMES, *STUFF.values()], "is_thing": [True] * 6 + [False] * 4}


def make_painter(num_classes: int = 10, **changes) -> torch.nn.Module:
    "A model with masks and random weights, whose queries differ in class, box and mask."
    torch.manual_seed(1)
    model, seen = build_segmentation(build_detr(**SMALL | dict(num_classes=num_classes, num_queries=12) | changes)), []
    classes = model.detr.class_embed
    hook = classes.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][-1, 0]))
    with torch.no_grad():
        model.detr.query_embed.weight.mul_(3)
        model.detr.bbox_embed.layers[-1].weight.mul_(4)
        model.mask_head.lay1.weight[:, -4:].mul_(8)
        model.mask_head.out_lay.weight.mul_(4)
        model.eval()(torch.randn(1, 3, 96, 160))
        hook.remove()
        classes.weight.mul_(4 / (classes.weight @ (seen[0] - seen[0].mean(0)).T).std())
        classes.bias.copy_(-classes.weight @ seen[0].mean(0))  # so that the queries differ, not only the classes
    return model


@pytest.fixture(scope="module")
def painters(tmp_path_factory) -> dict[str, Path]:
    "Models with masks: ours, with stuff and without, and one of 250 classes under the released names."
    folder = tmp_path_factory.mktemp("painters")
    for name, classes in (("ours", KINDS), ("things", {"ids": list(IDS), "names": list(NAMES)})):
        size = dict(num_classes=len(classes["ids"]), num_queries=12)
        save_checkpoint(folder / f"{name}.pth", {
            "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "classes": classes,
            "model": make_painter(size["num_classes"]).state_dict(), "architecture": SMALL | size,
            "preprocessing": {"short_side": None, "max_size": 160},
        })  # fmt: skip
    released = make_painter(250, backbone="resnet18", norm="frozen", temperature=10000, nheads=8, pretrained=None)
    torch.save(to_released(released), folder / "detr-r18-panoptic.pth")
    return {"ours": folder / "ours.pth", "things": folder / "things.pth",
            "released": folder / "detr-r18-panoptic.pth"}


@pytest.fixture(scope="module")
def painter(painters) -> LoadedDetector:
    return load_detector(painters["ours"], masks=True)


@pytest.mark.parametrize("kind, threshold", [("ours", 0.3), ("released", 0.01)])
def test_the_command_writes_masks_and_segments_that_are_those_it_draws(
    kind, threshold, painters, scene, tmp_path, monkeypatch
):
    (tmp_path / "album").mkdir()
    scene.save(tmp_path / "album/7.png")
    scene.resize((90, 131)).save(tmp_path / "album/9.png")
    flags = "--masks", "--panoptic", "--threshold", threshold, "--output", "out"
    monkeypatch.chdir(tmp_path)
    run("album", "--weights", painters[kind], *flags)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "7.jpg", "9.jpg", "detections.json", "panoptic.json", "panoptic"}
    detector = load_detector(painters[kind], masks=True)
    results = list(predict(tmp_path / "album", detector, threshold, device="cpu", masks=True, panoptic=True))
    assert all(len(result.scores) and len(result.segments.ids) for result in results)

    data = COCO(str(tmp_path / "out/detections.json"))
    for image_id, result in zip((7, 9), results):
        found = data.loadAnns(data.getAnnIds(imgIds=[image_id]))
        assert len(found) == len(result.scores)
        for annotation, mask, label in zip(found, result.masks, result.labels):
            decoded = data.annToMask(annotation)
            assert np.array_equal(decoded, mask) and decoded.shape == result.size and annotation["area"] == mask.sum()
            assert annotation["category_id"] == detector.category_ids[label] and detector.is_thing[label]
    assert any(0 < mask.float().mean() < 1 for result in results for mask in result.masks)

    path = tmp_path / "out/panoptic.json"
    index = read_panoptic_index(path)  # as one reads any panoptic set
    written = json.loads(path.read_text())
    for row, (result, entry) in enumerate(zip(results, written["annotations"])):
        segments = result.segments
        assert read_map(index, row, tmp_path / "out/panoptic", path).pixels.equal(segments.pixels.long())
        assert [part["area"] for part in entry["segments_info"]] == segments.areas.tolist()
        assert [part["category_id"] for part in entry["segments_info"]] == [
            detector.category_ids[label] for label in segments.labels]
        assert [part["isthing"] for part in entry["segments_info"]] == segments.is_thing.int().tolist()
        assert result.segment_names == tuple(detector.names[label] for label in segments.labels)
    kinds = {entry["name"]: entry["isthing"] for entry in written["categories"]}
    assert kinds["grain" if kind == "ours" else "rug-merged"] == 0
    assert kinds["star" if kind == "ours" else "toothbrush"] == 1
    results[0].draw().save(tmp_path / "again.jpg", quality=92)
    assert np.array_equal(read_picture(tmp_path / "again.jpg"), read_picture(tmp_path / "out/7.jpg"))


def test_a_mask_is_painted_on_its_own_pixels_and_no_others(painter, scene):
    result = answer(scene, painter, masks=True)
    assert len(result.codes) > 2
    white, nowhere = torch.full((3, 96, 160), 255, dtype=torch.uint8), torch.tensor([[0.0, 0, 0, 0]])
    for mask in result.masks:
        drawn = draw_objects(white, nowhere, torch.tensor([0]), masks=[mask])
        changed = (drawn != 255).any(0)
        changed[:2, :2] = mask[:2, :2]  # where the empty box is drawn
        assert torch.equal(changed, mask)


@pytest.fixture(params=["a stand-in", "the package"])
def supervision(request, monkeypatch):
    "The package where it is installed; else a module whose `Detections` keeps what it is given by name."
    if request.param == "the package":
        return pytest.importorskip("supervision")
    module = ModuleType("supervision")
    module.Detections = lambda *, xyxy, mask, confidence, class_id, data: SimpleNamespace(
        xyxy=xyxy, mask=mask, confidence=confidence, class_id=class_id, data=data)
    monkeypatch.setitem(sys.modules, "supervision", module)
    return module


def test_a_result_becomes_detections_of_supervision_in_one_call(painter, detector, scene, supervision, monkeypatch):
    with_masks, boxes_only = answer(scene, painter, masks=True), answer(scene, detector)
    for result in (with_masks, boxes_only, Result("nothing", "nothing", (96, 160))):
        found = result.to_supervision()
        assert np.array_equal(found.xyxy, result.boxes) and np.array_equal(found.confidence, result.scores)
        assert np.array_equal(found.class_id, result.labels) and tuple(found.data["class_name"]) == result.names
        assert tuple(found.data["category_id"]) == result.category_ids
        assert (found.mask is None) if result.codes is None else np.array_equal(found.mask, result.masks)
    assert found.xyxy.shape == (0, 4) and with_masks.codes and boxes_only.codes is None
    monkeypatch.setitem(sys.modules, "supervision", None)  # as where it is not installed
    with pytest.raises(UserError, match="pip install supervision"):
        boxes_only.to_supervision()


@pytest.mark.parametrize("kind", ["ours", "released"])
def test_a_picture_in_which_nothing_is_found(kind, painters, scene, tmp_path, monkeypatch):
    scene.save(tmp_path / "a.png")
    result = answer(scene, painters[kind], threshold=1.0, masks=True, panoptic=True)
    assert result.codes == () and result.masks.shape == (0, 96, 160) and len(result.segments.ids) == 0
    assert str(result) == "0 objects; segments: " and np.array_equal(result.draw(), scene)
    result.segments = None
    assert np.array_equal(result.draw(), scene)
    flags = "--masks", "--panoptic", "--threshold", 1
    monkeypatch.chdir(tmp_path)
    run("a.png", "--weights", painters[kind], *flags)
    for name in ("detections", "panoptic"):
        written = json.loads((tmp_path / f"predictions/{name}.json").read_text())
        assert len(written["images"]) == 1
        assert [entry.get("segments_info") for entry in written["annotations"]] == [[]] * (name == "panoptic")
    with Image.open(tmp_path / "predictions/panoptic/000000000001.png") as picture:
        assert not np.array(picture).any()


@pytest.mark.parametrize("kind", ["masks", "panoptic"])
def test_masks_of_mixed_sizes_in_batches_are_those_of_each_picture_alone(kind, painter, scene, tmp_path):
    paths = write_nine(scene, tmp_path) * 2
    together = list(predict(paths, painter, 0.0, batch_size=4, device="cpu", **{kind: True}))
    for path, result in zip(paths, together):
        alone = answer(path, painter, **{kind: True})
        assert_alike(result, alone)
        ours, theirs = (part.masks if kind == "masks" else part.segments.pixels for part in (result, alone))
        assert ours.shape == theirs.shape and ours.shape[-2:] == alone.size
        assert (ours != theirs).float().mean() < 1e-4  # a logit of nearly zero may fall on either side


def test_masks_are_those_of_the_picture_as_people_see_it(painter, scene, tmp_path):
    upright = answer(scene, painter, masks=True, panoptic=True)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    result = answer(tmp_path / "phone.png", painter, masks=True, panoptic=True)
    assert result.masks.equal(upright.masks) and result.segments.pixels.equal(upright.segments.pixels)


def test_only_what_is_kept_is_painted_and_one_mask_at_a_time_is_large(painter, scene, monkeypatch):
    painted, sizes = [], []
    head, enlarge = painter.model.mask_head.forward, predict_module.postprocess_masks
    monkeypatch.setattr(painter.model.mask_head, "forward",
                        lambda shared, attention, image: painted.append(len(image)) or head(shared, attention, image))
    monkeypatch.setattr(predict_module, "postprocess_masks",
                        lambda *given: sizes.append(len(given[0])) or enlarge(*given))
    scores = answer(scene, painter._replace(is_thing=None)).scores
    assert not painted  # nobody asked for masks
    threshold = float(scores[4])
    result = answer(scene.resize((1600, 960)), painter._replace(is_thing=None), threshold=threshold, masks=True)
    assert sum(painted) == len(result.codes) == len(result.scores) and set(sizes) == {1}
    same_size = answer(scene, painter._replace(is_thing=None), threshold=threshold, masks=True)
    assert len(same_size.scores) == 5 and same_size.masks[4].any()  # one that scores just the threshold is painted, too


def test_stuff_is_in_the_map_and_not_among_the_objects(painter, scene):
    everything, objects = (answer(scene, painter._replace(is_thing=kinds)) for kinds in (None, painter.is_thing))
    stuff = [label >= 6 for label in everything.labels.tolist()]
    assert any(stuff) and not all(stuff)
    assert objects.labels.tolist() == [label for label in everything.labels.tolist() if label < 6]
    segments = answer(scene, painter, panoptic=True).segments
    assert set(segments.is_thing.tolist()) == {True, False} and segments.pixels.shape == (96, 160)


@pytest.mark.parametrize("size", [(160, 96), (20, 12), (3, 400), (1, 1), (2000, 1500)])
@pytest.mark.parametrize("kind", ["masks", "panoptic"])
def test_masks_can_be_drawn_on_a_picture_of_any_size(kind, size, painter, scene):
    result = answer(scene.resize(size), painter, **{kind: True})
    assert result.draw().size == size


def test_asking_in_vain_for_masks_or_stuff_says_what_to_do(painters, weights, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene.save("a.png")
    for flag, file, message in (("--masks", weights, "has no mask head"), ("--panoptic", weights, "has no mask head"),
                                ("--panoptic", painters["things"], "knows objects but no stuff")):
        with pytest.raises(SystemExit, match=message):
            run("a.png", "--weights", file, flag)
        assert not Path("predictions").exists()
    run("a.png", "--weights", painters["things"], "--masks")
    with pytest.raises(CheckpointError, match="load_detector\\(..., masks=True\\)"):
        predict(scene, load_detector(painters["ours"]), masks=True)
