"The names that `import detr_nb` offers, and that they do what the first chapter says, without a string of flags."
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_nb
from detr_nb import detector as detector_module
from detr_nb.checkpoints import CheckpointError, save_checkpoint
from detr_nb.coco import open_coco
from detr_nb.detr import build_detr
from detr_nb.distributed import UserError
from detr_nb.drawing import PictureError
from detr_nb.layouts import to_transformers
from detr_nb.segmentation import build_segmentation
from detr_nb.shapes import CATEGORIES, draw_scene
from detr_nb.shapes_set import RUNNING_INDEX, write_shapes

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"load", "train", "evaluate", "Config", "DataConfig", "ModelConfig", "LossConfig", "OptimizerConfig",
         "RunConfig", "DETR", "boxes"}  # fmt: skip
SMALL = dict(num_classes=6, backbone="small", norm="group", temperature=20, hidden_dim=32, nheads=4, enc_layers=1,
             dec_layers=1, dim_feedforward=64, dropout=0.0, num_queries=8, pre_norm=True)  # fmt: skip


def test_import_is_instant_and_lists_its_names():
    program = "import sys, detr_nb; print(*dir(detr_nb)); print({'torch', 'numpy', 'PIL', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    listed, heavy = done.stdout.splitlines()
    assert set(detr_nb.__all__) == NAMES <= set(listed.split()) and heavy == "set()"


def test_every_name_is_what_it_says():
    assert all(callable(getattr(detr_nb, name)) for name in NAMES - {"train", "boxes"})
    assert inspect.ismodule(detr_nb.boxes) and inspect.isclass(detr_nb.DETR)
    with pytest.raises(AttributeError, match="no attribute 'Train'"):
        detr_nb.Train  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Two folders of runs, one with a mask head, and a folder of transformers; all with random weights."
    folder, classes = tmp_path_factory.mktemp("front"), {"ids": list(CATEGORIES), "names": list(CATEGORIES.values())}
    torch.manual_seed(0)
    for name, model in (("boxes", build_detr(**SMALL)), ("masks", build_segmentation(build_detr(**SMALL)))):
        (folder / name).mkdir()
        save_checkpoint(folder / name / "best.pth", {
            "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "model": model.state_dict(),
            "architecture": SMALL, "preprocessing": {"short_side": None, "max_size": 160}, "classes": classes,
        })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def scene() -> torch.Tensor:
    return draw_scene(0, RUNNING_INDEX).image


def test_a_run_is_its_folder_or_its_file_and_masks_come_along(folder, scene):
    by_folder, by_file = (detr_nb.load(source)(scene, threshold=0.0) for source in
                          (folder / "boxes", str(folder / "boxes/best.pth")))
    assert torch.equal(by_folder.boxes, by_file.boxes) and by_folder.masks is None
    painter = detr_nb.load(folder / "masks")
    assert painter(scene, threshold=0.0).masks.shape == (8, 96, 160)
    assert painter(scene, masks=False).masks is None
    assert str(painter).startswith("Detector of boxes and masks, 6 classes: disc, ")


def test_a_folder_of_transformers_is_loaded(tmp_path, scene):
    transformers = pytest.importorskip("transformers")
    ours = build_detr(91, "resnet18", pretrained=None, hidden_dim=32, nheads=8, enc_layers=1, dec_layers=1,
                      dim_feedforward=64, num_queries=8).eval()
    settings = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=8,
        num_labels=91, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"],
                                                  hidden_sizes=[64, 128, 256, 512]))  # fmt: skip
    theirs = transformers.DetrForObjectDetection(settings)
    theirs.load_state_dict(to_transformers(ours), strict=False)
    theirs.save_pretrained(tmp_path)
    found = detr_nb.load(tmp_path)(scene, threshold=0.0)
    assert found.boxes.shape == (8, 4) and found.size == (96, 160)


def test_what_cannot_be_loaded_or_read_says_why(folder, tmp_path):
    for source, message in ((tmp_path, "holds no checkpoint"), (tmp_path / "x.pth", "no such"), ("detr_x", "detr_x")):
        with pytest.raises(CheckpointError, match=message):
            detr_nb.load(source)
    with pytest.raises(PictureError, match="nowhere.png: there is no such file"):
        detr_nb.load(folder / "boxes")("nowhere.png")


def test_one_picture_of_any_kind_gives_one_result(folder, scene, tmp_path):
    detector, array = detr_nb.load(folder / "boxes"), scene.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    first = detector(scene, threshold=0.0)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, scene / 255):
        assert torch.equal(detector(picture, threshold=0.0).boxes, first.boxes)
    assert str(first).startswith("8 objects: ") and np.array(first.draw()).shape == array.shape
    assert [entry["category_id"] for entry in first.to_coco(7)] == [list(CATEGORIES)[label] for label in first.labels]
    results = detector.predict(tmp_path)
    assert inspect.isgenerator(results) and [result.name for result in results] == ["a.png"]


def test_evaluate_matches_classes_by_name(folder, tmp_path, capfd):
    write_shapes(tmp_path / "set", num_train=2, num_val=6)
    detector = detr_nb.load(folder / "boxes")
    numbers = detr_nb.evaluate(detector, tmp_path / "set", device="cpu")
    assert 0 <= numbers["AP"] <= numbers["AP50"] <= 1 and set(numbers["per_class"]) <= set(CATEGORIES.values())
    assert detr_nb.evaluate(str(folder / "boxes"), open_coco(tmp_path / "set", "val"), device="cpu") == numbers
    head, order = detector.model.class_embed, torch.tensor([3, 0, 5, 1, 2, 4, 6])
    turned = detector._replace(names=tuple(detector.names[place] for place in order[:6]))
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    assert detr_nb.evaluate(turned, tmp_path / "set", device="cpu")["AP"] == pytest.approx(numbers["AP"], abs=1e-3)
    with pytest.raises(UserError, match="no class has the same name in both"):
        detr_nb.evaluate(detector._replace(names=("cat",) * 6), tmp_path / "set", device="cpu")


def test_a_detector_becomes_a_file_that_is_checked(folder, tmp_path, monkeypatch):
    "Written and checked by the functions of the chapter on export, whose tests write real files."
    calls = []
    monkeypatch.setattr(detector_module, "export_file", lambda detector, path: calls.append(detector) or Path(path))
    monkeypatch.setattr(detector_module, "check_onnx", lambda model, path: calls.append((model, path)))
    detector = detr_nb.load(folder / "masks")
    assert detector.export(tmp_path / "m.onnx") == tmp_path / "m.onnx"
    assert calls[0].names == detector.names and calls[1][1] == tmp_path / "m.onnx"
    assert calls[0].model is detector.model
    detector.export(tmp_path / "m.onnx", masks=False)
    assert calls[2].model is calls[3][0] is detector.model.detr
