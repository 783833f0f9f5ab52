"""Exported models: the model's numbers at sizes that were not recorded; a command that says what is wrong."""
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ledger import ONNXRUNTIME, TORCH, Ledger

from detr_nb.batching import pad_images
from detr_nb.checkpoints import save_checkpoint
from detr_nb.detector import Detector
from detr_nb.detr import DETR, build_detr
from detr_nb.export import ExportError, OnnxDETR, ProgramDETR, check_onnx, export_onnx, export_program, main
from detr_nb.layouts import architecture
from detr_nb.pretrained import Preprocessing, load_detector
from detr_nb.segmentation import build_segmentation

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
REDUCED = dict(num_classes=7, hidden_dim=32, nheads=4, enc_layers=2, dec_layers=2, dim_feedforward=64, num_queries=10)
MODELS = {
    "small": dict(backbone="small", pre_norm=True),
    "small-learned": dict(backbone="small", position_embedding="learned", enc_layers=0),
    "R50": dict(backbone="resnet50", pretrained=None),
    "R50-DC5": dict(backbone="resnet50", pretrained=None, dilation=True),
}
# With torch 2.11 the recorded ResNet refuses a side of 4 n + 1 or 4 n + 2 pixels (see the chapter), the file does not.
SIZES, FILE_SIZES = [(96, 128), (75, 100), (160, 64)], [(96, 128), (73, 101), (161, 66), (33, 200)]


def some(*quick: str) -> list:
    "The names of all models; those that are not `quick` are slow."
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def build(name: str) -> DETR:
    torch.manual_seed(0)
    return build_detr(**REDUCED | MODELS[name]).eval()


def make_batch(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Of several images the last is padded, and of three the first too, elsewhere."
    generator = torch.Generator().manual_seed(height)
    padding = torch.zeros(count, height, width, dtype=torch.bool)
    if count > 1:
        padding[-1, height // 2 :] = True
    if count > 2:
        padding[0, :, width * 3 // 4 :] = True
    return torch.randn(count, 3, height, width, generator=generator).masked_fill(padding[:, None], 0), padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    model, path = build("small"), folder / "checkpoint.pth"
    save_checkpoint(path, {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "model": model.state_dict(), "config": {},
        "architecture": REDUCED | MODELS["small"], "preprocessing": Preprocessing(64, 160)._asdict(),
        "classes": {"ids": [3, 5, 9, 10, 11, 12, 90], "names": list("abcdefg")}})
    return path


def padded_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    "A batch of four pictures of different sizes, so that each is padded otherwise; none fills the canvas."
    generator = torch.Generator().manual_seed(7)
    sizes = (101, 61), (70, 128), (33, 40), (64, 90)
    return pad_images([torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes])


@pytest.fixture(scope="module")
def painter(folder: Path) -> Path:
    "A checkpoint of ours with masks, things and stuff; of a ResNet, which is translated soonest."
    torch.manual_seed(0)
    model = build_segmentation(build_detr(**REDUCED, backbone="resnet18", pretrained=None))
    path = folder / "painter.pth"
    save_checkpoint(path, {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "architecture": architecture(model),
        "model": model.state_dict(), "preprocessing": Preprocessing(64, 160)._asdict(),
        "classes": {"ids": [7, 42, 9, 10, 11, 12, 90], "names": list("abcdefg"), "is_thing": [True] * 5 + [False] * 2}})
    return path


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_the_command_takes_masks_along_and_each_picture_of_a_batch_has_its_own_padding(
    ending: str, painter: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    "Eager against onnxruntime and against torch's own file, on a batch of pictures that are padded differently."
    output, detector, (images, padding) = folder / f"painter.{ending}", load_detector(painter, True), padded_pictures()
    with caplog.at_level("INFO", "detr_nb"):
        main(["--weights", str(painter), "--output", str(output), "--masks"])
    assert "checked on 6 batches" in caplog.text
    exported = OnnxDETR(output, threads=1) if ending == "onnx" else ProgramDETR(output)
    assert json.loads(exported.notes["category_ids"])[:2] == [7, 42]
    assert "above 0 is the object" in exported.notes["masks"]
    assert json.loads(exported.notes["is_thing"]) == [True] * 5 + [False] * 2
    with torch.no_grad():
        expected = detector.model(images, padding)
    assert padding.flatten(1).any(1).all() and len(set(padding.flatten(1).sum(1).tolist())) == 4
    found, forgotten = exported(images, padding), exported(images)
    for ours, theirs in zip(found, (expected.logits[-1:], expected.boxes[-1:], expected.masks)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    gaps = [[float((a - b).abs().amax()) for a, b in zip(side.logits[0], expected.logits[-1])]
            for side in (found, forgotten)]  # of each picture
    assert min(gaps[1]) > 100 * max(gaps[0])  # who leaves the mask out gets another answer for every picture


@pytest.mark.slow
def test_a_detector_of_masks_is_exported_with_or_without_them(painter: Path, folder: Path) -> None:
    detector = Detector(*load_detector(painter, masks=True))
    images, padding = padded_pictures()
    whole, boxes = (ProgramDETR(detector.export(folder / f"{masks}.pt2", masks=masks)) for masks in (True, False))
    assert whole(images, padding).masks.shape[:2] == (4, 10) and boxes(images, padding).masks is None


@pytest.fixture(scope="module")
def written(checkpoint: Path, folder: Path) -> Path:
    "The file that the command writes, into a folder that it makes."
    output, said = folder / "new" / "small.onnx", io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("detr_nb").addHandler(handler)
    main(["--weights", str(checkpoint), "--output", str(output)])
    logging.getLogger("detr_nb").removeHandler(handler)
    assert said.getvalue().startswith("wrote") and "checked on 6 batches" in said.getvalue()
    return output


@pytest.mark.slow  # chapter 25 writes and checks a file of the small model each time
@pytest.mark.parametrize("name", MODELS)
def test_the_file_says_what_the_model_says(name: str, written: Path, folder: Path, ledger: Ledger) -> None:
    "And one that says something else is seen."
    model = build(name)
    path = written if name == "small" else export_onnx(model, folder / f"{name}.onnx")
    exported = OnnxDETR(path, threads=1)
    for count in (1, 3):
        for size in FILE_SIZES:
            images, padding = make_batch(count, *size)
            with torch.no_grad():
                expected = model(images, padding)
            for ours, theirs in zip(exported(images, padding)[:2], expected):
                ledger.compare("ONNX, logits and boxes", ours, theirs[-1:], ONNXRUNTIME)
    with torch.no_grad():
        alone = model(images[:1])
    for ours, theirs in zip(exported(images[:1])[:2], alone):  # no mask at all
        ledger.compare("ONNX, logits and boxes", ours, theirs[-1:], ONNXRUNTIME)
    model.bbox_embed.layers[-1].bias.data += 2e-3
    with pytest.raises(ExportError, match=rf"{path.name} does not say what the model says"):
        check_onnx(model, path)


@pytest.mark.parametrize("name", some("small-learned"))
def test_the_recorded_program_says_what_the_model_says(name: str, ledger: Ledger) -> None:
    model = build(name)
    program = export_program(model).module()
    for count in (1, 3):
        for size in SIZES:
            batch = make_batch(count, *size)
            with torch.no_grad():
                pairs = zip(program(*batch), model(*batch))
            for ours, theirs in pairs:
                ledger.compare("exported program", ours, theirs[-1], TORCH)


@pytest.mark.slow
def test_the_model_stays_as_it_is() -> None:
    "In training, in float64, frozen where it was frozen; and the recording is of the finished model."
    model = build("small").double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = export_program(model).module()
    images, padding = make_batch(1, 64, 64)
    first, second = (program(images, padding)[0].detach() for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32 and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_file_of_the_command_says_how_to_use_it(written: Path) -> None:
    exported = OnnxDETR(written)
    notes = {name: json.loads(exported.notes[name]) for name in ("names", "category_ids", "preprocessing", "mean")}
    assert notes["names"] == list("abcdefg") and notes["category_ids"] == [3, 5, 9, 10, 11, 12, 90]
    assert notes["preprocessing"] == {"short_side": 64, "max_size": 160, "exact": False}
    assert notes["mean"][0] == pytest.approx(0.485)
    assert [(x.name, x.shape) for x in exported.session.get_inputs()] == [
        ("images", ["batch", 3, "height", "width"]), ("padding", ["batch", "height", "width"])]


def test_the_command_refuses_with_a_message(folder: Path) -> None:
    with pytest.raises(SystemExit, match="nothing.pth"):
        main(["--weights", str(folder / "nothing.pth"), "--output", str(folder / "x.onnx")])
    assert not (folder / "x.onnx").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match="onnxscript.*pip install"):
        export_onnx(build("small"), folder / "y.onnx")
    with pytest.raises(SystemExit, match="onnxscript.*pip install"):
        main(["--weights", str(checkpoint), "--output", str(folder / "y.onnx")])


def test_the_module_imports_nothing_of_onnx() -> None:
    program = "import sys, detr_nb.export; print([m for m in sys.modules if m.split('.')[0].startswith('onnx')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
