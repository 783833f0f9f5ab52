"Deformable attention, against transformers and a plain loop, and what its files are called elsewhere."
import math
import re
from itertools import product

import ledger as ledgers
import pytest
import torch
from test_family import SMALL
from test_parity import list_targets, make_targets
from torch import Tensor, nn

from detr_nb.backbone import Features
from detr_nb.checkpoints import CheckpointError, read_source
from detr_nb.config import PRESETS
from detr_nb.deformable import DeformableDETR
from detr_nb.detr import build_detr
from detr_nb.distributed import UserError
from detr_nb.engine import build_criterion, build_model, build_optimizer, check_settings
from detr_nb.export import OnnxDETR, ProgramDETR, export_file, export_onnx
from detr_nb.focal import SigmoidCriterion
from detr_nb.layouts import our_tensors
from detr_nb.pretrained import load_detector
from detr_nb.sampling import DeformableAttention, lay_levels

transformers = pytest.importorskip("transformers")
IMAGES, CLASSES, QUERIES, LAYERS = (2, 3, 128, 160), 5, 7, 3
KINDS = {
    "one level": dict(num_feature_levels=1),
    "four levels": dict(num_feature_levels=4),
    "refined": dict(num_feature_levels=4, with_box_refine=True),
    "two stages": dict(num_feature_levels=4, with_box_refine=True, two_stage=True),
}


class FromTransformers(nn.Module):
    "Their backbone, as ours."
    channels, num_channels, stride = (32, 64, 128), 128, 32

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.net = backbone

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Features:
        maps = self.net(images, torch.ones(len(images), *images.shape[2:]))
        return Features(tuple(x for x, _ in maps), None)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    "Their weights, or gradients, under our names, by what reads their files."
    found = our_tensors(read_source(state | {"model.backbone.": torch.zeros(())}))
    return {name: tensor for name, tensor in found.items() if not name.startswith(("backbone.", "model.backbone."))}


def their_model(levels: int, **settings) -> nn.Module:
    resnet = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"] if levels == 1 else ["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet, d_model=32, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=QUERIES, num_labels=CLASSES,
        two_stage_num_proposals=QUERIES, num_feature_levels=levels, class_cost=2, auxiliary_loss=True, **settings)
    return transformers.DeformableDetrForObjectDetection(config).eval()


@pytest.fixture
def in_float64(monkeypatch):
    "Also the address of a proposal, which transformers makes in float32."
    torch.set_default_dtype(torch.float64)
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    monkeypatch.setattr(module.DeformableDetrModel, "get_proposal_pos_embed", addresses_in_float64)
    yield
    torch.set_default_dtype(torch.float32)


def addresses_in_float64(model: nn.Module, proposals: Tensor) -> Tensor:
    "Plain torch: of each of four numbers sines and cosines in turn."
    half = model.config.d_model // 4
    waves = 10000.0 ** (torch.arange(half) / half)
    angles = proposals.sigmoid()[..., None] * 2 * math.pi / waves
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(2)


def build_pair(num_feature_levels: int, **settings) -> tuple[DeformableDETR, nn.Module]:
    "Ours and theirs with the same weights."
    torch.manual_seed(0)
    theirs = their_model(num_feature_levels, **settings)
    for parameter in {id(p): p for p in theirs.parameters()}.values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    if settings.get("two_stage"):  # the released training teaches the proposals' first class alone, and ranks by it
        head = theirs.class_embed[-1]
        head.weight.data[1:], head.bias.data[1:] = 0.0, -15.0
        empty = theirs.model.enc_output_norm(theirs.model.enc_output.bias)  # what they make of a padded cell,
        head.weight.data[0] -= 2 * empty / empty.norm()  # which is not to be chosen
    ours = build_detr(CLASSES, FromTransformers(theirs.model.backbone), hidden_dim=32, nheads=4, enc_layers=2,
                      dec_layers=LAYERS, dim_feedforward=64, dropout=0.0, num_queries=QUERIES, decoder="deformable",
                      class_loss="focal", num_feature_levels=num_feature_levels, **settings).eval()
    state = renamed(theirs.state_dict())
    if settings.get("two_stage"):
        state["query_embed.weight"] = torch.zeros(QUERIES, 0)
    missing = ours.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("backbone.") for name in missing.missing_keys)
    return ours, theirs


ROWS = {  # of the ledger: answers, losses, gradients
    "one level": ("deformable, one level, logits and boxes", "deformable, one level, losses",
        "deformable, one level, gradient of all weights"),
    "four levels": ("deformable, four levels, logits and boxes", "deformable, four levels, losses",
        "deformable, four levels, gradient of all weights"),
    "refined": ("deformable, refined, logits and boxes", "deformable, refined, losses",
        "deformable, refined, gradient of all weights"),
    "two stages": ("deformable, two stages, logits and boxes", "deformable, two stages, losses",
        "deformable, two stages, gradient of all weights"),
}


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_forward_losses_and_gradients(ledger, in_float64, kind, padded):
    ours, theirs = build_pair(**KINDS[kind])
    images, padding = torch.rand(IMAGES), torch.zeros(2, *IMAGES[2:], dtype=torch.bool)
    padding[1, :, 96:], padding[1, 80:] = padded, padded
    targets = make_targets([3, 1], torch.float64, CLASSES)
    answer = ours(images, padding if padded else None)
    found = theirs(pixel_values=images, pixel_mask=(~padding).long(), labels=list_targets(targets, "class_labels"))
    reference, (answers, of_losses, of_weights) = ledgers.TRANSFORMERS, ROWS[kind]
    layers = [*found.auxiliary_outputs, {"logits": found.logits, "pred_boxes": found.pred_boxes}]
    ledger.compare(answers, [*answer.logits, *answer.boxes],
                   [x["logits"] for x in layers] + [x["pred_boxes"] for x in layers], reference)
    losses = SigmoidCriterion(CLASSES, set_cost_class=2)(answer._replace(proposals=None), targets)
    names = sorted(name for name in found.loss_dict if name.startswith("loss_"))
    assert names == sorted(name for name in losses if name.startswith("loss_")) and len(names) == 3 * LAYERS
    ledger.compare(of_losses, torch.stack([losses[name] for name in names]),
                   torch.stack([found.loss_dict[name] for name in names]), reference)
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    sum(weights[re.sub(r"_\d+$", "", name)] * losses[name] for name in names).backward()
    sum(weights[re.sub(r"_\d+$", "", name)] * found.loss_dict[name] for name in names).backward()
    slopes = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    gradients = {name: slope for name, slope in renamed(slopes).items() if slope.numel()}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None and "backbone" not in name}
    shared = [name for name in mine if name.startswith("early_class_embed")]
    if kind == "refined":  # there all layers have one head for classes, in the released code each its own
        for part in ("weight", "bias"):
            mine[f"class_embed.{part}"] = mine[f"class_embed.{part}"] + sum(
                mine[f"early_class_embed.{layer}.{part}"] for layer in range(LAYERS - 1))
        mine = {name: x for name, x in mine.items() if name not in shared}
        gradients = {name: x for name, x in gradients.items() if name not in shared}
    assert gradients.keys() == mine.keys() and len(mine) > 50
    ledger.compare(of_weights, torch.cat([mine[name].flatten() for name in gradients]),
                   torch.cat([gradient.flatten() for gradient in gradients.values()]), reference)


def test_two_stages_of_transformers_have_no_loss_of_proposals(ledger, in_float64):
    "Twelve tensors of theirs never learn; of ours all do."
    ours, theirs = build_pair(**KINDS["two stages"])
    targets, images = make_targets([3, 1], torch.float64, CLASSES), torch.rand(IMAGES)
    theirs(pixel_values=images, labels=list_targets(targets, "class_labels")).loss.backward()
    without = {name for name, p in theirs.named_parameters() if p.grad is None and "backbone" not in name}
    criterion = build_criterion(PRESETS["paper"].but(class_loss="focal"), CLASSES)
    losses = criterion(ours(images), targets)
    criterion.total(losses).backward()
    missing = [name for name, p in ours.named_parameters() if p.requires_grad and p.grad is None]
    assert len(without) == 12 and not missing and losses["loss_giou_enc"] > 0
    ledger.depart("proposals of Deformable DETR's encoder", "learn by a loss of their own", "have no loss",
                  "learn by a loss of their own", "tensors without a gradient: 12 of transformers', none of ours")


def test_the_attention_equals_a_loop_over_points(ledger, in_float64):
    "Images, queries, heads, maps and points, one after the other; the second image is padded."
    torch.manual_seed(0)
    maps, padding = [torch.randn(2, 16, 8, 6), torch.randn(2, 16, 4, 3)], torch.zeros(2, 8, 6, dtype=torch.bool)
    padding[1, 6:], padding[1, :, 4:] = True, True
    look, queries = DeformableAttention(16, heads=2, levels=2), torch.randn(2, 5, 16)
    for parameter in look.parameters():
        nn.init.normal_(parameter, std=0.3)
    memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
    for numbers in (2, 4):
        keep = lay_levels(maps, [padding, padding[:, ::2, ::2]])._replace(places=torch.rand(2, 5, numbers))
        mixed = torch.zeros(2, 5, 16)
        for image, query, head, level, k in product(range(2), range(5), range(2), range(2), range(4)):
            rows, columns = maps[level].shape[2:]
            real = [1 - padding[image, :, 0].double().mean(), 1 - padding[image, 0].double().mean()]  # of rows, columns
            offset = look.sampling_offsets(queries[image, query]).view(2, 2, 4, 2)[head, level, k]
            x, y, *size = keep.places[image, query]
            unit = [side / 8 for side in size] or [1 / (columns * real[1]), 1 / (rows * real[0])]
            x, y = (x + offset[0] * unit[0]) * real[1] * columns - 0.5, (y + offset[1] * unit[1]) * real[0] * rows - 0.5
            for c, r in product((x.floor().int(), x.floor().int() + 1), (y.floor().int(), y.floor().int() + 1)):
                if 0 <= c < columns * real[1] and 0 <= r < rows * real[0]:  # what is padded is zero
                    share = (1 - (x - c).abs()) * (1 - (y - r).abs())
                    weight = look.attention_weights(queries[image, query]).view(2, 8)[head].softmax(0)[4 * level + k]
                    mixed[image, query, 8 * head : 8 * head + 8] += (
                        weight * share * look.value_proj(maps[level][image, :, r, c])[8 * head : 8 * head + 8])
        found = look(queries, None, memory, keep)
        ledger.compare("deformable attention", found, look.output_proj(mixed), ledgers.PLAIN)


def their_state(kind: str) -> dict[str, Tensor]:
    "A file of the released code, with random weights, whose heads differ only where boxes are refined."
    model = build_detr(91, "resnet50", enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=300, pretrained=None,
                       decoder="deformable", class_loss="focal", **KINDS[kind]).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^backbone\.", "backbone.0.", name).replace(".multihead_attn.", ".cross_attn.")
        name = re.sub(r"^(level_embed|reference_points|enc_output|pos_trans)", r"transformer.\1", name)
        name = re.sub(r"(decoder\.layers\.\d+\.)norm([12])", lambda found: f"{found[1]}norm{3 - int(found[2])}", name)
        name = re.sub(r"^early_(class|bbox)_embed\.0", r"\1_embed.0", name)
        name = re.sub(r"^enc_(class|bbox)_embed", r"\1_embed.2", name)
        whole = re.fullmatch(r"(class|bbox)_embed((\.layers\.\d)?\.(weight|bias))", name)
        for layer in (1,) if whole and "refine" in str(KINDS[kind]) else (0, 1) if whole else ():
            state[f"{whole[1]}_embed.{layer}{whole[2]}"] = tensor
        if not whole and name != "query_embed.weight" or kind != "two stages" and not whole:
            state[name] = tensor
    if "refine" in str(KINDS[kind]):
        state |= {f"transformer.decoder.{name}": x for name, x in state.items() if name.startswith("bbox_embed.")}
    return model, {"model": state}


@pytest.mark.parametrize("kind", KINDS)
def test_released_files_load_by_key(kind, tmp_path):
    torch.manual_seed(0)
    model, state = their_state(kind)
    path = tmp_path / "r50_deformable_detr.pth"
    torch.save(state, path)
    found, images = load_detector(path).model, torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        ours, again = model(images), found(images)
    assert torch.equal(ours.boxes, again.boxes) and torch.equal(ours.logits, again.logits)
    assert again.sigmoid and found.num_classes == 91 and found.num_queries == 300


def test_a_file_of_dino_loads_by_key(tmp_path):
    "As its training writes them: heads once for each layer, all alike; proposals' heads and contents inside."
    torch.manual_seed(0)
    model = build_detr(91, "resnet50", enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=30, pretrained=None,
                       temperature=20, decoder="dab_deformable", class_loss="focal", num_feature_levels=4,
                       two_stage=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    state = {"label_enc.weight": torch.randn(92, 256)}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^backbone\.", "backbone.0.", name).replace(".multihead_attn.", ".cross_attn.")
        name = name.replace("enc_class_", "enc_out_class_").replace("enc_bbox_", "enc_out_bbox_")
        name = re.sub(r"^(level_embed|enc_)", r"transformer.\1", name).replace("query_embed", "transformer.tgt_embed")
        name = re.sub(r"(decoder\.layers\.\d+\.)norm([12])", lambda found: f"{found[1]}norm{3 - int(found[2])}", name)
        if head := re.fullmatch(r"(class|bbox)_embed(\..*)", name):
            state |= {f"{inside}{head[1]}_embed.{layer}{head[2]}": tensor
                      for layer in (0, 1) for inside in ("", "transformer.decoder.")}
        else:
            state[name] = tensor
    path, images = tmp_path / "checkpoint0011_4scale.pth", torch.randn(1, 3, 96, 128)
    torch.save({"model": state}, path)
    found = load_detector(path).model
    with torch.no_grad():
        ours, again = model(images), found(images)
    assert torch.equal(ours.boxes, again.boxes) and torch.equal(ours.logits, again.logits)
    assert found.num_queries == 30 and found.two_stage and found.family["decoder"] == "dab_deformable"
    rows = torch.arange(1, 5)[:, None] / (4 + 1e-6) * 2 * math.pi / 20 ** (torch.arange(128) // 2 * 2 / 128)  # its code
    code = found.position_encoding(torch.zeros(1, 256, 4, 6), None).reshape(1, 4, 6, 256)[0, :, 0, :128]
    assert torch.allclose(code[:, ::2], rows[:, ::2].sin(), atol=1e-5)
    state["bbox_embed.0.layers.0.bias"] = torch.randn(256)
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match="bbox_embed.layers.0.bias is not the same in all layers"):
        load_detector(path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_transformers_load_by_key(kind, tmp_path):
    torch.manual_seed(0)
    stages = ["stage4"] if kind == "one level" else ["stage2", "stage3", "stage4"]
    resnet = transformers.ResNetConfig(out_features=stages)
    settings = KINDS[kind] | {"two_stage_num_proposals": 300}
    config = transformers.DeformableDetrConfig(backbone_config=resnet, encoder_layers=1, decoder_layers=2, num_labels=5,
                                               encoder_ffn_dim=64, decoder_ffn_dim=64, **settings)
    theirs = transformers.DeformableDetrForObjectDetection(config).eval()
    theirs.save_pretrained(tmp_path)
    model, images = load_detector(tmp_path).model, torch.randn(1, 3, 96, 128)
    if kind == "two stages":  # there the first class alone ranks, and 300 queries need as many tokens
        assert torch.equal(model.pos_trans.weight, theirs.model.pos_trans.weight) and model.num_queries == 300
        return
    with torch.no_grad():
        found, reference = model(images), theirs(pixel_values=images)
    assert torch.allclose(found.boxes[-1], reference.pred_boxes, atol=1e-5)
    assert torch.allclose(found.logits[-1], reference.logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])  # a minute of conversion
def test_an_exported_model_says_the_same(kind, tmp_path):
    torch.manual_seed(0)
    settings = dict(decoder="deformable", class_loss="focal", num_feature_levels=2, with_box_refine=True, enc_layers=1)
    model = build_model(PRESETS["shapes"].but(**SMALL | settings), CLASSES).eval()
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name or "sampling" in name:
            nn.init.normal_(parameter, std=0.1)
    images, padding = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 64:], padding[1, :, 80:] = True, True
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        found = OnnxDETR(export_onnx(model, tmp_path / "model.onnx"))(images, padding)
    else:
        found = ProgramDETR(export_file(model, tmp_path / "model.pt2"))(images, padding)
    with torch.no_grad():
        ours = model(images, padding)
    assert torch.allclose(found.boxes[-1], ours.boxes[-1], atol=1e-4)
    assert torch.allclose(found.logits[-1], ours.logits[-1], atol=1e-4)


def test_what_is_asked_of_points_alone_is_refused():
    for settings, message in [
        (dict(num_feature_levels=4), "--num_feature_levels needs --decoder deformable or dab_deformable, not detr"),
        (dict(decoder="dab", with_box_refine=True), "--with_box_refine needs --decoder deformable"),
        (dict(decoder="dab_deformable", box_bias="rpb"), "--box_bias needs --decoder dab"),
        (dict(decoder="deformable", class_loss="focal", two_stage=True), "--with_box_refine"),
        (dict(decoder="deformable", num_feature_levels=5), "can be read"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            build_model(PRESETS["shapes"].but(**SMALL, **settings), CLASSES)
    with pytest.raises(UserError, match="one map that attention has weighed"):
        check_settings(PRESETS["shapes"].but(decoder="deformable", masks=True))


def test_points_learn_with_a_rate_of_their_own():
    config = PRESETS["deformable"].but(**SMALL, backbone="resnet18", pretrained=False, backbone_norm="group")
    model = build_model(config, CLASSES)
    groups = {id(p): group["base_lr"] for group in build_optimizer(model, config).param_groups for p in group["params"]}
    rates = {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if "sampling_offsets" in name or "reference_points" in name} == {2e-5}
    assert rates["transformer.decoder.layers.0.multihead_attn.value_proj.weight"] == 2e-4


@pytest.mark.parametrize("ideas", [dict(), dict(decoder="dab_deformable", two_stage=True)], ids=["points", "boxes"])
def test_what_is_seen_does_not_depend_on_the_padding(ideas, in_float64):
    "With the small backbone, at a size that no stride divides."
    torch.manual_seed(0)
    settings = dict(decoder="deformable", class_loss="focal", num_feature_levels=4) | ideas
    model = build_model(PRESETS["shapes"].but(**SMALL, **settings), CLASSES).eval()
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name or "sampling" in name:
            nn.init.normal_(parameter, std=0.1)
    images, padding = torch.randn(1, 3, 101, 117), torch.ones(1, 130, 167, dtype=torch.bool)
    canvas = torch.zeros(1, 3, 130, 167)
    canvas[..., :101, :117], padding[:, :101, :117] = images, False
    with torch.no_grad():
        alone, beside = model(images), model(canvas, padding)
    assert torch.allclose(alone.boxes, beside.boxes, atol=1e-10)
    assert torch.allclose(alone.logits, beside.logits, atol=1e-10)
