"The command lines of the original's README, and code that was written for its torch.hub models."
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

from detr_nb import backbone, train
from detr_nb.batching import collate
from detr_nb.coco import open_coco
from detr_nb.detr import build_detr
from detr_nb.evaluation import postprocess
from detr_nb.layouts import from_released, to_released
from detr_nb.pretrained import COCO_NAMES
from detr_nb.segmentation import build_segmentation
from detr_nb.shapes_set import write_shapes
from detr_nb.transforms import paper_transform

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["person", "dog", "teddy bear", "kite", "toothbrush", "cup", "sky-other-merged", "grass-merged",
         "wall-other-merged", "river"]  # what COCO calls them; the ids are those of the files


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    "A small set in COCO's layout, boxes and panoptic, with COCO's names."
    folder = write_shapes(tmp_path_factory.mktemp("coco"), num_train=4, num_val=2, num_workers=1)
    for path in folder.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        for category, name in zip(content["categories"], NAMES):
            category["name"] = name
        path.write_text(json.dumps(content))
    return folder


def save_released(path: Path, num_classes: int = 91, masks: bool = False) -> Path:
    "A file in the released layout, of the size of the released models, with random weights."
    torch.manual_seed(1)
    model = build_detr(num_classes, "resnet50", pretrained=None)
    torch.nn.init.normal_(model.class_embed.weight, std=0.3)
    torch.nn.init.normal_(model.query_embed.weight, std=3)
    torch.save(to_released(build_segmentation(model) if masks else model), path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return save_released(tmp_path_factory.mktemp("released") / "detr-r50.pth")


def annotate_with(model, coco: Path) -> list[dict]:
    """Make some of a model's answers the truth, and its most frequent classes those of the set.

    Returns all its answers as the original gives them to pycocotools, which drops those of other classes."""
    dataset, answers = open_coco(coco, "val", transform=paper_transform(train=False)), []
    for sample in (dataset[k] for k in range(len(dataset))):
        batch = collate([sample])
        with torch.inference_mode():
            logits, boxes = model(batch.images, batch.padding)[:2]
        found = postprocess(logits[-1], boxes[-1], torch.tensor([sample.original_size]))
        for score, label, (x1, y1, x2, y2) in zip(*(part[0].tolist() for part in found)):
            answers.append({"image_id": sample.image_id, "category_id": COCO_NAMES[label], "score": score,
                            "bbox": [x1, y1, x2 - x1, y2 - y1]})
    path = coco / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    frequent = Counter(answer["category_id"] for answer in answers if answer["category_id"] != "N/A").most_common(6)
    for category, (name, _) in zip(content["categories"], frequent):
        category["name"] = name
    ids = {category["name"]: category["id"] for category in content["categories"]}
    results = [answer | {"category_id": ids[answer["category_id"]]} for answer in answers
               if answer["category_id"] in ids]
    content["annotations"] = [{**result, "id": k + 1, "iscrowd": 0, "area": result["bbox"][2] * result["bbox"][3]}
                              for k, result in enumerate(results[::7])]
    path.write_text(json.dumps(content))
    return results


def evaluate(capsys, *words: object) -> dict:
    "What the command prints on standard output, which must be JSON alone."
    capsys.readouterr()
    train.main([*map(str, words)])
    return json.loads(capsys.readouterr().out)


def test_evaluation_of_a_released_file(released, coco, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = annotate_with(from_released(released), coco)
    reference = COCOeval(open_coco(coco, "val").coco_api(), None, "bbox")
    reference.cocoDt = reference.cocoGt.loadRes(results)
    reference.evaluate(), reference.accumulate(), reference.summarize()
    printed = evaluate(capsys, "--batch_size", 2, "--no_aux_loss", "--eval", "--resume", released, "--coco_path", coco)
    assert printed["test_coco_eval_bbox"][0] > 0.01
    assert printed["test_coco_eval_bbox"] == pytest.approx(reference.stats.tolist(), abs=2e-3)


def test_a_files_classes_are_category_ids_where_nothing_names_them(coco, tmp_path, capsys, monkeypatch):
    "A model that somebody trained with the original: as many classes as the largest id and one."
    monkeypatch.chdir(tmp_path)
    mine = save_released(tmp_path / "mine.pth", num_classes=12)
    printed = evaluate(capsys, "--batch_size", 2, "--eval", "--resume", mine, "--coco_path", coco, "--image_size", 64)
    assert len(printed["test_per_class_ap"]) == 6 and printed["test_loss_ce"] < 10


@pytest.mark.parametrize("words, says", [
    (["--eval"], "--eval scores the checkpoint that --resume names"),
    (["--eval", "--finetune", "RELEASED"], "with --finetune the class head would be a new one"),
    (["--split", "test"], "--split test chooses a part of --coco_path to be scored with --eval"),
    (["--eval", "--resume", "RELEASED", "--split", "test"], "no annotation file for the split 'test'"),
    (["--resume", "RELEASED"], "not a checkpoint of detr_nb.train; to score it, add --eval, to learn on from it"),
])
def test_what_cannot_be_scored_is_said(words, says, released, coco, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(released) if word == "RELEASED" else word for word in words]
    with pytest.raises(SystemExit, match=says):
        train.main([*words, "--coco_path", str(coco)])
    assert not (words[0] == "--eval" and capsys.readouterr().out)


def test_panoptic_evaluation_of_a_released_file(coco, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = save_released(tmp_path / "detr-r50-panoptic.pth", num_classes=250, masks=True)
    printed = evaluate(capsys, "--batch_size", 1, "--no_aux_loss", "--eval", "--resume", file, "--masks",
                       "--dataset_file", "coco_panoptic", "--coco_path", coco, "--coco_panoptic_path", coco,
                       "--output_dir", tmp_path / "output", "--fast_dev_run", "--panoptic_threshold", 0)
    assert set(printed["test_PQ_all"]) >= {"pq", "sq", "rq"} and (tmp_path / "output/panoptic").is_dir()


@pytest.mark.slow
def test_training_commands(coco, tmp_path, monkeypatch):
    "A box model, then a mask head on it; each without its launcher, and two steps of it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbone, "_load_imagenet", lambda body, name: None)  # there is no network here
    panoptic = ["--coco_panoptic_path", str(coco), "--dataset_file", "coco_panoptic"]
    first = ["--coco_path", str(coco), "--fast_dev_run"]
    train.main(first)
    train.main([*first, *panoptic, "--output_dir", "output/path/box_model"])
    train.main(["--masks", "--epochs", "25", "--lr_drop", "15", *first, *panoptic, "--frozen_weights",
                "output/path/box_model/checkpoint.pth", "--output_dir", "output/path/segm_model"])
    assert Path("output/path/segm_model/checkpoint.pth").exists() and list(Path("runs").glob("*/checkpoint.pth"))


def test_a_third_split_needs_no_training_file(coco, tmp_path, capsys, monkeypatch):
    "Roboflow's test/, scored by a run's checkpoint."
    export = tmp_path / "export"
    categories = json.loads((coco / "annotations/instances_train2017.json").read_text())["categories"]
    for split, name in (("train", "train"), ("valid", "val"), ("test", "val")):
        content = json.loads((coco / f"annotations/instances_{name}2017.json").read_text())
        (export / split).mkdir(parents=True)
        for image in content["images"]:
            (export / split / image["file_name"]).write_bytes((coco / f"{name}2017" / image["file_name"]).read_bytes())
        (export / split / "_annotations.coco.json").write_text(json.dumps(content | {"categories": categories}))
    tiny = ["--backbone", "small", "--backbone_norm", "group", "--no_pretrained", "--enc_layers", "1", "--dec_layers",
            "1", "--hidden_dim", "32", "--dim_feedforward", "32", "--num_queries", "5", "--image_size", "64"]
    run = tmp_path / "run"
    train.main(["--coco_path", str(export), "--output_dir", str(run), "--fast_dev_run", "--num_workers", "0", *tiny])
    for path in export.glob("train/*"):
        path.unlink()
    by_file, by_folder = (evaluate(capsys, "--eval", "--resume", run / name, "--coco_path", export, "--split", "test")
                          for name in ("best.pth", ""))
    assert by_file == by_folder and by_file["test_images"] == 2
    assert (run / "detections_bbox.json").exists()


# ---- torch.hub


def from_hub(name: str, **settings):
    return torch.hub.load(str(ROOT), name, source="local", **settings)


def test_a_hub_model_answers_as_the_originals_do(released):
    model, postprocessor = from_hub("detr_resnet50", return_postprocessor=True)
    model.load_state_dict(torch.load(released)["model"])  # under the released names
    model.eval()
    images = [torch.randn(3, 96, 128), torch.randn(3, 128, 64)]
    with torch.inference_mode():
        outputs = model(images)
        alone = model(images[1][None])
        scores = alone["pred_logits"].softmax(-1)[0, :, :-1]
    assert outputs["pred_logits"].shape == (2, 100, 92) and scores.shape == (100, 91)
    assert len(outputs["aux_outputs"]) == 5 and outputs["aux_outputs"][0].keys() == {"pred_logits", "pred_boxes"}
    batch, padding = torch.zeros(2, 3, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool)
    for place, (image, (height, width)) in enumerate(zip(images, ((96, 128), (128, 64)))):
        batch[place, :, :height, :width], padding[place, :height, :width] = image, False
    with torch.inference_mode():
        ours = from_released(released)(batch, padding)
    assert torch.equal(outputs["pred_boxes"], ours.boxes[-1]) and torch.equal(outputs["pred_logits"], ours.logits[-1])
    results = postprocessor(outputs, torch.tensor([[96, 128], [128, 64]]))
    assert [set(result) for result in results] == [{"scores", "labels", "boxes"}] * 2
    assert results[1]["boxes"].shape == (100, 4) and results[1]["boxes"].max() > 2


def test_a_panoptic_hub_model_and_its_postprocessor():
    torch.manual_seed(0)
    model, postprocessor = from_hub("detr_resnet50_panoptic", return_postprocessor=True, threshold=0.0)
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        out = model.eval()(image)
    assert out["pred_masks"].shape[:2] == (1, 100)
    (result,) = postprocessor(out, torch.as_tensor(image.shape[-2:]).unsqueeze(0))
    pixels = np.array(Image.open(io.BytesIO(result["png_string"]))).astype(int)
    ids = pixels @ [1, 256, 65536]
    assert ids.shape == (64, 96)
    for segment in result["segments_info"]:
        assert segment["area"] == (ids == segment["id"]).sum() and segment["isthing"] == (segment["category_id"] < 91)
