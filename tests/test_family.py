"What came after DETR, against independent implementations, and through every command."
import re
from functools import partial
from itertools import product

import ledger as ledgers
import pytest
import torch
import torch.nn.functional as F
from child import Child, clean_environ
from test_parity import list_targets, make_targets
from test_train import ROOT, here, steps, together  # noqa: F401
from test_train import SMALL as SMALL_RUN
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from detr_nb.annotations import Categories
from detr_nb.backbone import Features, SmallBackbone
from detr_nb.batching import Batch
from detr_nb.checkpoints import CheckpointError, load_checkpoint
from detr_nb.config import PRESETS
from detr_nb.criterion import SetCriterion
from detr_nb.detr import DETR, Predictions, build_detr
from detr_nb.distributed import UserError
from detr_nb.engine import build_criterion, build_model, check_settings
from detr_nb.export import OnnxDETR, ProgramDETR, export_file, export_onnx
from detr_nb.family import family_criterion
from detr_nb.focal import SigmoidCriterion
from detr_nb.groups import apart, repeat
from detr_nb.layouts import to_released, to_transformers
from detr_nb.matcher import match
from detr_nb.pretrain import _loss, _ProposalReader
from detr_nb.pretrained import InClassesOf, load_detector, transfer_weights
from detr_nb.shapes_set import write_shapes

transformers = pytest.importorskip("transformers")
IMAGES, CLASSES, QUERIES = (2, 3, 64, 96), 5, 7


# Names of transformers' conditional and DAB models, and ours, which are the released ones but for `query_embed`.
NAMES = [
    (r"^model\.query_(refpoint|position)_embeddings\.", "query_embed."), (r"^model\.input_projection\.", "input_proj."),
    (r"^class_labels_classifier\.", "class_embed."), (r"^(bbox_predictor|model\.decoder\.bbox_embed)\.", "bbox_embed."),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."), (r"\.layernorm\.", ".norm."),
    (r"\.(self|cross)_attn\.(self|cross)_attn\.output_proj\.", r".\1_attn.out_proj."),
    (r"\.(self|cross)_attn\.(self|cross)_attn_(?!layer)", r".\1_attn."), (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.o_proj\.", ".out_proj."), (r"_query_", "_q_"), (r"\.cross_attn\.query_", ".cross_attn.q_"),
    (r"\.self_attn\.query_", ".self_attn.q_"), (r"_attn\.key_", "_attn.k_"), (r"_attn\.value_", "_attn.v_"),
    (r"(decoder.*)\.self_attn\.(q|k)_(content|pos)_proj", r"\1.sa_\2\3_proj"),
    (r"(decoder.*)\.self_attn\.v_proj", r"\1.sa_v_proj"),
    (r"\.cross_attn\.(q|k)_(content|pos_sine|pos)_proj", r".ca_\1\2_proj"), (r"\.cross_attn\.v_proj", ".ca_v_proj"),
    (r"\.(self_attn\.)?self_attn_layer_norm\.", ".norm1."),
    (r"\.(cross_attn\.cross_attn|encoder_attn|cross_attn)_layer_norm\.", ".norm2."),
    (r"(decoder.*?)(\.mlp)?\.final_layer_norm\.", r"\1.norm3."), (r"\.final_layer_norm\.", ".norm2."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."), (r"\.(mlp\.)?activation_fn\.", ".activation."),
]


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    "Their weights under our names; the three matrices of the encoder's attention in one."
    renamed, parts = {}, {}
    for name, tensor in state.items():
        if name.startswith("model.backbone."):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if found := re.fullmatch(r"(.*encoder.*self_attn)\.([qkv])_proj\.(\w+)", name):
            parts.setdefault(f"{found[1]}.in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            renamed[name] = tensor
    return renamed | {name: torch.cat([found[letter] for letter in "qkv"]) for name, found in parts.items()}


class FromTransformers(nn.Module):
    "Their backbone, as ours."
    num_channels, stride = 128, 32

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.net = backbone

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Features:
        mask = torch.ones(len(images), *images.shape[2:]) if padding is None else (~padding).long()
        found = self.net(images, mask)
        last = (found[0] if isinstance(found[0], list) else found)[-1]
        return Features((last[0],), None if padding is None else ~last[1].bool())


ROWS = {
    "conditional": ("conditional, logits and boxes", "conditional, losses", "conditional, gradient of all weights"),
    "dab": ("dab, logits and boxes", "dab, losses", "dab, gradient of all weights"),
}


@pytest.fixture
def in_float64(monkeypatch):
    "Also what transformers makes anew, and the attention that its DAB rounds to float32."
    torch.set_default_dtype(torch.float64)
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=-1, dtype=None, **other: softmax(x, dim=dim, **other))
    yield
    torch.set_default_dtype(torch.float32)


def build_pair(kind: str) -> tuple[DETR, nn.Module]:
    "Ours and theirs with the same weights."
    resnet = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1],
                                       layer_type="basic", out_features=["stage4"])
    size = {"hidden_size" if kind == "dab" else "d_model": 32}
    config = dict(backbone_config=resnet, encoder_layers=1, decoder_layers=3, encoder_attention_heads=4,
                  decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=QUERIES,
                  num_labels=CLASSES, **size)
    torch.manual_seed(0)
    name = {"dab": "DabDetr", "conditional": "ConditionalDetr"}[kind]
    theirs = getattr(transformers, f"{name}ForObjectDetection")(getattr(transformers, f"{name}Config")(**config)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    ours = build_detr(CLASSES, FromTransformers(theirs.model.backbone), temperature=20 if kind == "dab" else 10000,
                      hidden_dim=32, nheads=4, enc_layers=1, dec_layers=3, dim_feedforward=64, dropout=0.0,
                      num_queries=QUERIES, decoder=kind, class_loss="focal").eval()
    missing = ours.load_state_dict(our_names(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys and all(name.startswith("backbone.") for name in missing.missing_keys)
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", ["conditional", "dab"])
def test_equals_transformers_forward_losses_and_gradients(ledger, in_float64, monkeypatch, kind, padded):
    ours, theirs = build_pair(kind)
    if kind == "dab":  # whose waves have a length in float32
        from transformers.models.dab_detr import modeling_dab_detr as module
        monkeypatch.setattr(module, "encode_sinusoidal_position_embedding", sine_in_float64)
        monkeypatch.setattr(module.DabDetrSinePositionEmbedding, "forward", cells_in_float64)
    images, padding = torch.rand(IMAGES), torch.zeros(2, *IMAGES[2:], dtype=torch.bool)
    padding[1, :, 64:], padding[1, 32:] = padded, padded
    targets = make_targets([3, 1], torch.float64, CLASSES)
    answer = ours(images, padding if padded else None)
    found = theirs(pixel_values=images, pixel_mask=(~padding).long(), labels=list_targets(targets, "class_labels"))
    reference, (answers, scores, slopes) = ledgers.TRANSFORMERS, ROWS[kind]
    ledger.compare(answers, [answer.logits[-1], answer.boxes[-1]],
                   [found.logits, found.pred_boxes], reference)
    criterion = SigmoidCriterion(CLASSES, set_cost_class=2, cls_loss_coef=1)  # theirs ignores its coefficient of 2
    losses = criterion(answer.last_layer(), targets)
    names = ("loss_ce", "loss_bbox", "loss_giou")
    ledger.compare(scores, torch.stack([losses[name] for name in names]),
                   torch.stack([found.loss_dict[name] for name in names]), reference)
    total = sum(weight * found.loss_dict[name] for name, weight in zip(names, (1, 5, 2)))
    mine = dict(ours.named_parameters())
    their = our_names(dict(theirs.named_parameters()))
    their = {name: tensor for name, tensor in their.items() if name in mine and mine[name].requires_grad}
    total.backward()
    criterion.total(losses).backward()
    gradients = our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert gradients.keys() == {name for name, p in mine.items() if p.grad is not None and "backbone" not in name}
    ledger.compare(slopes, torch.cat([mine[name].grad.flatten() for name in gradients]),
                   torch.cat([gradient.flatten() for gradient in gradients.values()]), reference)


def sine_in_float64(places: Tensor, num_pos_feats: int = 128, temperature: float = 10000) -> Tensor:
    "Plain torch: y first, sines and cosines in turn."
    waves = temperature ** (2 * torch.div(torch.arange(num_pos_feats), 2, rounding_mode="floor") / num_pos_feats)
    codes = []
    for number in [1, 0, 2, 3][: places.shape[-1]]:
        angle = places[..., [number]] * 2 * torch.pi / waves
        codes.append(torch.stack([angle[..., ::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(codes, -1)


def cells_in_float64(module: nn.Module, images: Tensor, real: Tensor) -> Tensor:
    "Each cell's place in its own image, and the sines of it."
    x, y = real.cumsum(2, dtype=torch.float64), real.cumsum(1, dtype=torch.float64)
    places = torch.stack([x / (x[:, :, -1:] + 1e-6), y / (y[:, -1:] + 1e-6)], -1)
    return sine_in_float64(places, int(module.embedding_dim), module.temperature_width).permute(0, 3, 1, 2)


def random_answers(groups: int = 1, queries: int = QUERIES, layers: int = 1) -> Predictions:
    generator = torch.Generator().manual_seed(3)
    shape = layers, 2, groups * queries
    boxes = 0.2 + 0.5 * torch.rand(*shape, 4, generator=generator)
    return Predictions(torch.randn(*shape, CLASSES, generator=generator), boxes, sigmoid=True, groups=groups)


def pairs_of(predictions: Predictions, targets, criterion: SetCriterion) -> list[tuple[Tensor, Tensor]]:
    "The criterion's matches as transformers lists them: for each image queries and objects."
    found = match(predictions, targets, *criterion.costs, predictions.logits, criterion.class_cost)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), targets.counts.cumsum(0)])
    return [(found.query[found.image == image], found.target[found.image == image] - first[image])
            for image in range(len(targets.counts))]


@pytest.mark.parametrize("name", ["focal", "ia_bce", "vfl", "mal"])
def test_class_losses_equal_transformers(ledger, in_float64, name):
    from transformers.loss import loss_deformable_detr, loss_deimv2, loss_lw_detr, loss_rt_detr

    theirs = {"focal": loss_deformable_detr.DeformableDetrImageLoss, "ia_bce": loss_lw_detr.LwDetrImageLoss,
              "vfl": loss_rt_detr.RTDetrLoss, "mal": loss_deimv2.Deimv2Loss}[name]
    loss = theirs.__new__(theirs)
    nn.Module.__init__(loss)
    loss.num_classes, loss.focal_alpha, loss.alpha, loss.mal_alpha = CLASSES, 0.25, 0.75, None
    loss.gamma = 1.5 if name == "mal" else 2.0
    targets, predictions = make_targets([3, 1], torch.float64, CLASSES), random_answers()
    criterion = SigmoidCriterion(CLASSES, class_loss=name)
    pairs = pairs_of(predictions, targets, criterion)
    logits = predictions.logits.clone().requires_grad_()
    ours = criterion(predictions._replace(logits=logits), targets)["loss_ce"]
    (mine,) = torch.autograd.grad(ours, logits)
    outputs = {"logits": logits[0], "pred_boxes": predictions.boxes[0]}
    compute = getattr(loss, {"vfl": "loss_labels_vfl", "mal": "loss_labels_mal"}.get(name, "loss_labels"))
    (found,) = compute(outputs, list_targets(targets, "class_labels"), pairs, 4).values()
    (other,) = torch.autograd.grad(found, logits)
    ledger.compare(f"class_loss {name}", [ours, mine], [found, other], ledgers.TRANSFORMERS)


def test_groups_are_matched_as_in_transformers(ledger, in_float64):
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

    targets, predictions = make_targets([3, 2], torch.float64, CLASSES), random_answers(groups=4)
    matcher = LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    found = matcher({"logits": predictions.logits[0], "pred_boxes": predictions.boxes[0]},
                    list_targets(targets, "class_labels"), 4)
    theirs = {(image, int(q), int(t)) for image, pair in enumerate(found) for q, t in zip(*pair)}
    ours = match(apart(predictions), targets, 2, 5, 2, apart(predictions).logits, SigmoidCriterion.class_cost)
    first = [0, 3]
    mine = {(int(i), int(g * QUERIES + q), int(t) - first[i])
            for g, i, q, t in zip(ours.layer, ours.image, ours.query, ours.target)}
    ledger.compare("groups, pairs that differ", torch.tensor(float(len(mine ^ theirs))), torch.tensor(0.0),
                   ledgers.TRANSFORMERS)


def test_the_loss_of_groups_is_the_mean_of_their_losses(ledger, in_float64):
    targets, predictions = make_targets([3, 2], torch.float64, CLASSES), random_answers(groups=3, layers=2)
    ours = family_criterion(SetCriterion, "ia_bce", 1, 1, num_classes=CLASSES)(predictions, targets)
    parts = zip(*(x.split(QUERIES, dim=2) for x in predictions[:2]))
    each = [SigmoidCriterion(CLASSES, class_loss="ia_bce")(Predictions(*part), targets) for part in parts]
    for name in ("loss_ce", "loss_bbox_0", "loss_giou"):
        mean = torch.stack([losses[name] for losses in each]).mean()
        ledger.compare("groups, losses", ours[name], mean, ledgers.PLAIN)


def overlap_of(a: Tensor, b: Tensor) -> Tensor:
    "IoU of two boxes (cx, cy, w, h), in plain torch."
    low, high = torch.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2), torch.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    shared = (high - low).clamp(min=0).prod()
    return shared / (a[2:].prod() + b[2:].prod() - shared)


@pytest.mark.parametrize("name, power", [("ia_bce", 2), ("mal", 1.5)])
def test_repeated_targets_are_a_plain_loop_over_layers_objects_and_answers(ledger, in_float64, name, power):
    "Two of the three layers have two answers for an object, of which the worse counts exp(-1 / 1.5)."
    targets, predictions = make_targets([3, 0, 2], torch.float64, CLASSES), random_answers(layers=3)
    predictions = predictions._replace(logits=torch.cat([predictions.logits, predictions.logits[:, :1] + 1], 1),
                                       boxes=torch.cat([predictions.boxes, predictions.boxes[:, :1] * 0.9], 1))
    criterion = family_criterion(SetCriterion, name, 2, 1, num_classes=CLASSES)
    losses = criterion(predictions, targets)
    given = criterion(predictions, targets, criterion.normalizers(targets.counts, QUERIES, torch.float64))
    last = SigmoidCriterion(CLASSES, class_loss=name)(predictions.last_layer(), targets)
    for part in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[part], last[part], rtol=1e-12, atol=0)
        torch.testing.assert_close(losses[f"{part}_1"], given[f"{part}_1"], rtol=1e-12, atol=0)
    first = [0, 3, 3, 5]
    for layer in (0, 1):
        own = Predictions(predictions.logits[[layer]], predictions.boxes[[layer]], sigmoid=True)
        p, boxes, weights = own.logits[0].sigmoid(), own.boxes[0], {}
        for image, (queries, objects) in enumerate(pairs_of(own, repeat(targets, 2), criterion)):
            answers = {}
            for query, number in zip(queries.tolist(), objects.tolist()):
                answers.setdefault(first[image] + number // 2, []).append(query)
            for number, found in answers.items():
                assert len(found) == 2
                label = targets.labels[number]
                iou = [overlap_of(boxes[image, query], targets.boxes[number]) for query in found]
                good = [max(float(p[image, q, label] ** 0.25 * u**0.75), 0.01) for q, u in zip(found, iou)]
                for query, u, t in zip(found, iou, good):
                    rank = sum(other > t for other in good)
                    weight = torch.tensor(-rank / 1.5).exp()
                    wanted = weight * (t if name == "ia_bce" else u**1.5)
                    weights[image, query] = weight, number, label, wanted
        classes = distance = 0.0
        for image, query, label in product(range(3), range(QUERIES), range(CLASSES)):
            x = p[image, query, label]
            weight, number, wanted_label, wanted = weights.get((image, query), (0, 0, -1, 0))
            there = label == wanted_label
            classes -= wanted * x.log() + (1 - wanted) * (1 - x).log() if there else x**power * (1 - x).log()
            distance += weight * (boxes[image, query] - targets.boxes[number]).abs().sum() if there else 0
        ledger.compare("repeated targets, losses", [losses[f"loss_{part}_{layer}"] for part in ("ce", "bbox")],
                       [classes / 5, distance / 5], ledgers.PLAIN)


def test_repeated_targets_that_count_alike_equal_transformers(ledger, in_float64):
    "Its IA-BCE, whose pairs we give it: value and gradient."
    from transformers.loss.loss_lw_detr import LwDetrImageLoss

    targets, predictions = make_targets([3, 1], torch.float64, CLASSES), random_answers(layers=2)
    criterion = family_criterion(SetCriterion, "ia_bce", 2, 1, num_classes=CLASSES)
    criterion.tau = float("inf")
    logits, twice = predictions.logits.clone().requires_grad_(), repeat(targets, 2)
    ours = criterion(predictions._replace(logits=logits), targets)["loss_ce_0"]
    own = Predictions(predictions.logits[:1], predictions.boxes[:1], sigmoid=True)
    loss = LwDetrImageLoss(None, CLASSES, 0.25, [], 1)
    theirs = loss.loss_labels({"logits": logits[0], "pred_boxes": predictions.boxes[0]},
                              list_targets(twice, "class_labels"), pairs_of(own, twice, criterion), 4)["loss_ce"]
    ledger.compare("repeated targets, losses", ours, theirs, ledgers.TRANSFORMERS)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    ledger.compare("repeated targets, gradients", *gradients, ledgers.TRANSFORMERS)


def test_more_answers_wanted_than_there_are_queries():
    "Those that are left over are not matched; the losses are numbers."
    criterion = family_criterion(SetCriterion, "ia_bce", 2, 1, num_classes=CLASSES)
    with pytest.warns(UserWarning, match="8 objects but the model has 7 queries"):
        losses = criterion(random_answers(layers=2), make_targets([4, 0], torch.float32, CLASSES))
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("settings", [dict(), dict(class_loss="focal", masks=True)], ids=["ce", "masks"])
def test_repeated_targets_need_scores_that_can_be_weighted(settings):
    with pytest.raises(UserError, match="--repeat_targets"):
        check_settings(PRESETS["shapes"].but(**settings, repeat_targets=2))


@pytest.mark.parametrize("kind", ["gauss", "rpb"])
def test_a_bias_is_added_to_the_scores(ledger, in_float64, kind):
    "The whole attention in plain torch, cell by cell, with padding."
    from detr_nb.nearby import BOX_BIASES, NearbyDETR, cell_centres

    torch.manual_seed(0)
    model = build_detr(CLASSES, "small", hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1, dim_feedforward=64,
                       num_queries=3, decoder="dab", box_bias=kind).eval()
    bias, (y, x) = model.box_bias[0], cell_centres(torch.zeros(1, 1, 4, 6))
    assert isinstance(model, NearbyDETR) and isinstance(bias, BOX_BIASES[kind])
    boxes, slots, keep = random_answers(queries=3).boxes[0, :1], torch.randn(1, 3, 32), torch.ones(1, 1, 1, 24) > 0
    keep[..., 20:] = False
    table = model.near((y, x))(0, boxes, slots, keep)
    plain = torch.full((1, 4, 3, 24), float("-inf"))
    for query, cell in product(range(3), range(20)):
        cx, cy, w, h = boxes[0, query]
        at_x, at_y = x[0, cell % 6], y[0, cell // 6]
        if kind == "gauss":
            off = bias.spots(slots[0, query]).view(4, 4)
            far = ((at_x - cx - off[:, 0] * w) / (w * off[:, 2].exp())) ** 2
            plain[0, :, query, cell] = -far - ((at_y - cy - off[:, 1] * h) / (h * off[:, 3].exp())) ** 2
        else:
            in_x = torch.stack([at_x - cx + w / 2, at_x - cx - w / 2])
            in_y = torch.stack([at_y - cy + h / 2, at_y - cy - h / 2])
            plain[0, :, query, cell] = bias.columns(8 * in_x) + bias.rows(8 * in_y)
    ledger.compare("box_bias, attention", table[..., :20], plain[..., :20], ledgers.PLAIN)
    assert (table[..., 20:] == float("-inf")).all()


VARIANTS = {
    "focal": dict(class_loss="focal"),
    "grouped": dict(query_groups=3),
    "conditional": dict(decoder="conditional", class_loss="vfl", query_groups=2),
    "dab": dict(decoder="dab", class_loss="ia_bce", box_bias="gauss"),
    "dab_ce": dict(decoder="dab", query_groups=2),
    "deformable": dict(decoder="deformable", class_loss="focal", num_feature_levels=3, query_groups=2),
    "refined": dict(decoder="deformable", num_feature_levels=4, with_box_refine=True),
    "deformable_two_stage": dict(decoder="deformable", class_loss="focal", num_feature_levels=2, with_box_refine=True,
                                 two_stage=True),
    "dab_deformable": dict(decoder="dab_deformable", class_loss="ia_bce", num_feature_levels=2, two_stage=True,
                           repeat_proposals=2, query_groups=2),
    "all": dict(decoder="dab", class_loss="mal", box_bias="rpb", two_stage=True, repeat_proposals=3, query_groups=2),
    "repeated": dict(decoder="dab", class_loss="ia_bce", repeat_targets=2, query_groups=2, two_stage=True),
    "denoised": dict(decoder="dab", class_loss="vfl", box_bias="gauss", two_stage=True, query_groups=2, denoising=8,
                     dn_label_noise=0.0, dn_box_noise=0.0),  # which is no noise: two processes draw it apart
    "dino": dict(decoder="dab_deformable", class_loss="focal", num_feature_levels=2, two_stage=True, denoising=8,
                 dn_label_noise=0.0, dn_box_noise=0.0),
    "dn": dict(decoder="dab", class_loss="focal", denoising=8, dn_groups=5, dn_noise="plain"),
    "told": dict(decoder="dab_deformable", class_loss="ia_bce", num_feature_levels=2, two_stage=True,
                 embed_init_tgt=False, denoising=8, dn_label_noise=0.0, dn_box_noise=0.0, enc_layers=0),
}
SMALL = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_everything_and_is_built_again_from_its_file(name, tmp_path):
    from detr_nb.checkpoints import save_checkpoint
    from detr_nb.layouts import architecture

    config = PRESETS["shapes"].but(**SMALL | VARIANTS[name])
    torch.manual_seed(0)
    model, criterion = build_model(config, CLASSES).train(), build_criterion(config, CLASSES)
    images, targets = torch.randn(IMAGES), make_targets([3, 1], torch.float32, CLASSES)
    for layer in (m.layers[-1] for n, m in model.named_modules() if re.fullmatch(
            r"(enc_)?bbox_embed|early_bbox_embed\.\d", n)):
        nn.init.normal_(layer.weight, std=0.1)  # some begin at zero, before which nothing learns
    losses = criterion(model(images, **{"targets": targets} if config.model.denoising else {}), targets)
    for suffix, there in (("_enc", config.model.two_stage), ("_dn", config.model.denoising)):
        assert {n for n in losses if n.endswith(suffix)} == ({f"loss_{n}{suffix}" for n in ("ce", "bbox", "giou")} if
                                                             there else set())
    criterion.total(losses).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    state = {"format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": config.flat(),
             "model": model.state_dict(), "architecture": architecture(model),
             "preprocessing": {"short_side": 64, "max_size": 96},
             "classes": {"ids": [1, 2, 3, 4, 5], "names": [*"abcde"]}}
    save_checkpoint(tmp_path / "best.pth", state)
    again = load_detector(tmp_path / "best.pth").model
    with torch.no_grad():
        first, second = model(images), again(images)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.boxes, second.boxes)
    assert first.logits.shape[2] == 6 and first.groups == 1
    fresh = build_model(config, 2)  # two of its classes, and one that it does not know
    report = transfer_weights(fresh, tmp_path / "best.pth", ["d", "new"], keep_classes=True)
    assert torch.equal(fresh.class_embed.weight[0], model.class_embed.weight[3]) and not report.settings
    told = InClassesOf(load_detector(tmp_path / "best.pth"), Categories(("d", "new"), (7, 9)))
    with torch.no_grad():
        found = told(images).probabilities()
    assert torch.allclose(found[..., 0], first.probabilities()[..., 3], atol=1e-6) and found[..., 1].max() < 1e-7


@pytest.mark.parametrize("name", ["focal", "conditional", "dab"])
def test_a_variant_learns_masks(name):
    torch.manual_seed(0)
    config = PRESETS["shapes"].but(**SMALL | VARIANTS[name] | {"query_groups": 1}, masks=True)
    model, criterion = build_model(config, CLASSES).train(), build_criterion(config, CLASSES)
    targets = make_targets([3, 1], torch.float32, CLASSES)
    targets = targets._replace(masks=torch.rand(4, *IMAGES[2:]) > 0.5, sizes=torch.tensor([IMAGES[2:]] * 2))
    images = torch.randn(IMAGES)
    losses = criterion(model(images, keep=partial(criterion.matched_queries, targets=targets)), targets)
    criterion.total(losses).backward()
    assert losses["loss_mask"] > 0 and losses["loss_dice"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.mask_head.parameters())


def test_boxes_stay_precise_in_half_and_in_double_precision():
    torch.manual_seed(0)
    model = build_model(PRESETS["shapes"].but(**SMALL | VARIANTS["all"]), CLASSES).train()
    for layer in (m.layers[-1] for n, m in model.named_modules() if n in ("bbox_embed", "enc_bbox_embed")):
        nn.init.normal_(layer.weight, std=0.1)
    images = torch.randn(IMAGES)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
        double = model.double()(images.double())
    for answer, dtype in ((half, torch.float32), (double, torch.float64)):
        assert {x.dtype for part in (answer, answer.proposals) for x in part[:2]} == {dtype}
        assert answer.boxes.isfinite().all()
    assert (half.proposals.boxes - double.proposals.boxes).abs().max() < 0.05


@pytest.mark.parametrize("name", ["all", *(pytest.param(name, marks=pytest.mark.slow)
                                          for name in ("denoised", "dino"))])
def test_an_exported_variant_says_the_same(name, tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    config = PRESETS["shapes"].but(**SMALL | VARIANTS[name])
    model, images = build_model(config, CLASSES).eval(), torch.randn(2, 3, 96, 128)
    recorded = OnnxDETR(export_onnx(model, tmp_path / "model.onnx"))
    again = ProgramDETR(export_file(model, tmp_path / "model.pt2"))(images)
    with torch.no_grad():
        ours = model(images)
    found = recorded(images)
    assert torch.allclose(found.boxes[-1], ours.boxes[-1], atol=1e-4)
    assert torch.allclose(found.logits[-1], ours.logits[-1], atol=1e-4)
    assert torch.allclose(again.probabilities(), ours.probabilities(), atol=1e-5) and found.sigmoid


@pytest.mark.parametrize("write", [to_released, to_transformers])
def test_a_variant_is_not_written_as_if_it_were_detr(write):
    for settings, reason in ((dict(decoder="detr", class_loss="focal"), "decoder='detr' and class_loss='focal'"),
                             (dict(decoder="dab", temperature=20), "decoder='dab' and class_loss='ce'"),
                             (dict(decoder="dab", class_loss="focal", box_bias="gauss"), "box_bias='gauss'")):
        model = build_detr(CLASSES, "resnet18", **SMALL | {"nheads": 8}, **settings, pretrained=None)
        with pytest.raises(CheckpointError, match=reason):
            write(model)


@pytest.mark.parametrize("settings, message", [
    (dict(box_bias="rpb"), "needs --decoder dab"), (dict(decoder="conditional", two_stage=True), "needs --decoder dab"),
    (dict(decoder="dab", two_stage=True), "--class_loss other than ce"),
    (dict(decoder="dab", class_loss="focal", embed_init_tgt=False), "--no_embed_init_tgt.* needs --two_stage"),
    (dict(decoder="dab", class_loss="focal", two_stage=True, embed_init_tgt=False, query_groups=2), "are alike")])
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_model(PRESETS["shapes"].but(**SMALL, **settings), CLASSES)


def test_presets_have_the_papers_settings():
    for name in ("conditional", "dab", "group_dab"):
        config = PRESETS[name]
        assert (config.model.num_queries, config.loss.class_loss, config.loss.cls_loss_coef) == (300, "focal", 2)
    assert PRESETS["group_dab"].model.query_groups == 11 and PRESETS["dab"].model.temperature == 20


def flags_of(name: str) -> list[str]:
    "What a variant is called on the command line."
    words = {True: lambda flag: [f"--{flag}"], False: lambda flag: [f"--no_{flag}"]}
    return [word for flag, value in VARIANTS[name].items() for word in (
        words[value](flag) if isinstance(value, bool) else [f"--{flag}", str(value)])]


@pytest.mark.parametrize("name", ["conditional", "dab_ce", "deformable", "refined", "dab_deformable", "all", "repeated",
                                  "denoised", "dino", "told"])
def test_two_processes_of_a_variant_are_one_run(name, tmp_path):
    "In float64, as for DETR; both runs evaluate, write checkpoints and draw."
    shapes = write_shapes(tmp_path / "shapes", num_train=32, num_val=4, num_workers=1)
    few = [*SMALL_RUN, *flags_of(name), "--shapes_path", shapes, "--pretrain_epochs", lesson := int(name == "told"),
           "--optimizer", "adamw"]
    program = str(ROOT / "tests/in_float64.py")
    alone = Child([program, *map(str, [*few, "--batch_size", 8, "--output_dir", tmp_path / "one"])], clean_environ())
    assert alone.wait(timeout=300) == 0, alone.communicate()
    together(*few, "--batch_size", 4, "--output_dir", tmp_path / "two", program=[program])
    one, two = ([line["loss"] for line in steps(tmp_path / run)] for run in ("one", "two"))
    assert len(one) == 4 + 4 * lesson and one == pytest.approx(two, rel=1e-8)
    assert load_detector(tmp_path / "one/best.pth").model.num_queries == PRESETS["shapes"].model.num_queries


def test_images_grow_by_thirds_of_lesson_and_training(here, tmp_path, monkeypatch):  # noqa: F811
    sides, forward = [], SmallBackbone.forward

    def noting(self, images, *rest):
        sides.extend([max(images.shape[-2:])] if self.training else [])
        return forward(self, images, *rest)

    monkeypatch.setattr(SmallBackbone, "forward", noting)
    shapes = write_shapes(tmp_path / "shapes", num_train=16, num_val=4, num_workers=1)
    here(*SMALL_RUN, "--shapes_path", shapes, "--batch_size", 16, "--epochs", 3, "--pretrain_epochs", 3,
         "--progressive_resize", "--output_dir", tmp_path / "run")
    assert len(sides) == 7  # the first of them tries whether memory suffices
    assert [(side > 80) + (side > 112) for side in sides] == [2, 0, 1, 2, 1, 1, 2]


def test_cells_are_asked_for_class_and_box_as_in_plain_loops(in_float64):
    "On two maps, in images of different size; a cell is in a box whose side is a cell at least."
    config = PRESETS["shapes"].but(**SMALL | VARIANTS["told"])
    model, targets = build_model(config, CLASSES), make_targets([3, 1], torch.float64, CLASSES)
    nn.init.normal_(model.enc_bbox_embed.layers[-1].weight, std=0.1)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 48:], padding[1, :, 80:] = True, True
    batch = Batch(torch.randn(IMAGES).masked_fill(padding[:, None], 0), padding,
                  targets._replace(sizes=torch.tensor([[64, 96], [48, 80]])))
    found, weight = _loss((maps := _ProposalReader(model).read(batch)), batch.targets)
    expected, owners = 0, torch.arange(2).repeat_interleave(batch.targets.counts)
    for cells, stride in zip(maps, (8, 16), strict=True):
        said = [[] for _ in owners]
        for image, row, column in product(range(2), range(64 // stride), range(96 // stride)):
            place, (height, width) = row * (96 // stride) + column, batch.targets.sizes[image].tolist()
            inside = {}
            for box in (owners == image).nonzero()[:, 0].tolist():
                x, y, w, h = (batch.targets.boxes[box] * torch.tensor([width, height, width, height])).tolist()
                if 2 * abs((column + 0.5) * stride - x) <= max(w, stride) and 2 * abs(
                        (row + 0.5) * stride - y) <= max(h, stride):
                    inside[w * h] = box
            logits, padded = cells.logits[image, place], row * stride >= height or column * stride >= width
            probabilities = torch.cat([logits[:-1], torch.zeros(1)]).log_softmax(-1)
            if not inside:
                expected -= 0 if padded else (stride / 16) ** 2 / 2 * 0.3 * probabilities[-1]
                continue
            box = inside[min(inside)]
            said[box].append(torch.cat([logits[:-1], torch.zeros(1)]))
            truth, ours = batch.targets.boxes[box], cells.boxes[image, place].sigmoid()
            overlap = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (truth, ours)))[0, 0]
            expected += (stride / 16) ** 2 / 2 * (2.5 * (truth - ours).abs().sum() + 1 - overlap)
            expected -= 0 if padded else (stride / 16) ** 2 / 2 * probabilities[batch.targets.labels[box]]
        for label, mine in zip(batch.targets.labels, said):
            if mine:
                expected -= (stride / 16) ** 2 / 2 * 3 * torch.stack(mine).mean(0).log_softmax(-1)[label]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert 0 < weight < 2 * 24


def test_a_lesson_of_proposals_goes_on_and_begins_behind_one_of_cells(here, tmp_path):  # noqa: F811
    shapes = write_shapes(tmp_path / "shapes", num_train=16, num_val=4, num_workers=1)
    few = [*SMALL_RUN, "--shapes_path", shapes, "--epochs", 1, "--batch_size", 8, "--num_threads", 1]
    here(*few, *flags_of("told"), "--pretrain_epochs", 2, "--output_dir", tmp_path / "whole")
    here(*few, *flags_of("told"), "--pretrain_epochs", 2, "--output_dir", tmp_path / "again",
         "--resume", tmp_path / "whole/backbone.pth")
    whole, again = (steps(tmp_path / name) for name in ("whole", "again"))
    assert len(whole) == 6 and [line["loss"] for line in whole[4:]] == [line["loss"] for line in again]
    here(*few, "--pretrain_epochs", 2, "--output_dir", tmp_path / "cells")
    here(*few, *flags_of("told"), "--pretrain_epochs", 2, "--output_dir", tmp_path / "behind",
         "--resume", tmp_path / "cells/backbone.pth")
    known = load_checkpoint(tmp_path / "cells/backbone.pth")["model"]
    assert "class_embed.weight" in known and len(steps(tmp_path / "behind")) == 2


@pytest.mark.parametrize("kind", ["conditional", "dab", "dn"])
def test_released_files_load_by_key(kind, tmp_path):
    "As the projects' training writes them: DAB-DETR's with the box head twice, and anchors under another name."
    torch.manual_seed(0)
    copies, decoder = dict(denoising=100) if kind == "dn" else {}, "dab" if kind == "dn" else kind
    model = build_detr(91, "resnet50", temperature=20 if decoder == "dab" else 10000, enc_layers=1, dec_layers=2,
                       dim_feedforward=64, num_queries=9, decoder=decoder, class_loss="focal", pretrained=None,
                       **copies).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("bbox_embed.") and decoder == "dab":
            state[f"transformer.decoder.{name}"] = tensor
        name = name.replace("backbone.", "backbone.0.", 1).replace("label_embed.", "label_enc.")
        state[name.replace("query_embed.", "refpoint_embed.") if decoder == "dab" else name] = tensor
    path = tmp_path / f"{kind}_r50.pth"
    torch.save({"model": state}, path)
    found = load_detector(path)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, again = model(images), found.model(images)
    assert torch.equal(ours.boxes, again.boxes) and torch.equal(ours.logits, again.logits)
    assert again.sigmoid and found.names[1] == "person" and found.model.num_classes == 91
    if kind == "dn":  # a query begins with the class that is not known, a row after all others
        assert state["label_enc.weight"].shape == (92, 255)
        state["label_enc.weight"][-1] += 1
        torch.save({"model": state}, path)
        with torch.no_grad():
            assert not torch.equal(load_detector(path).model(images).logits, ours.logits)
