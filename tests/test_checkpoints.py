"""Checkpoints of the released DETR, of transformers and of ours: in and out, bit for bit, and refusals of all else."""
import argparse
import functools
import hashlib
import http.server
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from detr_nb.checkpoints import (
    CHECKPOINT,
    PREVIOUS,
    RELEASED,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from detr_nb.detr import DETR, build_detr
from detr_nb.distributed import UserError
from detr_nb.layouts import (
    architecture,
    from_released,
    from_transformers,
    known_architecture,
    to_released,
    to_transformers,
)
from detr_nb.pretrained import COCO_NAMES, Preprocessing, load_detector, transfer_weights
from detr_nb.segmentation import SegmentationDETR, build_segmentation

ROOT = Path(__file__).resolve().parent.parent


# ---- the released layout, written out by its rule and not by our code


def with_bias(name: str, *shape: int) -> dict:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet_shapes(blocks: tuple[int, ...], bottleneck: bool) -> dict:
    def norm(name, width):
        return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}

    shapes, inputs = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}, 64
    for stage, count in enumerate(blocks):
        inside = 64 * 2**stage
        outputs = inside * (4 if bottleneck else 1)
        for block in range(count):
            start = f"layer{stage + 1}.{block}"
            kernels = [(inside, inputs, 1), (inside, inside, 3), (outputs, inside, 1)]
            for number, (after, before, size) in enumerate(
                kernels if bottleneck else [(inside, inputs, 3), (inside, inside, 3)], start=1
            ):
                shapes[f"{start}.conv{number}.weight"] = (after, before, size, size)
                shapes |= norm(f"{start}.bn{number}", after)
            if block == 0 and (stage > 0 or inputs != outputs):
                shapes[f"{start}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= norm(f"{start}.downsample.1", outputs)
            inputs = outputs
    return shapes


def detector_shapes(blocks, bottleneck=True, layers=6, width=256, ffn=2048, queries=100, classes=91) -> dict:
    def attention(name):
        return {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,),
                **with_bias(f"{name}.out_proj", width, width)}

    shapes = {}
    for half, attentions, norms in (("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3)):
        for layer in range(layers):
            start = f"transformer.{half}.layers.{layer}"
            for name in attentions:
                shapes |= attention(f"{start}.{name}")
            shapes |= with_bias(f"{start}.linear1", ffn, width) | with_bias(f"{start}.linear2", width, ffn)
            for norm in range(1, norms + 1):
                shapes |= with_bias(f"{start}.norm{norm}", width)
    shapes |= with_bias("transformer.decoder.norm", width) | with_bias("class_embed", classes + 1, width)
    for layer, outputs in enumerate((width, width, 4)):
        shapes |= with_bias(f"bbox_embed.layers.{layer}", outputs, width)
    shapes |= {"query_embed.weight": (queries, width)}
    shapes |= with_bias("input_proj", width, 64 * 8 * (4 if bottleneck else 1), 1, 1)
    return shapes | {f"backbone.0.body.{name}": shape for name, shape in resnet_shapes(blocks, bottleneck).items()}


def mask_head_shapes(width=256, heads=8) -> dict:
    shapes = with_bias("bbox_attention.q_linear", width, width) | with_bias("bbox_attention.k_linear", width, width)
    widths = [width + heads, width + heads, width // 2, width // 4, width // 8, width // 16]
    for layer in range(1, 6):
        shapes |= with_bias(f"mask_head.lay{layer}", widths[layer], widths[layer - 1], 3, 3)
        shapes |= with_bias(f"mask_head.gn{layer}", widths[layer])
    shapes |= with_bias("mask_head.out_lay", 1, widths[5], 3, 3)
    for adapter, (inputs, outputs) in enumerate(zip((1024, 512, 256), widths[2:5]), start=1):
        shapes |= with_bias(f"mask_head.adapter{adapter}", outputs, inputs, 1, 1)
    return shapes


def fill(shapes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    "Random values; variances and norms' weights positive."
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.rand(shape, generator=generator) + ("running_var" in name or "norm" in name)
            for name, shape in shapes.items()}


SLIM = dict(layers=2, width=32, ffn=48, queries=10)
R18 = dict(blocks=(2, 2, 2, 2), bottleneck=False, **SLIM)
VARIANTS = {  # of the seven released models those that differ in kind
    "detr_resnet50": dict(blocks=(3, 4, 6, 3)),  # the one in full size
    "detr_resnet101_dc5": dict(blocks=(3, 4, 23, 3), **SLIM),
    "detr_resnet50_panoptic": dict(blocks=(3, 4, 6, 3), classes=250, **SLIM),
}


def assert_same(first: dict, second: dict) -> None:
    "The same names, and under each the same bits."
    assert first.keys() == second.keys(), set(first) ^ set(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def assert_same_answers(first: DETR, second: DETR, exact: bool = True) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    with torch.no_grad():
        for ours, theirs in zip(first.eval()(images, padding), second.eval()(images, padding)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else 1e-5)


def test_the_written_rule_has_the_sizes_of_the_paper():
    shapes = detector_shapes(**VARIANTS["detr_resnet50"])
    frozen = ("running_", ".bn", "downsample.1.", "body.conv1.", "body.layer1.")
    trained = {name: shape for name, shape in shapes.items() if not any(part in name for part in frozen)}
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == 41_302_368  # as the released log says
    assert len(shapes) == 458


@pytest.mark.parametrize("name", VARIANTS)
def test_a_released_checkpoint_comes_back_key_for_key_and_bit_for_bit(name, caplog):
    state = fill(detector_shapes(**VARIANTS[name]))
    panoptic = name.endswith("panoptic")
    given = {f"detr.{key}": value for key, value in state.items()} | fill(mask_head_shapes()) if panoptic else state
    model = from_released({"model": given}, dilation="dc5" in name)
    assert_same(to_released(model)["model"], state)
    trained = [name for name, parameter in model.backbone.body.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith(("layer2", "layer3", "layer4")) for name in trained)  # as in the paper
    found = architecture(model)
    assert found["backbone"] == name.split("_")[1] and found["dilation"] == ("dc5" in name)
    assert model.backbone.stride == (16 if "dc5" in name else 32) and found["nheads"] == 8
    assert model.num_classes == (250 if panoptic else 91)
    assert ("mask head" in caplog.text) == panoptic
    assert not model.training


def test_a_released_panoptic_checkpoint_comes_with_its_mask_head(caplog):
    "Key for key and bit for bit, in the released order, and without a warning that something was left out."
    head = fill(mask_head_shapes(32, 8))
    shapes = detector_shapes(**VARIANTS["detr_resnet50_panoptic"])
    state = {f"detr.{key}": value for key, value in fill(shapes).items()} | head
    model = from_released({"model": state}, masks=True)
    assert isinstance(model, SegmentationDETR) and not model.training and not model.frozen and not caplog.text
    written = to_released(model)["model"]
    assert_same(written, state)
    ours = [key for key in written if not key.startswith("detr.")]
    assert ours[:2] == ["bbox_attention.q_linear.weight", "bbox_attention.q_linear.bias"]
    assert [key.split(".")[1] for key in ours[4::2]] == (
        [f"{kind}{k}" for k in range(1, 6) for kind in ("lay", "gn")] + ["out_lay", "adapter1", "adapter2", "adapter3"])
    assert architecture(model) == architecture(model.detr)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).masks.shape == (1, 10, 16, 24)


def test_masks_are_asked_for_in_vain():
    with pytest.raises(CheckpointError, match="has no mask head: load it without masks"):
        from_released({"model": fill(detector_shapes(**R18))}, masks=True)
    state = {f"detr.{key}": value for key, value in fill(detector_shapes(**R18)).items()}
    half = state | dict(list(fill(mask_head_shapes(32, 8)).items())[:-1])
    with pytest.raises(CheckpointError, match="does not hold a whole DETR.*mask_head"):
        from_released({"model": half}, masks=True)
    narrow = build_detr(3, "small", **TINY | dict(hidden_dim=24, nheads=2))  # could not have masks: that is not said
    with pytest.raises(CheckpointError, match="has no mask head: load it without masks, or give a model"):
        load_detector(make_state(narrow), masks=True)


def test_a_checkpoint_of_ours_with_masks(tmp_path, caplog):
    "The whole model with `masks`, else the detector and a warning; both answer alike."
    sizes = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1, num_queries=5)
    model = build_segmentation(build_detr(2, "small", **sizes))
    save_checkpoint(tmp_path / "checkpoint.pth", {
        "format": "detr_nb", "version": 1, "model": model.state_dict(), "config": {},
        "classes": {"ids": [1, 4], "names": ["a", "b"]}, "architecture": architecture(model),
        "preprocessing": {"short_side": None, "max_size": 160}})
    whole, detector = (load_detector(tmp_path / "checkpoint.pth", masks=masks).model for masks in (True, False))
    assert_same(whole.state_dict(), model.state_dict())
    assert_same(detector.state_dict(), model.detr.state_dict())
    assert caplog.text.count("left out") == 1


def test_a_detector_names_its_classes_and_tells_things_from_stuff(tmp_path):
    "Released panoptic models by COCO's ids, ours as the checkpoint says; the others know no stuff."
    head = fill(mask_head_shapes(32, 8))
    shapes = detector_shapes(**VARIANTS["detr_resnet50_panoptic"])
    state = {f"detr.{key}": value for key, value in fill(shapes).items()} | head
    released = load_detector({"model": state}, masks=True)
    assert isinstance(released.model, SegmentationDETR) and released.category_ids == tuple(range(250))
    kinds = {"thing": (1, 18, 90), "stuff": (92, 93, 125, 148, 184, 187, 193, 200)}
    names = "person dog toothbrush banner blanket gravel river tree-merged sky-other-merged grass-merged rug-merged"
    assert [released.names[index] for index in (*kinds["thing"], *kinds["stuff"])] == names.split()
    assert all(released.is_thing[index] == (kind == "thing") for kind, ids in kinds.items() for index in ids)
    used = [thing for name, thing in zip(released.names, released.is_thing, strict=True) if name != "N/A"]
    assert (used.count(True), used.count(False)) == (80, 53)  # as in COCO's panoptic task
    assert load_detector({"model": fill(detector_shapes(**R18))}).is_thing is None

    model = build_segmentation(build_detr(2, "small", **TINY))
    for kinds in (None, [True, False]):
        classes = {"ids": [3, 9], "names": ["disc", "grain"]} | ({} if kinds is None else {"is_thing": kinds})
        state = make_state(model.detr) | {"classes": classes, "model": model.state_dict()}
        save_checkpoint(tmp_path / "best.pth", state)
        for masks in (True, False):
            assert load_detector(tmp_path / "best.pth", masks).is_thing == (kinds and tuple(kinds))


def test_the_names_of_the_released_models_are_those_of_their_files():
    assert len(RELEASED) == 7 and RELEASED.keys() >= VARIANTS.keys()
    for name, address in RELEASED.items():
        file = address.rsplit("/", 1)[1]
        assert ("dc5" in name, "panoptic" in name, "101" in name) == ("dc5" in file, "panoptic" in file, "101" in file)


def test_sizes_and_depth_are_read_off_the_shapes():
    shapes = detector_shapes((3, 4, 6, 3), False, layers=3, width=24, ffn=40, queries=7, classes=5)
    found = architecture(from_released(fill(shapes)))
    wanted = dict(backbone="resnet34", enc_layers=3, dec_layers=3, hidden_dim=24, dim_feedforward=40, num_queries=7)
    assert found.items() >= wanted.items() and found["num_classes"] == 5


def test_pre_norm_and_learned_positions_are_read_off_the_names():
    model = build_detr(3, "resnet18", pretrained=None, hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2,
                       dim_feedforward=8, num_queries=4, position_embedding="learned", pre_norm=True)
    released = to_released(model)
    assert {"backbone.1.row_embed.weight", "transformer.encoder.norm.weight"} <= released["model"].keys()
    again = from_released(released, nheads=2)
    assert architecture(again) == architecture(model) | {"dropout": 0.1}
    assert_same_answers(again, model)


def test_dilation_is_told_by_the_name_the_argument_or_the_saved_flags(tmp_path):
    state = fill(detector_shapes(**R18))
    plain, dc5 = tmp_path / "detr-r18-00000000.pth", tmp_path / "detr-r18-dc5-00000000.pth"
    for file in (plain, dc5):
        torch.save({"model": state}, file)
    trained = tmp_path / "checkpoint.pth"  # as the released training writes them, with its flags
    torch.save({"model": state, "args": argparse.Namespace(dilation=True, nheads=4), "epoch": 3}, trained)
    strides = [from_released(file).backbone.stride for file in (plain, dc5, trained)]
    assert strides == [32, 16, 16]
    assert from_released(dc5, dilation=False).backbone.stride == 32
    assert from_released(trained).transformer.decoder.layers[0].self_attn.heads == 4
    assert from_released(plain, nheads=2).transformer.decoder.layers[0].self_attn.heads == 2


def test_heads_and_dilation_are_written_beside_the_tensors(tmp_path):
    for dilation, nheads in ((False, 4), (True, 2)):
        model = from_released(fill(detector_shapes(**R18)), dilation=dilation, nheads=nheads)
        torch.save(to_released(model), tmp_path / "mine.pth")
        assert_same_answers(from_released(tmp_path / "mine.pth"), model)
        assert known_architecture(tmp_path / "mine.pth").items() >= {"nheads": nheads, "dilation": dilation}.items()


def test_what_is_no_checkpoint_is_refused():
    model = from_released(fill(detector_shapes(**R18)))
    with pytest.raises(CheckpointError, match="not a DETR; of a model give its state_dict"):
        load_detector(model)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="transformers has no place for extra.weight, extra.bias"):
        to_transformers(model)


def test_flags_that_are_none_are_passed_over():
    for flags in (None, [1]):
        assert known_architecture({"model": fill(detector_shapes(**R18)), "args": flags})["nheads"] == 8


def test_a_model_without_encoder_layers_comes_back_in_every_layout():
    model = build_detr(3, "resnet18", pretrained=None, **TINY | {"enc_layers": 0}).eval()
    for again in (from_released(to_released(model)), from_transformers(to_transformers(model), nheads=TINY["nheads"]),
                  load_detector(make_state(model)).model):
        assert_same_answers(again, model)


def test_double_precision_stays():
    state = {name: tensor.double() for name, tensor in fill(detector_shapes(**R18)).items()}
    model = from_released(state)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    assert_same(to_released(model)["model"], state)


def test_the_loaded_model_shares_no_memory_with_the_checkpoint():
    state = fill(detector_shapes(**R18))
    model = from_released(state)
    before = state["query_embed.weight"].clone()
    torch.nn.init.zeros_(model.query_embed.weight)
    assert torch.equal(state["query_embed.weight"], before)


# ---- transformers


@pytest.fixture
def make_transformers():
    "A function that makes transformers' model with random weights and statistics."
    transformers = pytest.importorskip("transformers")

    def make(depths=(2, 2, 2, 2), layer_type="basic", **settings):
        hidden = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
        backbone = transformers.ResNetConfig(
            depths=list(depths), layer_type=layer_type, hidden_sizes=hidden, out_features=["stage4"]
        )
        settings = dict(d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48,
                        num_queries=9, num_labels=5) | settings
        torch.manual_seed(0)
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **settings
        )).eval()
        state = model.state_dict()
        for name, tensor in state.items():
            if "normalization" in name or "norm." in name:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(std=0.1)
            elif tensor.dim() < 3:  # width 32: signals keep their size
                tensor.normal_(std=2.0 if "query" in name else 0.1 * tensor.dim())
        return model

    return make


@pytest.mark.parametrize("settings", [
    dict(position_embedding_type="learned"), dict(depths=(3, 4, 6, 3), layer_type="bottleneck"),
], ids=["learned", "resnet50"])
def test_a_model_of_transformers_gives_the_same_answers_here_and_comes_back(make_transformers, settings):
    theirs = make_transformers(**settings)
    ours = from_transformers(theirs.state_dict())
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 64:], mask[1, :, 80:] = 0, 0
    with torch.no_grad():
        expected, found = theirs(pixel_values=images, pixel_mask=mask), ours(images, mask == 0)
    assert expected.logits.std(dim=1).mean() > 0.02 and expected.pred_boxes.std(dim=1).mean() > 0.002
    assert (expected.logits[0] - expected.logits[1]).abs().max() > 0.1  # neither queries nor images are all alike
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=0, atol=1e-5)
    back = to_transformers(ours)
    assert_same(back, theirs.state_dict())
    assert_same(from_transformers(to_transformers(ours, timm=True)).state_dict(), ours.state_dict())
    empty = type(theirs)(theirs.config)
    empty.load_state_dict(back, strict=True)


def older_names(state: dict) -> dict:
    "The names of the published facebook/detr-resnet files, from those of ours with timm's backbone, by hand."
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("model.backbone.model.", "model.backbone.conv_encoder.model.").replace(".mlp.", ".")
        renamed[name.replace(".o_proj.", ".out_proj.")] = tensor
    return renamed


@pytest.mark.parametrize("timm", [True, False], ids=["timm", "own ResNet"])
def test_the_names_of_published_files_are_understood(timm):
    model = from_released(fill(detector_shapes(**R18)))
    old = older_names(to_transformers(model, timm=timm))
    known = ["model.decoder.layers.1.encoder_attn.out_proj.weight", "model.encoder.layers.0.fc1.weight",
             "class_labels_classifier.weight", "model.query_position_embeddings.weight",
             "model.backbone.conv_encoder.model." + ("layer1.0.bn1" if timm else
             "encoder.stages.0.layers.0.layer.0.normalization") + ".running_mean"]
    assert set(known) <= old.keys()
    assert_same(from_transformers(old).state_dict(), model.state_dict())
    counted = old | {known[-1].replace("running_mean", "num_batches_tracked"): torch.tensor(3)}
    assert_same(from_transformers(counted).state_dict(), model.state_dict())


def test_the_detector_of_a_segmentation_model_is_found(caplog):
    model = from_released(fill(detector_shapes(**R18)))
    state = {f"detr.{name}": tensor for name, tensor in to_transformers(model, timm=True).items()}
    state["mask_head.lay1.weight"] = torch.zeros(3)
    assert_same(from_transformers(state).state_dict(), model.state_dict())
    assert "left out" in caplog.text


def test_a_folder_of_transformers_tells_heads_dilation_and_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = from_released(fill(detector_shapes(**R18, classes=2)), dilation=True, nheads=4)
    safetensors.save_file(to_transformers(model, timm=True), tmp_path / "model.safetensors")
    labels = '{"0": "cell", "1": "platelet"}'
    heads = '"encoder_attention_heads": 4, "decoder_attention_heads": 4'
    (tmp_path / "config.json").write_text(f'{{"dilation": true, {heads}, "id2label": {labels}}}')
    for source in (tmp_path, tmp_path / "model.safetensors"):
        detector = load_detector(source)
        assert detector.names == ("cell", "platelet") and detector.category_ids == (0, 1)
        assert architecture(detector.model) == architecture(model)
        assert_same_answers(detector.model, model)
    for other in ('"activation_function": "gelu"', '"encoder_attention_heads": 4, "decoder_attention_heads": 8',
                  '"decoder_attention_heads": 4', '"encoder_attention_heads": 4'):  # what is left out is 8 there
        (tmp_path / "config.json").write_text(f"{{{other}}}")
        with pytest.raises(CheckpointError, match="by its config.json"):
            load_detector(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json holds no settings by name, but a list"):
        load_detector(tmp_path)


def test_a_model_that_the_others_cannot_have_is_not_written():
    for settings, reason in ((dict(backbone="small"), "small"), (dict(norm="group"), "group"),
                             (dict(temperature=20), "temperature=20"), (dict(pre_norm=True), "pre_norm")):
        model = build_detr(3, **dict(backbone="resnet18", pretrained=None) | TINY | settings)
        with pytest.raises(CheckpointError, match=reason):
            to_transformers(model)
        if reason != "pre_norm":  # the released code has it
            with pytest.raises(CheckpointError, match=reason):
                to_released(model)


# ---- ours


def make_state(model: DETR, names=("disc", "star", "bar"), **changes) -> dict:
    "A checkpoint of ours, as a run writes it, for this model."
    return {
        "format": "detr_nb", "version": 1, "epoch": 3, "step": 40, "model": model.state_dict(),
        "config": {"lr": 1e-4, "coco_path": "", "image_size": 0},
        "classes": {"ids": [3, 7, 9][: len(names)], "names": list(names)},
        "architecture": architecture(model), "preprocessing": {"short_side": None, "max_size": 160},
    } | changes


TINY = dict(hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=8, num_queries=5)


@pytest.mark.parametrize("settings", [
    dict(backbone="small", temperature=20, pre_norm=True), dict(backbone="small", position_embedding="learned"),
    dict(backbone="resnet18", norm="batch", dilation=True, dropout=0.0),
    dict(backbone="resnet18", norm="frozen", nheads=4)], ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_checkpoint_of_ours_gives_back_the_same_model(tmp_path, settings):
    model = build_detr(3, pretrained=None, **TINY | settings)
    save_checkpoint(tmp_path / "checkpoint.pth", make_state(model))
    for source in (tmp_path / "checkpoint.pth", str(tmp_path / "checkpoint.pth"), make_state(model)):
        detector = load_detector(source)
        assert architecture(detector.model) == architecture(model)
        assert architecture(model).items() >= settings.items()
        assert_same(detector.model.state_dict(), model.state_dict())
        assert (detector.names, detector.category_ids) == (("disc", "star", "bar"), (3, 7, 9))
        assert detector.preprocessing == Preprocessing(None, 160)
        assert_same_answers(detector.model, model)


def test_a_killed_or_a_refused_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"format": "detr_nb", "version": 1, "epoch": 1, "architecture": {}, "preprocessing": {},
                           "config": {}})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="Path"):
        save_checkpoint(path, {"format": "detr_nb", "where": tmp_path})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    def killed(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def test_a_run_goes_on_from_the_newer_file_that_can_be_read(tmp_path, caplog):
    state = make_state(build_detr(3, "small", pretrained=None, **TINY))
    assert newest_checkpoint(tmp_path) is None
    for epoch in (1, 2):
        save_checkpoint(tmp_path / CHECKPOINT, state | {"epoch": epoch}, previous=tmp_path / PREVIOUS)
    assert load_checkpoint(newest_checkpoint(tmp_path))["epoch"] == 2
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:1000])
    assert load_checkpoint(newest_checkpoint(tmp_path))["epoch"] == 1 and "going on from previous.pth" in caplog.text
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be read.*checkpoint.pth.*previous.pth"):
        newest_checkpoint(tmp_path)


# ---- refusals


class Trace:
    "Unpickled by pickle's own rules, this writes a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code of the file ran")


def refused_by_all(path, message="not a checkpoint that can be read"):
    for function in (load_detector, load_checkpoint, lambda path: transfer_weights(fresh_model(2), path, ["a", "b"])):
        with pytest.raises(CheckpointError, match=f"{path.name} is .*{message}"):
            function(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [
    lambda path, trace: torch.save({"model": {"a": torch.zeros(2)}, "extra": trace}, path),
    lambda path, trace: path.write_bytes(pickle.dumps({"format": "detr_nb", "model": trace})),
], ids=["torch's zip", "a bare pickle"])
def test_a_file_with_code_in_it_is_refused_and_its_code_not_run(tmp_path, write):
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    write(path, Trace(mark))
    refused_by_all(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if path.read_bytes()[:2] == b"PK" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file of this test does nothing when it is run: the test shows nothing"


def test_a_file_that_is_something_else_or_damaged_is_refused(tmp_path):
    page, path = tmp_path / "page.pth", tmp_path / "checkpoint.pth"
    page.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    refused_by_all(page, "a web page")
    for content in (b"", b"PK\x03\x04 and no more", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"):
        path.write_bytes(content)
        refused_by_all(path)
    save_checkpoint(path, make_state(build_detr(3, "small", pretrained=None, **TINY)))
    whole = path.read_bytes()
    for share in (0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        refused_by_all(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 8]) + whole[middle + 8 :])
    refused_by_all(path, "are not those that were written")  # which torch alone would not notice
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "nowhere.pth")


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    safetensors, path = pytest.importorskip("safetensors.torch"), tmp_path / "model.safetensors"
    safetensors.save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    refused_by_all(path)


def without(part: str, state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize("change, message", [
    (lambda state: {"layers.0.weight": torch.zeros(2)}, "no layout known here.*layers.0.weight"),
    (lambda state: {"epoch": 3}, "no state dict"),
    (lambda state: without("layer3.1", state), "no ResNet known here"),
    (lambda state: without("class_embed", state), "class_embed.weight"),
    (lambda state: without("bbox_embed.layers.1.bias", state), "bbox_embed.layers.1.bias"),
    (lambda state: state | {"input_proj.weight": torch.zeros(32, 7, 1, 1)}, "input_proj.weight"),
    (lambda state: state | {"surprise.weight": torch.zeros(1)}, "surprise.weight"),
])
def test_a_state_dict_that_is_not_a_whole_detr_is_refused_by_what_is_wrong(change, message):
    with pytest.raises(CheckpointError, match=message):
        load_detector(change(fill(detector_shapes(**R18))))


def test_a_missing_projection_is_named():
    state = to_transformers(from_released(fill(detector_shapes(**R18))))
    with pytest.raises(CheckpointError, match="k_proj"):
        from_transformers(without("encoder.layers.1.self_attn.k_proj.weight", state))


def test_each_loader_names_the_layout_it_was_given():
    model = from_released(fill(detector_shapes(**R18)))
    with pytest.raises(CheckpointError, match="names of transformers"):
        from_released(to_transformers(model))
    with pytest.raises(CheckpointError, match="names of released"):
        from_transformers(to_released(model))
    with pytest.raises(CheckpointError, match="without their settings"):
        load_detector(model.state_dict())


def test_only_checkpoints_of_ours_of_this_version_are_resumed(tmp_path):
    of_later, not_ours = {"format": "detr_nb", "version": 2}, {"model": {}}
    for content, message in [(not_ours, "not a checkpoint of detr_nb"), (of_later, "version 2")]:
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "x.pth")
    assert issubclass(CheckpointError, UserError)


# ---- addresses


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A folder served on this machine, the list of paths asked for, and torch's cache in a folder of its own."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, asked, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def serve(folder: Path, content: dict, start: str = "detr-r18-") -> str:
    "Save a checkpoint under a name with the digits of its SHA-256; returns the name."
    torch.save(content, folder / "new.pth")
    name = start + hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8] + ".pth"
    (folder / "new.pth").rename(folder / name)
    return name


def test_an_address_is_fetched_once(server):
    folder, asked, address = server
    state = fill(detector_shapes(**R18))
    name = serve(folder, {"model": state})
    for _ in range(2):
        assert_same(to_released(from_released(address + name))["model"], state)
    assert asked == [f"/{name}"]


def test_a_name_stands_for_the_file_of_the_released_model(server, monkeypatch):
    folder, asked, address = server
    state = fill(detector_shapes(**R18))
    monkeypatch.setitem(RELEASED, "detr_resnet50", address + serve(folder, {"model": state}))
    monkeypatch.setitem(RELEASED, "detr_resnet50_dc5", address + serve(folder, {"model": state}, "detr-r18-dc5-"))
    detector = load_detector("detr_resnet50")
    assert detector.names == COCO_NAMES and detector.category_ids == tuple(range(91))
    assert detector.preprocessing == Preprocessing(800, 1333) and detector.model.backbone.stride == 32
    assert load_detector("detr_resnet50_dc5").model.backbone.stride == 16
    assert_same(to_released(from_hub("detr_resnet50", pretrained=True))["model"], state)
    report = transfer_weights(from_released(fill(detector_shapes(**R18), seed=1)), "detr_resnet50", COCO_NAMES)
    assert "detr-r18" in report.source and not report.unused.keys() - {"class_embed.weight", "class_embed.bias"}


def test_digits_that_do_not_fit_are_refused_and_nothing_is_kept(server, tmp_path):
    folder, _, address = server
    name = serve(folder, {"model": fill(detector_shapes(**R18))})
    (folder / name).rename(folder / "detr-r18-0123abcd.pth")
    with pytest.raises(CheckpointError, match="hash"):
        load_detector(address + "detr-r18-0123abcd.pth")
    assert not list((tmp_path / "cache").rglob("*.pth"))


def test_a_file_that_somebody_put_into_the_cache_is_checked_too_and_stays(server, tmp_path):
    folder, asked, address = server
    name = serve(folder, {"model": fill(detector_shapes(**R18))})
    place = tmp_path / "cache/hub/checkpoints" / name
    place.parent.mkdir(parents=True)
    torch.save({"model": fill(detector_shapes(**R18), seed=1)}, place)
    with pytest.raises(CheckpointError, match=f"{name} is not the file of .*its SHA-256 does not begin with"):
        load_detector(address + name)
    (folder / name).rename(place)
    load_detector(address + name)
    assert not asked and place.exists()
    rotten = bytearray(place.read_bytes())
    rotten[len(rotten) // 2] ^= 1  # one bit, in a file that was right when it came
    place.write_bytes(rotten)
    with pytest.raises(CheckpointError, match="Delete it, and it will be downloaded"):
        load_detector(address + name)


def test_a_file_without_digits_that_rots_in_the_cache_is_noticed_and_stays(server, tmp_path):
    folder, asked, address = server
    torch.save({"model": fill(detector_shapes(**R18))}, folder / "model.pth")
    load_detector(address + "model.pth")
    (kept,) = (tmp_path / "cache").rglob("*model.pth")
    kept.write_bytes(kept.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.pth is not a checkpoint that can be read"):
        load_detector(address + "model.pth")
    assert kept.exists() and asked == ["/model.pth"]


def test_what_cannot_be_fetched_is_named_with_its_place(server):
    _, asked, address = server
    with pytest.raises(CheckpointError, match=r"nothing-01234567.pth could not be downloaded \(HTTPError.*404.*put"):
        load_detector(address + "nothing-01234567.pth")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        load_detector("http://127.0.0.1:9/unreachable.pth")


def test_a_web_page_in_place_of_a_checkpoint_does_not_stay_in_the_cache(server):
    folder, asked, address = server
    (folder / "checkpoint.pth").write_text("<html>please log in</html>")
    with pytest.raises(CheckpointError, match="web page"):
        load_detector(address + "checkpoint.pth")
    torch.save({"model": fill(detector_shapes(**R18))}, folder / "checkpoint.pth")
    load_detector(address + "checkpoint.pth")
    assert len(asked) == 2


def test_two_addresses_that_end_alike_are_two_files(server):
    folder, _, address = server
    for place, queries in (("one", 4), ("two", 6)):
        (folder / place).mkdir()
        torch.save({"model": fill(detector_shapes(**R18 | {"queries": queries}))}, folder / place / "checkpoint.pth")
    found = [load_detector(f"{address}{place}/checkpoint.pth").model.num_queries for place in ("one", "two", "one")]
    assert found == [4, 6, 4]


# ---- fine-tuning


def fresh_model(num_classes: int, seed: int = 5, **changes) -> DETR:
    "A model of the shapes of R18 with random weights."
    torch.manual_seed(seed)
    sizes = dict(hidden_dim=32, enc_layers=2, dec_layers=2, dim_feedforward=48, num_queries=10)
    return build_detr(num_classes, "resnet18", pretrained=None, **sizes | changes)


def test_all_that_fits_is_taken_and_the_class_head_is_made_anew():
    source = from_released(fill(detector_shapes(**R18)))
    model, untouched = fresh_model(2), fresh_model(2).state_dict()
    report = transfer_weights(model, to_released(source), ["cell", "platelet"])
    head = {"class_embed.weight": (3, 32), "class_embed.bias": (3,)}
    assert report.fresh == head and not report.partly and not report.settings
    assert report.unused == {"class_embed.weight": (92, 32), "class_embed.bias": (92,)}
    assert report.loaded.keys() == source.state_dict().keys() - head.keys()
    expected = source.state_dict() | {name: untouched[name] for name in head}
    assert_same(model.state_dict(), expected)
    for line in ("anew class_embed.weight (3, 32)", "not used class_embed.bias (92,)"):
        assert line in str(report)


@pytest.mark.parametrize("lacks", ["class_embed.", "query_embed."])
def test_a_part_of_a_detr_is_enough_to_begin_with(lacks):
    whole = fill(detector_shapes(**R18))
    part = {name: tensor for name, tensor in whole.items() if not name.startswith(lacks)}
    source, model = {"model": part | {"something.else": torch.zeros(3)}}, fresh_model(2)
    known = known_architecture(source)
    assert known["hidden_dim"] == 32 and known["backbone"] == "resnet18" and known["dec_layers"] == 2
    assert ("num_queries" in known) == ("query_embed.weight" in part) and known.get("num_classes", 91) == 91
    report = transfer_weights(model, source, ["cell", "platelet"])
    assert "something.else" in report.unused and len(report.loaded) > 100
    assert {name for name in report.fresh if not name.startswith("class_embed.")} == {
        name for name in whole.keys() - part.keys() if not name.startswith("class_embed.")}
    if lacks == "class_embed.":
        with pytest.raises(CheckpointError, match="has no class_embed.weight and class_embed.bias: leave keep_classes"):
            transfer_weights(model, source, ["cell", "platelet"], keep_classes=True)


@pytest.mark.parametrize("lacks, untold", [
    ("transformer.decoder.", {"dec_layers", "dim_feedforward"}), ("backbone.0.body.layer3.1", {"backbone"}),
    ("backbone.0.body.bn1.", set()), ("input_proj.", {"hidden_dim"})])
def test_what_the_tensors_do_not_tell_is_left_out_and_not_guessed(lacks, untold):
    whole = fill(detector_shapes(**R18))
    part = {name: tensor for name, tensor in whole.items() if not name.startswith(lacks)}
    told, expected = known_architecture(part), known_architecture(whole)
    assert told == {key: value for key, value in expected.items() if key not in untold} and told["norm"] == "frozen"
    report = transfer_weights(fresh_model(2), part, ["cell", "platelet"])
    assert len(report.loaded) == len(part) - 2 and not report.settings  # all but the class head
    with pytest.raises(CheckpointError):
        load_detector(part)


def test_an_equal_number_of_other_classes_does_not_inherit_the_head():
    source, model = from_released(fill(detector_shapes(**R18, classes=2))), fresh_model(2)
    before = model.class_embed.weight.clone()
    assert "class_embed.weight" in transfer_weights(model, to_released(source), ["cell", "platelet"]).fresh
    assert torch.equal(model.class_embed.weight, before)


def test_rows_of_shared_names_and_of_no_object_are_kept_on_request():
    source, model = from_released(fill(detector_shapes(**R18))), fresh_model(3)
    before = model.class_embed.weight.clone()
    report = transfer_weights(model, to_released(source), ["Dog", "platelet", "person"], keep_classes=True)
    dog, person, no_object = COCO_NAMES.index("dog"), COCO_NAMES.index("person"), 91
    assert (dog, person) == (18, 1)
    for part in ("weight", "bias"):
        ours, theirs = (getattr(side.class_embed, part) for side in (model, source))
        assert torch.equal(ours[[0, 2, 3]], theirs[[dog, person, no_object]])
    assert torch.equal(model.class_embed.weight[1], before[1])
    assert report.partly["class_embed.weight"] == "(4, 32): the rows of Dog, person, no-object, the others anew"
    assert not report.fresh


def test_classes_of_a_checkpoint_of_ours_are_matched_by_its_names():
    source, model = build_detr(3, "small", pretrained=None, **TINY), build_detr(2, "small", pretrained=None, **TINY)
    transfer_weights(model, make_state(source), ["bar", "disc"], keep_classes=True)
    assert torch.equal(model.class_embed.weight, source.class_embed.weight[[2, 0, 3]])


def test_unnamed_classes_cannot_be_kept_and_unused_ids_are_no_class():
    source = to_released(from_released(fill(detector_shapes(**R18, classes=7))))
    with pytest.raises(CheckpointError, match="does not name its classes"):
        transfer_weights(fresh_model(1), source, ["person"], keep_classes=True)
    report = transfer_weights(fresh_model(1), fill(detector_shapes(**R18)), ["N/A"], keep_classes=True)
    assert report.partly["class_embed.bias"] == "(2,): the rows of no-object, the others anew"


@pytest.mark.parametrize("queries", [4, 10, 25])
def test_fewer_or_more_queries_take_the_first_ones(queries):
    state, model = fill(detector_shapes(**R18)), fresh_model(2, num_queries=queries)
    before, common = model.query_embed.weight.clone(), min(queries, 10)
    report = transfer_weights(model, state, ["a", "b"])
    assert torch.equal(model.query_embed.weight[:common], state["query_embed.weight"][:common])
    assert torch.equal(model.query_embed.weight[common:], before[common:])
    assert ("query_embed.weight" in report.partly) == (queries != 10)
    assert ("rows 10 to 24 anew" in str(report)) == (queries == 25)


def test_what_no_shape_shows_is_reported():
    state = fill(detector_shapes(**R18))
    model = fresh_model(2, nheads=4, dilation=True, norm="batch", temperature=20.0)
    report = transfer_weights(model, state, ["a", "b"])
    assert report.settings == {"nheads": (8, 4), "dilation": (False, True), "norm": ("frozen", "batch"),
                               "temperature": (10000.0, 20.0)}
    assert "differs nheads: 8 there, 4 here" in str(report)
    assert report.fresh.keys() == {"class_embed.weight", "class_embed.bias"}


def test_another_width_or_depth_takes_what_still_fits():
    report = transfer_weights(fresh_model(2, hidden_dim=16, dec_layers=1), fill(detector_shapes(**R18)), ["a", "b"])
    assert all(name.startswith(("backbone.", "transformer", "bbox_embed")) for name in report.loaded)
    assert report.fresh["query_embed.weight"] == (10, 16) and report.unused["query_embed.weight"] == (10, 32)
    assert report.settings["hidden_dim"] == (32, 16)


def test_another_network_keeps_its_own_backbone():
    "A norm of a ResNet-50 fits a ResNet-18 by name and shape, and by nothing else."
    model = fresh_model(2)
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = fill(detector_shapes(**R18 | dict(blocks=(3, 4, 6, 3), bottleneck=True)))
    assert source["backbone.0.body.layer1.0.bn1.running_mean"].shape == (64,)
    report = transfer_weights(model, source, ["a", "b"])
    assert_same({name: x for name, x in model.state_dict().items() if name.startswith("backbone.")},
                {name: x for name, x in untouched.items() if name.startswith("backbone.")})
    assert report.settings == {"backbone": ("resnet50", "resnet18")} and "backbone.body.bn1.weight" in report.unused
    assert "transformer.encoder.layers.0.linear1.weight" in report.loaded


def test_the_number_of_names_must_be_the_number_of_classes():
    with pytest.raises(ValueError, match="3 class names for a model of 2 classes"):
        transfer_weights(fresh_model(2), fill(detector_shapes(**R18)), ["a", "b", "c"])


# ---- torch.hub


def from_hub(name: str, **settings):
    return torch.hub.load(str(ROOT), name, source="local", **settings)


def test_torch_hub_finds_the_models():
    for name, millions, stride in (("detr_resnet50", 41.5, 32), ("detr_resnet101_dc5", 60.4, 16),
                                   ("detr_resnet50_dc5_panoptic", 42.8, 16), ("detr_resnet101_panoptic", 61.8, 32)):
        with torch.device("meta"):
            whole = from_hub(name, num_classes=4)
        assert isinstance(whole, SegmentationDETR if name.endswith("panoptic") else DETR)
        model = getattr(whole, "detr", whole)
        assert (model.backbone.stride, model.num_classes, model.num_queries) == (stride, 4, 100)
        assert round(sum(parameter.numel() for parameter in whole.parameters()) / 1e6, 1) == millions


def test_hubconf_offers_the_released_models_and_names_what_is_imported():
    "`torch.hub.list` shows what can be called, and `torch.hub.load` looks for the dependencies before it imports."
    program = "import ast, sys, hubconf\n" \
        "print(*[n for n in vars(hubconf) if callable(getattr(hubconf, n)) and not n.startswith('_')])\n" \
        "ours = [m.__file__ for n, m in sys.modules.items() if n.startswith('detr_nb.')]\n" \
        "nodes = [n for f in ours for n in ast.parse(open(f, encoding='utf-8').read()).body]\n" \
        "names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}\n" \
        "names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}\n" \
        "roots = {n.split('.')[0] for n in names} - {*sys.stdlib_module_names, 'detr_nb'}\n" \
        "print(*sorted(roots - {*hubconf.dependencies}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    offered, missing = done.stdout.split("\n")[:2]
    assert set(offered.split()) == set(RELEASED) and not missing


def test_released_weights_for_other_classes_say_what_to_do():
    with pytest.raises(UserError, match=r"transfer_weights\(model, 'detr_resnet50', names\)"):
        from_hub("detr_resnet50", pretrained=True, num_classes=4)
    with pytest.raises(UserError, match="detr_resnet50_panoptic has 250 classes, not 91"):
        from_hub("detr_resnet50_panoptic", pretrained=True, num_classes=91)
