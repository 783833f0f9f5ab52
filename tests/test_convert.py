"A detector in other people's hands: what transformers says of the folder that we write, and we of a folder of theirs."
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_nb import train
from detr_nb.batching import pad_images
from detr_nb.checkpoints import CheckpointError, save_checkpoint
from detr_nb.convert import main
from detr_nb.detector import Detector, load
from detr_nb.detr import build_detr
from detr_nb.layouts import architecture
from detr_nb.pretrained import LoadedDetector, Preprocessing, load_detector
from detr_nb.segmentation import build_segmentation
from detr_nb.shapes import draw_scene
from detr_nb.shapes_set import write_shapes

transformers = pytest.importorskip("transformers")
TINY = dict(num_classes=3, hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=48, num_queries=9,
            pretrained=None)  # fmt: skip
NAMES, IDS = ("cell", "platelet", "血球"), (7, 42, 3)
MODELS = {
    "resnet18": dict(backbone="resnet18"),
    "learned": dict(backbone="resnet18", position_embedding="learned", enc_layers=2),
    "resnet50": dict(backbone="resnet50"),
    "resnet50-dc5": dict(backbone="resnet50", dilation=True),
    "masks": dict(backbone="resnet18", masks=True, nheads=8),
    "masks-dc5": dict(backbone="resnet50", masks=True, dilation=True, hidden_dim=64, nheads=8),
    "conditional": dict(backbone="resnet18", decoder="conditional", class_loss="focal"),
    "conditional-learned-dc5": dict(backbone="resnet50", dilation=True, decoder="conditional", class_loss="focal",
                                    position_embedding="learned"),
    "dab": dict(backbone="resnet18", decoder="dab", class_loss="focal", temperature=20),
    "dab-waves-dc5": dict(backbone="resnet50", dilation=True, decoder="dab", class_loss="focal", temperature=15),
}
VARIANTS = {name: MODELS[name] | {"nheads": 8} for name in ("conditional", "dab")}


def make_detector(short_side: int | None = 96, masks: bool = False, **settings) -> LoadedDetector:
    "A model with random weights, whose queries and statistics differ."
    torch.manual_seed(0)
    model = build_detr(**TINY | settings)
    torch.nn.init.normal_(model.query_embed.weight, std=2)
    torch.nn.init.normal_(model.class_embed.weight, std=0.3)
    for name, parameter in model.named_parameters() if "decoder" in settings else ():  # boxes, slopes begin alike
        if "activation" in name or name.startswith("bbox_embed.layers.2."):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "bias")):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    model = build_segmentation(model) if masks else model
    return LoadedDetector(model.eval(), NAMES, IDS, Preprocessing(short_side, 160))


def save_run(detector: LoadedDetector, folder: Path) -> Path:
    "The folder of a run whose best model this is."
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "best.pth", {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "model": detector.model.state_dict(),
        "architecture": architecture(detector.model), "preprocessing": detector.preprocessing._asdict(),
        "classes": {"ids": list(detector.category_ids), "names": list(detector.names)}})
    return folder


def some_pictures() -> list[torch.Tensor]:
    "Three of different sizes, the first as large as the models here want it."
    sizes = ((96, 144), (60, 100), (130, 70))
    return [torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(size[0]), dtype=torch.uint8)
            for size in sizes]


def convert(source: Path, target: Path, *flags: str) -> Path:
    "The command."
    main([str(source), str(target), *flags])
    return target


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_folder_and_says_the_same(name, tmp_path):
    "Logits, boxes and masks, on a batch with padding; and back here every tensor, name, id and size."
    detector, masks = make_detector(**MODELS[name]), "masks" in name
    folder = convert(save_run(detector, tmp_path / "run"), tmp_path / "theirs", "--to", "transformers",
                     *["--masks"] * masks)
    kind = transformers.DetrForSegmentation if masks else transformers.AutoModelForObjectDetection
    theirs, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id["血球"] == 2
    images, padding = pad_images(some_pictures())
    with torch.no_grad():
        expected = detector.model(images, padding)
        found = theirs.eval()(pixel_values=images, pixel_mask=(~padding).long())
    assert expected.logits[-1].std(1).mean() > 0.02  # queries that differ
    torch.testing.assert_close(found.logits, expected.logits[-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.boxes[-1], rtol=0, atol=1e-5)
    if masks:
        torch.testing.assert_close(found.pred_masks, expected.masks, rtol=0, atol=1e-4)

    again = load_detector(folder, masks)
    assert architecture(again.model) == architecture(detector.model) | {"norm": "frozen"}
    assert (again.names, again.category_ids, again.preprocessing) == (NAMES, IDS, Preprocessing(96, 160))
    state = detector.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.model.state_dict().items())
    assert again.model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_their_image_processor_gives_our_boxes(masks, tmp_path):
    "Within rounding; where the two programs round a side of the resized picture differently, to a pixel."
    compare_boxes(make_detector(backbone="resnet18", masks=masks, nheads=8), masks, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_their_image_processor_gives_the_boxes_of_a_variant(name, tmp_path):
    "Theirs gives a box for each class of a query, ours the surest."
    compare_boxes(make_detector(**VARIANTS[name]), False, tmp_path, rounded_otherwise=False)


def compare_boxes(detector: LoadedDetector, masks: bool, tmp_path: Path, rounded_otherwise: bool = True) -> None:
    "Of four pictures, by their processor and model, and by ours."
    folder = convert(save_run(detector, tmp_path / "run"), tmp_path / "theirs", "--to", "transformers",
                     *["--masks"] * masks)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    kind = transformers.DetrForSegmentation if masks else transformers.AutoModelForObjectDetection
    theirs = kind.from_pretrained(folder).eval()
    for picture, tolerance in zip((*some_pictures(), draw_scene(0, 3).image), (1e-3, 1e-3, 1, 1e-3)):
        if tolerance == 1 and not rounded_otherwise:
            continue
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
        inputs = processor(images=picture, return_tensors="pt")
        with torch.no_grad():
            found = processor.post_process_object_detection(theirs(**inputs), threshold=0.0,
                                                            target_sizes=[picture.size[::-1]])[0]
        mine = Detector(*detector)(picture, threshold=0.0, device="cpu", masks=False)
        order = found["scores"].argsort(descending=True)
        if len(order) > len(mine.boxes):
            boxes = found["boxes"][order].tolist()
            order = order[[k for k, box in enumerate(boxes) if box not in boxes[:k]]]
        edge = torch.tensor(picture.size * 2)
        assert [theirs.config.id2label[label] for label in found["labels"][order].tolist()] == list(mine.names)
        torch.testing.assert_close(found["boxes"][order].clamp(min=0).minimum(edge), mine.boxes, rtol=0, atol=tolerance)
        torch.testing.assert_close(found["scores"][order], mine.scores, rtol=0, atol=0.1 * tolerance)


def write_theirs(folder: Path, kind: str = "Detr", names: tuple = NAMES, **processing) -> tuple:
    "A folder as transformers writes it, with random weights and a wish for other images; its model and processor."
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"],
                                         hidden_sizes=[64, 128, 256, 512])  # fmt: skip
    settings = dict(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
                    encoder_attention_heads=4, decoder_attention_heads=4, num_queries=9, use_timm_backbone=False,
                    use_pretrained_backbone=False, backbone_config=backbone,
                    id2label=dict(enumerate(names)))  # fmt: skip
    if kind != "Detr":  # nobody else's backbone is given by three names
        del settings["use_timm_backbone"], settings["use_pretrained_backbone"]
    settings |= {"hidden_size" if kind == "DabDetr" else "d_model": 32}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("model.query_", "class_")) and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=2 if "query" in name else 0.3)
        elif kind != "Detr" and name.startswith("bbox_predictor.layers.2."):
            torch.nn.init.normal_(parameter, std=0.1)
    processor = getattr(transformers, f"{'Detr' if kind == 'Detr' else 'ConditionalDetr'}ImageProcessor")(**processing)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return model, processor


OTHER = dict(size={"shortest_edge": 96, "longest_edge": 160}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.5])


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr", "DabDetr"])
def test_sizes_mean_and_deviation_are_those_of_their_file(kind, tmp_path):
    "A batch with padding, normalised by them there and by ImageNet's here; and the wish goes along on the way back."
    theirs, processor = write_theirs(tmp_path / "theirs", kind, **OTHER)
    detector = load(tmp_path / "theirs")
    assert detector.preprocessing == Preprocessing(96, 160) and detector.names == NAMES
    pictures = some_pictures()
    inputs = processor(images=pictures, return_tensors="pt", do_resize=False)
    images, padding = pad_images(pictures)
    assert torch.equal(inputs["pixel_mask"] == 0, padding)
    with torch.no_grad():
        expected, found = theirs(**inputs), detector.model(images, padding)
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=0, atol=1e-5)
    plain, _ = write_theirs(tmp_path / "plain", kind, size=OTHER["size"])
    with torch.no_grad():  # the same weights, without the wish
        assert (load(tmp_path / "plain").model(images, padding).logits[-1] - expected.logits).abs().max() > 0.05

    told = json.loads((convert(tmp_path / "theirs", tmp_path / "again", "--to", "transformers")
                       / "preprocessor_config.json").read_text())
    assert {name: told[name] for name in OTHER} == OTHER
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again").model(images, padding).logits, found.logits)
    with pytest.raises(SystemExit, match="was trained with others: convert it --to transformers"):
        convert(tmp_path / "theirs", tmp_path / "released.pth", "--to", "released")


@pytest.mark.parametrize("told, wanted", [
    ({}, (800, 1333)), ({"size": 480}, (480, 1333)), ({"size": 480, "max_size": 640}, (480, 640)),
    ({"size": {"shortest_edge": 480, "longest_edge": 640}}, (480, 640))], ids=str)
def test_a_size_is_read_as_every_version_wrote_it(told, wanted, tmp_path):
    write_theirs(tmp_path)
    for path in tmp_path.glob("*processor*.json"):
        path.unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    assert load_detector(tmp_path).preprocessing == Preprocessing(*wanted)


@pytest.mark.parametrize("name", ["resnet18", "masks", "conditional", "dab"])
def test_the_released_layout_and_back_through_transformers(name, tmp_path):
    "Key for key and bit for bit, whichever way it went."
    masks = name == "masks"
    detector, flags = make_detector(**MODELS[name] | {"nheads": 8}), ["--masks"] * masks
    run = save_run(detector, tmp_path / "run")
    first = convert(run, tmp_path / "new" / "first.pth", "--to", "released", *flags)
    folder = convert(first, tmp_path / "folder", "--to", "transformers", *flags)
    last = convert(folder, tmp_path / "last.pth", "--to", "released", *flags)
    ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (first, last))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    images, padding = pad_images(some_pictures())
    with torch.no_grad():
        expected, found = (load_detector(path, masks).model(images, padding) for path in (run, last))
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3]) if a is not None)
    assert ("mask_head.lay1.weight" in ours) == masks


def test_what_has_no_place_there_is_refused_and_nothing_is_written(tmp_path):
    for settings, flags, message in (
        (dict(backbone="small"), (), "small"),
        (dict(backbone="resnet18", short_side=None), (), "takes images as they are"),
        (dict(backbone="resnet18", masks=True, nheads=4), ("--masks",), "eight groups.*hidden_dim=32 with nheads=4"),
        (dict(backbone="resnet18"), ("--masks",), "has no mask head"),
        (DAB | {"box_bias": "rpb"}, (), "box_bias='rpb'"),
        (DAB | {"two_stage": True}, (), "two_stage=True"),
        (DAB | {"class_loss": "ce"}, (), "decoder='dab' and class_loss='ce'"),
        (DAB | {"backbone": "small"}, (), "norm='group'"),
        (DAB | {"pre_norm": True}, (), "pre_norm=True"),
        (DAB | {"position_embedding": "learned"}, (), "no place for position_encoding.row_embed"),
        (DAB | {"temperature": 20.5}, (), "whole temperatures, not 20.5"),
        (dict(backbone="resnet18", decoder="detr", class_loss="focal"), (), "decoder='detr' and class_loss='focal'"),
        (MODELS["conditional"] | {"masks": True, "nheads": 8}, ("--masks",), "no masks for decoder='conditional'"),
    ):
        run = save_run(make_detector(**settings), tmp_path / "run")
        with pytest.raises(SystemExit, match=message):
            convert(run, tmp_path / "theirs", "--to", "transformers", *flags)
        assert not (tmp_path / "theirs").exists()
    run = save_run(make_detector(**DAB | {"temperature": 15}), tmp_path / "run")
    with pytest.raises(SystemExit, match="temperature=15"):  # which the released code takes by a flag
        convert(run, tmp_path / "theirs", "--to", "released")
    assert not (tmp_path / "theirs").exists()


DAB = MODELS["dab"]


@pytest.mark.parametrize("settings", [dict(decoder="detr"), VARIANTS["conditional"] | {"class_loss": "mal"},
                                      VARIANTS["dab"] | {"class_loss": "ia_bce"}], ids=["detr", "conditional", "dab"])
def test_of_groups_of_queries_the_first_is_written(settings, tmp_path):
    "It alone answers; and which loss has taught the scores is of no matter."
    detector = make_detector(**settings | {"backbone": "resnet18", "nheads": 8, "query_groups": 3})
    run = save_run(detector, tmp_path / "run")
    images, padding = pad_images(some_pictures())
    with torch.no_grad():
        expected = detector.model(images, padding)
        for way in ("released", "transformers"):
            found = load_detector(convert(run, tmp_path / way, "--to", way)).model
            assert len(found.query_embed.weight) == found.num_queries == 9
            assert torch.equal(found(images, padding).logits, expected.logits)


@pytest.mark.parametrize("told, message", [
    ({"normalize_before": True}, "normalize_before=True"), ({"num_patterns": 3}, "num_patterns=3"),
    ({"temperature_width": 30}, "20 for heights and 30 for widths"), ({"activation_function": "relu"}, "is relu"),
    ({"decoder_attention_heads": 8}, "8 in the decoder")], ids=str)
def test_a_dab_detr_that_ours_cannot_be_is_refused(told, message, tmp_path):
    write_theirs(tmp_path, "DabDetr")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | told))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["ConditionalDetr", "DabDetr"])
def test_a_folder_of_theirs_is_scored_and_trained_on(kind, tmp_path):
    "`--resume FOLDER --eval` scores what `load` gives; `--finetune FOLDER` takes all that fits, the decoder with it."
    write_theirs(tmp_path / "theirs", kind, ("ring", "disc", "star"), size={"shortest_edge": 96, "longest_edge": 160})
    shapes = write_shapes(tmp_path / "shapes", num_train=8, num_val=4, num_workers=1)
    data = ["--coco_path", str(shapes), "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]
    train.main(["--eval", "--resume", str(tmp_path / "theirs"), *data])
    train.main(["--finetune", str(tmp_path / "theirs"), *data, "--lr", "0", "--lr_backbone", "0", "--image_size", "96",
                "--epochs", "1", "--output_dir", str(tmp_path / "run")])
    ours, found = load_detector(tmp_path / "theirs").model, load_detector(tmp_path / "run").model
    assert found.family["decoder"] == ours.family["decoder"] and found.num_classes == 6
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]) or name.startswith("class_embed."), name
