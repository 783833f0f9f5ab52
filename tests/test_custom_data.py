"A data set of one's own, from a labelling tool's folder to detections in its own category ids."

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_nb import finetune, train
from detr_nb.annotations import DataError, DataWarning
from detr_nb.checkpoints import RELEASED, load_checkpoint
from detr_nb.coco import CocoDataset, open_coco
from detr_nb.config import PRESETS, read_command_line
from detr_nb.detr import build_detr
from detr_nb.distributed import UserError
from detr_nb.evaluation import CocoEvaluator, Detections
from detr_nb.finetune import Vitals, advise, cautions, choose, suggest, vitals
from detr_nb.layouts import architecture, to_released
from detr_nb.predict import PredictSettings, write_predictions
from detr_nb.pretrained import load_detector
from detr_nb.runs import ask_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::detr_nb.annotations.DataWarning")
NAMES = {1: "red", 5: "white", 9: "platelet"}  # neither in a row nor in alphabetical order
QUIET = ["--device", "cpu", "--num_workers", "0", "--report_to", "none", "--fast_dev_run", "--image_size", "96"]
TINY = [
    "--backbone", "small", "--backbone_norm", "group", "--no_pretrained", "--enc_layers", "1", "--dec_layers", "2",
    "--hidden_dim", "32", "--dim_feedforward", "64", "--nheads", "4", "--num_queries", "12", "--temperature", "20",
]  # fmt: skip


def write_split(folder: Path, seed: int, count: int = 6) -> Path:
    "Images of coloured rectangles and a Roboflow export of them; returns the annotation file."
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [{"id": i, "name": name, "supercategory": "cells"} for i, name in NAMES.items()]
    content = {"images": [], "annotations": [], "categories": categories}
    for image_id in range(count):
        pixels = np.full((60, 80, 3), 220, dtype=np.uint8)
        name = f"slide{image_id}_jpg.rf.{seed:08x}.jpg"
        for category in rng.permutation(list(NAMES))[: image_id % 4].tolist():  # also none
            (x, y), (w, h) = rng.integers(0, 40, 2).tolist(), rng.integers(8, 20, 2).tolist()
            pixels[y : y + h, x : x + w] = 20 * category
            content["annotations"].append({"id": len(content["annotations"]), "image_id": image_id, "iscrowd": 0,
                                           "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                                           "segmentation": []})  # fmt: skip
        Image.fromarray(pixels).save(folder / name)
        content["images"].append({"id": image_id, "file_name": name, "width": 80, "height": 60})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder / "_annotations.coco.json"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    "The folder of a Roboflow export."
    root = tmp_path_factory.mktemp("custom") / "export"
    for seed, split in enumerate(("train", "valid")):
        write_split(root / split, seed)
    return root


@pytest.fixture(scope="module")
def run(export, tmp_path_factory) -> Path:
    "A run of two steps and one evaluation on the export."
    folder = tmp_path_factory.mktemp("run")
    train.main(["--coco_path", str(export), "--output_dir", str(folder), *TINY, *QUIET])
    return folder


def test_a_roboflow_export_is_trained_on_and_evaluated(run):
    entry = json.loads((run / "log.txt").read_text().splitlines()[0])
    assert len(entry["test_coco_eval_bbox"]) == 12 and entry["train_loss"] > 0
    state = load_checkpoint(run / "best.pth")
    assert state["classes"] == {"ids": list(NAMES), "names": list(NAMES.values())}


def test_a_run_can_be_evaluated_alone_and_scores_the_same(run, export, capsys):
    train.main(["--resume", str(run / "checkpoint.pth"), "--eval", "--fast_dev_run"])
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("{\n") :])
    entry = json.loads((run / "log.txt").read_text().splitlines()[0])
    assert found["test_coco_eval_bbox"] == pytest.approx(entry["test_coco_eval_bbox"], abs=1e-6)


def test_the_truth_scores_one_and_leaves_with_the_category_ids_of_the_file(export):
    data = open_coco(export, "val")
    content = json.loads((export / "valid" / "_annotations.coco.json").read_text())
    evaluator = CocoEvaluator(data)
    for sample in (data[i] for i in range(len(data))):
        scores = torch.full((1, len(sample.labels)), 0.9)
        evaluator.update(torch.tensor([sample.image_id]), Detections(scores, sample.labels[None], sample.boxes[None]))
    assert evaluator.compute()["coco_eval_bbox"][0] == pytest.approx(1.0)
    written = sorted((row[0], row[6], *row[1:5]) for row in evaluator.results("bbox").tolist())
    listed = sorted((a["image_id"], a["category_id"], *a["bbox"]) for a in content["annotations"])
    assert np.abs(np.array(written) - np.array(listed)).max() < 1e-5


def test_detections_are_written_with_the_names_and_ids_of_the_file(run, export, tmp_path):
    write_predictions(PredictSettings((str(export / "valid"),), str(run / "best.pth"), threshold=0.0, output=tmp_path,
                                      pictures=False, device="cpu"))
    content = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["id"]: entry["name"] for entry in content["categories"]} == NAMES
    assert {entry["category_id"] for entry in content["annotations"]} <= set(NAMES)
    detector = load_detector(run / "best.pth")
    assert detector.category_ids == tuple(NAMES) and detector.names == tuple(NAMES.values())
    assert len(content["annotations"]) == 6 * 12 and min(entry["id"] for entry in content["annotations"]) == 1


def test_files_by_name_train_like_the_folder(run, export, tmp_path):
    (tmp_path / "pictures").mkdir()
    for path in (export / "train").glob("*.jpg"):
        (tmp_path / "pictures" / path.name).write_bytes(path.read_bytes())
    mine = tmp_path / "mine.json"
    mine.write_bytes((export / "train" / "_annotations.coco.json").read_bytes())
    files = ["--train_annotations", str(mine), "--train_images", str(tmp_path / "pictures"),
             "--val_annotations", str(export / "valid" / "_annotations.coco.json")]  # fmt: skip
    train.main([*files, "--output_dir", str(tmp_path / "run"), *TINY, *QUIET])
    logs = [json.loads((folder / "log.txt").read_text().splitlines()[0]) for folder in (run, tmp_path / "run")]
    assert logs[0]["train_loss"] == logs[1]["train_loss"]


@pytest.mark.parametrize("flags, words", [
    ("--train_images a --val_images b", ["--train_images and --val_images alone", "--val_annotations"]),
    ("--train_annotations a.json", ["--train_annotations alone"]),
    ("--coco_path c --val_annotations b.json", ["--val_annotations alone"]),
    ("--coco_path c --train_annotations a.json --val_annotations b.json", ["--coco_path another"]),
    ("--dataset_file coco_panoptic --train_annotations a.json --val_annotations b.json", ["--dataset_file another"]),
    ("--coco_path c --coco_panoptic_path p", ["--coco_panoptic_path is read with --dataset_file coco_panoptic"]),
    ("--masks --finetune RUN --frozen_weights RUN", ["--finetune and --frozen_weights", "leave one out"]),
    ("--resume RUN --finetune RUN", ["goes on with its own weights", "leave one out"]),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(run, flags, words):
    with pytest.raises(ValueError) as error:
        argv = flags.replace("RUN", str(run / "checkpoint.pth")).split()
        train.check_settings(read_command_line(argv, ask_checkpoint)[0])
    assert all(word in str(error.value) for word in words), error.value


def test_fine_tuning_takes_the_checkpoint_s_model_and_the_set_s_classes(run, export, tmp_path, caplog):
    other = tmp_path / "other"
    for seed, split in enumerate(("train", "valid")):
        path = write_split(other / split, seed)
        content = json.loads(path.read_text())
        content["categories"] = [c for c in content["categories"] if c["id"] in (0, 5)]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 5]
        path.write_text(json.dumps(content))
    caplog.set_level("INFO")
    train.main(["--coco_path", str(other), "--finetune", str(run / "checkpoint.pth"), "--lr", "0", "--lr_backbone", "0",
                "--output_dir", str(tmp_path / "run"), *QUIET])  # fmt: skip
    assert "anew class_embed.weight (2, 32)" in caplog.text and "not used class_embed.weight (4, 32)" in caplog.text
    before, after = (load_detector(folder / "checkpoint.pth") for folder in (run, tmp_path / "run"))
    assert after.names == ("white",) and after.category_ids == (5,) and after.model.num_classes == 1
    assert architecture(after.model) | {"num_classes": 3} == architecture(before.model)
    old, new = before.model.state_dict(), after.model.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"class_embed.weight", "class_embed.bias"}


@pytest.mark.parametrize("change, words", [
    (lambda path: path.unlink(), ["no annotation file for the split 'val'", "valid/_annotations.coco.json"]),
    (lambda path: path.write_text(path.read_text()[:-20]), ["valid/_annotations.coco.json", "cut short"]),
    (lambda path: path.write_text(path.read_text().replace('"white"', '"black"')), ["different categories"]),
    (lambda path: path.write_text(path.read_text().replace('"id": 1, "image_id"', '"id": 0, "image_id"')),
     ["repeat an id", "valid/_annotations.coco.json"]),
])  # fmt: skip
def test_a_broken_set_ends_the_run_with_one_message(export, tmp_path, change, words):
    for path in export.rglob("*.*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    change(tmp_path / "valid" / "_annotations.coco.json")
    with pytest.raises(SystemExit) as caught:
        train.main(["--coco_path", str(tmp_path), "--output_dir", str(tmp_path / "run"), *TINY, *QUIET])
    assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------- vital statistics


def test_vitals_are_those_of_the_samples(export):
    data = open_coco(export, "train")
    for part in (data, data.subset([3, 1]), data.subset([0])):
        samples = [part[i] for i in range(len(part))]
        found = vitals(part)
        labels = torch.cat([sample.labels for sample in samples])
        assert found.names == tuple(NAMES.values())
        assert found.objects.tolist() == torch.bincount(labels, minlength=3).tolist()
        assert found.images_with.tolist() == [sum(k in s.labels.tolist() for s in samples) for k in range(3)]
        assert found.per_image.tolist() == [len(s.labels) for s in samples]
        assert found.short_sides.tolist() == [60] * len(part)
        boxes = torch.cat([s.boxes for s in samples])
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt() / 60
        assert torch.allclose(found.sides.sort().values, sides.sort().values)


def test_vitals_leave_crowds_out(export, tmp_path):
    content = json.loads((export / "train" / "_annotations.coco.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "crowd.json").write_text(json.dumps(content))
    found = vitals(CocoDataset(export / "train", tmp_path / "crowd.json"))
    assert found.objects.sum() == len(content["annotations"]) - 1 == len(found.sides)


def make_vitals(per_image: list[int], sides: list[float], objects=(90, 90), images_with=(60, 60)) -> Vitals:
    columns = torch.tensor(objects), torch.tensor(images_with), torch.tensor(per_image)
    labels = torch.arange(len(sides)) % 2
    return Vitals(("cat", "dog"), *columns, torch.full((len(per_image),), 480), torch.tensor(sides), labels)


def flags_of(*arguments, **settings) -> dict:
    return {flag: value for flag, value, _ in suggest(*arguments, **settings)}


def test_twice_the_fullest_image_of_either_split_has_room():
    few, many = make_vitals([3, 5], [0.2]), make_vitals([1, 60], [0.2])
    assert flags_of(few, few)["num_queries"] == 100  # the checkpoint's
    assert flags_of(few, many)["num_queries"] == 120 == flags_of(many, few)["num_queries"]
    assert flags_of(few, few, known_queries=8)["num_queries"] == 10


@pytest.mark.parametrize("side, stride, learned_at, largest, size", [
    (0.2, 32, 320, 800, 320), (0.1, 32, 320, 2000, 480), (0.1, 16, 240, 800, 320), (0.1, 16, 240, 300, 300),
    (0.84, 16, 128, 320, 128), (0.84, 32, 800, 800, 800), (0.01, 32, 800, 320, 800),
])  # fmt: skip
def test_small_objects_get_two_cells_and_large_ones_what_the_checkpoint_learned_at(
    side, stride, learned_at, largest, size
):
    "The pictures are 480 pixels high; no size is below the checkpoint's."
    some = make_vitals([1], [side])
    found = flags_of(some, some, stride=stride, learned_at=learned_at, largest=largest)
    assert found["image_size"] == size


def test_a_rare_class_of_small_objects_decides():
    vital = make_vitals([1], [0.4, 0.1] + [0.4] * 98)._replace(labels=torch.tensor([0, 1] + [0] * 98))
    assert flags_of(vital, vital, stride=16, learned_at=128)["image_size"] == 320


@pytest.mark.parametrize("batch_size, rate", [(16, 1e-4), (64, 2e-4), (4, 5e-5)])
def test_the_rate_grows_with_the_root_of_the_batch_and_the_steps_stay(batch_size, rate):
    some = make_vitals([1] * 100, [0.2])
    found = flags_of(some, some, batch_size=batch_size)
    assert found["lr"] == pytest.approx(rate) and found["lr_backbone"] == pytest.approx(rate / 10)
    assert found["epochs"] * 100 / batch_size == pytest.approx(2000)
    own = flags_of(some, some, batch_size=batch_size, lr=5e-4, lr_backbone=5e-4, learned_with=batch_size // 4)
    assert own["lr"] == own["lr_backbone"] == pytest.approx(1e-3)


def test_the_optimizer_and_its_rates_are_the_checkpoint_s():
    some = make_vitals([1] * 100, [0.2])
    found = flags_of(some, some, optimizer="muon", lr_muon=0.02, learned_with=32)
    assert found["optimizer"] == "muon" and found["lr_muon"] == pytest.approx(0.01)
    assert "lr_muon" not in flags_of(some, some) and flags_of(some, some)["optimizer"] == "adamw"


def test_cautions_name_the_class_and_a_hundred_of_a_kind_are_one_line():
    sound = make_vitals([1] * 30 + [0], [0.2])
    assert cautions(sound, sound) == []
    poor = make_vitals([1] * 30 + [0], [0.2], objects=(0, 9), images_with=(0, 5))
    said = cautions(poor, make_vitals([1] * 3, [0.2], objects=(4, 0)))
    wanted = "cat: no training image", "dog (5): fewer than 20 training", "dog: no validation", "3 validation"
    assert len(said) == 4 and all(words in text for text, words in zip(said, wanted))
    many = tuple(f"kind {number}" for number in range(100))
    rare = poor._replace(names=many, objects=torch.full((100,), 2), images_with=torch.full((100,), 2))
    said = cautions(rare, rare)
    assert len(said) == 1 and "kind 4 (2) and 95 more: fewer" in said[0] and "kind 5" not in said[0]


def test_the_command_that_is_advised_does_what_was_said(run, export, tmp_path, capsys, caplog):
    finetune.main([str(export), "--weights", str(run / "best.pth"), "--batch_size", "4"])
    text = capsys.readouterr().out
    assert "6 training and 6 validation images" in text and "fewer than 20 training images" in text
    assert re.search(r"about \d+ minutes of training on this machine", text)
    words = text.splitlines()[-1].split()
    assert words[:4] == ["python", "-m", "detr_nb.train", "finetune"]
    caplog.set_level("INFO")
    train.main([*words[3:], *QUIET, "--output_dir", str(tmp_path)])
    said = [line.strip() for line in text.splitlines() if line.startswith("  --")]
    assert "--lr 0.00014: the checkpoint's 0.0001 at 2 images a step, times the root of 4 / 2" in said
    config = load_checkpoint(tmp_path / "checkpoint.pth")["config"]
    for line in said:
        flag, value = line.removeprefix("--").split(": ")[0].split(" ", 1)
        assert str(config[flag]) == value and line in caplog.text
    assert config["image_size"] == 96  # which QUIET asks for and the checkpoint learned at
    assert advise(export, str(run), 4).split("\n  about")[0] == text.replace(str(run / "best.pth"), str(run)).split(
        "\n  about")[0]  # by the run's folder


def test_a_set_without_validation_and_with_a_broken_image_is_advised_on_as_it_is_trained_on(run, tmp_path):
    write_split(tmp_path / "set/train", seed=0)
    picture = sorted((tmp_path / "set/train").glob("*.*g"))[0]
    picture.write_bytes(picture.read_bytes()[:-200])
    with pytest.raises(DataError, match="--val_share"):
        advise(tmp_path / "set", str(run))
    with pytest.raises(DataError, match=picture.name):
        advise(tmp_path / "set", str(run), val_share=0.34)
    with pytest.warns(DataWarning, match=f"{picture.name}; they are left out"):
        text = advise(tmp_path / "set", str(run), val_share=0.34, skip_broken=True)
    assert re.search("[34] training and [12] validation images", text)
    assert text.endswith(" --val_share 0.34 --skip_broken")


@pytest.mark.parametrize("preset", ["finetune", "photos"])
def test_half_a_data_set_is_named_as_such_before_it_is_opened(export, preset):
    told = ["--train_annotations", str(export / "train/_annotations.coco.json")]
    with pytest.raises(UserError, match="--train_annotations alone name no data set"):
        read_command_line([preset, *told], choose)


def test_without_a_checkpoint_or_a_gpu_photographs_are_learned_by_the_preset(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = ["--coco_path", str(export), "--lr", "3e-5"]
    fitted, photos = (read_command_line([preset, *told], choose)[0] for preset in ("finetune", "photos"))
    assert fitted.model == photos.model and fitted.optimizer == photos.optimizer
    assert photos.model.backbone == PRESETS["photos"].model.backbone and photos.optimizer.lr == 3e-5
    assert photos.data.image_size == PRESETS["photos"].data.image_size and not photos.run.finetune
    (tmp_path / "checkpoints").mkdir()
    name = RELEASED["detr_resnet50"].rsplit("/", 1)[-1]
    torch.save(to_released(build_detr(91)), tmp_path / "checkpoints" / name)
    monkeypatch.setattr("detr_nb.checkpoints._load_url", lambda url: torch.load(tmp_path / "checkpoints" / name))
    fitted = read_command_line(["finetune", *told], choose)[0]
    assert fitted.run.finetune == "detr_resnet50" and fitted.model.backbone == "resnet50"
    assert fitted.data.image_size == 800 and fitted.optimizer.optimizer == "adamw"


def test_the_shapes_checkpoint_lends_photographs_its_transformer(run, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/best.pth").write_bytes((run / "best.pth").read_bytes())
    found = read_command_line(["photos", "--coco_path", str(export)], choose)[0]
    assert found.run.finetune == "runs/shapes/best.pth" and found.model.hidden_dim == 32  # the checkpoint's
    assert (found.model.backbone, found.model.pretrained) == (PRESETS["photos"].model.backbone, True)
    assert (found.model.decoder, found.model.two_stage, found.loss.class_loss) == ("detr", False, "ce")  # as it learned
    (tmp_path / "runs/shapes/best.pth").unlink()
    alone = read_command_line(["photos", "--coco_path", str(export)], choose)[0]
    assert (alone.model.decoder, alone.model.denoising, alone.loss.class_loss) == ("dab_deformable", 30, "ia_bce")


def test_presets_for_a_set_of_one_s_own_ask_for_one():
    for preset in ("photos", "finetune"):
        with pytest.raises(UserError, match="name it with --coco_path"):
            read_command_line([preset], choose)


def test_a_training_inside_a_program_leaves_threads_environment_and_signals_as_they_were(export, tmp_path):
    def state() -> tuple:
        return torch.get_num_threads(), dict(os.environ), signal.getsignal(signal.SIGTERM)

    torch.set_num_threads(1)
    before = state()
    train.main(["--coco_path", str(export), "--output_dir", str(tmp_path), "--fast_dev_run", *TINY, *QUIET])
    assert state() == before


def test_what_cannot_be_described_is_refused_in_one_message(tmp_path):
    with pytest.raises(SystemExit, match="DataError: no such folder"):
        finetune.main([str(tmp_path / "nowhere")])


def test_weights_that_are_not_there_are_not_suggested(export):
    with pytest.raises(SystemExit, match="CheckpointError: .*typo.pth"):
        finetune.main([str(export), "--weights", "typo.pth"])
