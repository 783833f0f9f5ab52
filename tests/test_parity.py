"""Equal weights in, equal numbers out: detr_nb beside transformers and beside a plain reference (reference_detr.py).

Where transformers departs from the paper's released code, we follow the released code, and the difference is measured.
"""
import contextlib
import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ledger import COMPONENTS, DEPARTURES, DIFFERENCES, PLAIN, TRANSFORMERS, Ledger, expected_rows, read_table
from reference_detr import (
    ReferenceDETR,
    learned_places,
    reference_answers,
    reference_losses,
    reference_total,
    sine_places,
)
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.overrides import TorchFunctionMode

from detr_nb.backbone import FrozenBatchNorm2d
from detr_nb.batching import Targets
from detr_nb.criterion import SetCriterion
from detr_nb.detr import DETR, Predictions, build_detr
from detr_nb.evaluation import postprocess
from detr_nb.layouts import from_released, from_transformers, to_released, to_transformers
from detr_nb.matcher import Matches, _assign, match
from detr_nb.position_encoding import LearnedPositionEncoding, SinePositionEncoding

transformers = pytest.importorskip("transformers")
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig  # noqa: E402
from transformers.loss import loss_for_object_detection as their_loss  # noqa: E402
from transformers.models.detr import modeling_detr as their_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:resnet50 has random weights")

CLASSES = 91
FULL = dict(hidden_dim=256, nheads=8, enc_layers=6, dec_layers=6, dim_feedforward=2048, num_queries=100)
REDUCED = dict(hidden_dim=64, nheads=4, enc_layers=2, dec_layers=3, dim_feedforward=128, num_queries=15)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def randomize(model: DETR, seed: int = 0) -> DETR:
    "Give every weight and every statistic a value that matters: queries that differ, norms that are not the identity."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.weight.copy_(0.4 + 0.2 * torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            if name.endswith("in_proj_weight"):  # look sharply, and do not wash out what differs
                width = weight.shape[1]
                weight[: 2 * width] *= 1.5
                weight[2 * width :] *= 0.3 if "self_attn" in name else 2
        model.input_proj.bias.zero_()
        tokens = model.input_proj(model.backbone(coarse_images(torch.float32)).maps[-1])
        model.input_proj.weight /= tokens.std()
        model.input_proj.bias.sub_(tokens.mean((0, 2, 3)) / tokens.std())  # else all tokens are nearly alike
        for layer in model.bbox_embed.layers:
            layer.weight *= 2
    return model


def coarse_images(dtype: torch.dtype) -> Tensor:
    "Two images of 96 x 128 pixels, of soft spots of random colours."
    generator = torch.Generator().manual_seed(1)
    spots = 2 * torch.randn(2, 3, 6, 8, generator=generator)
    return F.interpolate(spots, size=(96, 128), mode="bicubic").to(dtype)


def list_targets(targets: Targets, labels: str) -> list[dict[str, Tensor]]:
    "Packed targets as a list of dictionaries, the labels under the name that a reference wants."
    counts = targets.counts.tolist()
    per_image = zip(targets.labels.split(counts), targets.boxes.split(counts))
    return [{labels: own, "boxes": boxes} for own, boxes in per_image]


def make_targets(counts: list[int], dtype: torch.dtype, num_classes: int = CLASSES, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    size = 0.05 + 0.4 * torch.rand(sum(counts), 2, generator=generator, dtype=dtype)
    centre = size / 2 + (1 - size) * torch.rand(sum(counts), 2, generator=generator, dtype=dtype)
    labels = torch.randint(num_classes, (sum(counts),), generator=generator)
    sizes = torch.tensor([[480, 640], [333, 500], [1, 7], [900, 20]])[: len(counts)]
    return Targets(labels, torch.cat([centre, size], -1), torch.tensor(counts), torch.arange(len(counts)), sizes, sizes)


def build_transformers(settings: dict, dilation: bool, **config) -> DetrForObjectDetection:
    "Their model without timm and downloads. They have no DC5 then (see the departures): we take the stride away."
    resnet = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    model = DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, backbone_config=resnet, num_labels=CLASSES, num_queries=settings["num_queries"],
        d_model=settings["hidden_dim"], encoder_layers=settings["enc_layers"], decoder_layers=settings["dec_layers"],
        encoder_attention_heads=settings["nheads"], decoder_attention_heads=settings["nheads"],
        encoder_ffn_dim=settings["dim_feedforward"], decoder_ffn_dim=settings["dim_feedforward"], **config))
    if dilation:
        for number, block in enumerate(model.model.backbone.model.encoder.stages[3].layers):
            middle = block.layer[1].convolution
            middle.stride = (1, 1)
            if number == 0:
                block.shortcut.convolution.stride = (1, 1)
            else:
                middle.dilation = middle.padding = (2, 2)
    return model.eval().requires_grad_()


def build_reference(settings: dict, dilation: bool) -> ReferenceDETR:
    return ReferenceDETR(
        CLASSES, settings["num_queries"], dilation=dilation, width=settings["hidden_dim"], heads=settings["nheads"],
        encoder_layers=settings["enc_layers"], decoder_layers=settings["dec_layers"],
        feed_forward=settings["dim_feedforward"]).eval()


class Trio(NamedTuple):
    "Three models with the same weights."
    ours: DETR
    theirs: DetrForObjectDetection
    plain: ReferenceDETR
    dtype: torch.dtype


@pytest.fixture(scope="module", params=["R50-float32", "R50-float64", "DC5-float32", "DC5-float64"])
def trio(request: pytest.FixtureRequest) -> Trio:
    name, precision = request.param.split("-")
    dtype, dilation, settings = getattr(torch, precision), name == "DC5", FULL if name == "R50" else REDUCED
    torch.manual_seed(0)
    ours = randomize(build_detr(CLASSES, "resnet50", dilation, **settings)).to(dtype).eval()
    theirs, plain = build_transformers(settings, dilation).to(dtype), build_reference(settings, dilation).to(dtype)
    theirs.load_state_dict(to_transformers(ours), strict=True)  # key for key
    plain.load_state_dict(to_released(ours)["model"], strict=True)
    return Trio(ours, theirs, plain, dtype)


class Run(NamedTuple):
    "What the three make of one batch, with losses and gradients."
    trio: Trio
    images: Tensor
    padding: Tensor | None
    targets: Targets
    ours: dict
    theirs: dict
    plain: dict


def weights_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [weight for _, weight in sorted(model.named_parameters())]


def run_ours(model: DETR, images: Tensor, padding: Tensor | None, targets: Targets) -> dict:
    decoded, memory, features = model.decode(images, padding)
    predictions, criterion = model.answer(decoded), SetCriterion(CLASSES)
    losses = criterion(predictions, targets)
    gradients = torch.autograd.grad(criterion.total(losses), list(model.parameters()))
    named = {name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients)}
    return {"maps": features.maps, "memory": memory, "decoded": decoded.slots, "logits": predictions.logits,
            "boxes": predictions.boxes, "losses": losses, "gradients": named,
            "places": model.position_encoding(features.maps[-1], features.padding).expand(len(images), -1, -1)}


def run_theirs(model: DetrForObjectDetection, images: Tensor, padding: Tensor | None, targets: Targets) -> dict:
    """Without their auxiliary option, so that the decoder's norm stays outside its loop; the inner layers answer
    through the same norm and heads, as in the released code."""
    seen, layers = {}, []
    inside = model.model
    hooks = [
        inside.backbone.register_forward_hook(lambda *call: seen.update(maps=[pair[0] for pair in call[2]])),
        inside.position_embedding.register_forward_hook(lambda *call: seen.update(places=call[2])),
        *(layer.register_forward_hook(lambda *call: layers.append(call[2])) for layer in inside.decoder.layers),
    ]
    found = inside(images, pixel_mask=None if padding is None else (~padding).long())
    for hook in hooks:
        hook.remove()
    decoded = torch.stack([model.model.decoder.layernorm(layer) for layer in layers])
    logits, boxes = model.class_labels_classifier(decoded), model.bbox_predictor(decoded).sigmoid()
    losses = losses_of_theirs(logits, boxes, targets)
    gradients = torch.autograd.grad(reference_total(losses), list(model.parameters()), allow_unused=True)
    named = {name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients)}
    return seen | {"memory": found.encoder_last_hidden_state, "decoded": decoded, "logits": logits, "boxes": boxes,
                   "losses": losses, "gradients": named, "places": seen["places"].flatten(2).transpose(1, 2)}


def losses_of_theirs(logits: Tensor, boxes: Tensor, targets: Targets) -> dict[str, Tensor]:
    "Their criterion on all decoder layers. Their class weights are float32 always; here in the logits' precision."
    matcher = their_loss.HungarianMatcher(1, 5, 2)
    criterion = their_loss.ImageLoss(matcher, logits.shape[-1] - 1, 0.1, ["labels", "boxes", "cardinality"])
    criterion.empty_weight = criterion.empty_weight.to(logits.dtype)
    criterion.empty_weight[-1] = 0.1
    outputs = {"logits": logits[-1], "pred_boxes": boxes[-1],
               "auxiliary_outputs": [{"logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1])]}
    return criterion(outputs, list_targets(targets, "class_labels"))


def run_plain(model: ReferenceDETR, images: Tensor, padding: Tensor | None, targets: Targets) -> dict:
    hidden = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool) if padding is None else padding
    found = model(images, hidden)
    losses, matched = reference_losses(found["logits"], found["boxes"], list_targets(targets, "labels"))
    gradients = torch.autograd.grad(reference_total(losses), list(model.parameters()))
    named = {name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients)}
    return found | {"losses": losses, "matched": matched, "gradients": named,
                    "places": found["places"].flatten(2).transpose(1, 2)}


@pytest.fixture(scope="module", params=["unpadded", "padded"])
def run(request: pytest.FixtureRequest, trio: Trio) -> Run:
    "Two images of 96 x 128 pixels, the second without objects; where padded, the second has 70 x 90."
    images, padding = coarse_images(trio.dtype), None
    if request.param == "padded":
        padding = torch.zeros(2, 96, 128, dtype=torch.bool)
        padding[1, 70:], padding[1, :, 90:] = True, True
        images = images.masked_fill(padding[:, None], 0)
    targets = make_targets([3, 0], trio.dtype)
    batch = images, padding, targets
    ours, theirs = run_ours(trio.ours, *batch), run_theirs(trio.theirs, *batch)
    return Run(trio, *batch, ours, theirs, run_plain(trio.plain, *batch))


@pytest.mark.parametrize("component, key", [
    ("backbone features", "maps"), ("position encoding, sine", "places"), ("encoder memory", "memory"),
    ("decoder layers", "decoded"), ("logits", "logits"), ("boxes", "boxes")])
def test_every_stage_of_the_model(run: Run, ledger: Ledger, component: str, key: str) -> None:
    ledger.compare(component, run.ours[key], run.theirs[key], TRANSFORMERS)
    ledger.compare(component, run.ours[key], run.plain[key], PLAIN)


def test_the_weights_make_a_difference(run: Run) -> None:
    "Else the comparisons above would show little: queries, images and layers answer differently."
    logits = run.ours["logits"]
    for spread in (logits.std(2), logits.std(1), logits.std(0), run.ours["boxes"].std(2)):
        assert spread.mean() > 1e-3


def test_every_loss_term(run: Run, ledger: Ledger) -> None:
    "Of every decoder layer, from each model's own predictions."
    for name, value in run.ours["losses"].items():
        kind = re.sub(r"_\d+$", "", name)
        ledger.compare(kind, value, run.plain["losses"][name].to(value.dtype), PLAIN)
        if kind != "class_error":
            ledger.compare(kind, value, run.theirs["losses"][name], TRANSFORMERS)
    assert run.theirs["losses"].keys() | {"class_error"} == run.plain["losses"].keys() == run.ours["losses"].keys()


def test_matching(run: Run, ledger: Ledger) -> None:
    "Which query answers for which object, in every layer."
    ours = pairs_of(match(Predictions(run.ours["logits"], run.ours["boxes"]), run.targets), run.targets)
    plain = {(layer, image, *pair) for layer, images in enumerate(run.plain["matched"])
             for image, pairs in enumerate(images) for pair in pairs}
    count_differing(ledger, ours, plain, PLAIN, run.trio.dtype)
    count_differing(ledger, ours, match_of_theirs(run.theirs["logits"], run.theirs["boxes"], run.targets),
                    TRANSFORMERS, run.trio.dtype)


def pairs_of(matches: Matches, targets: Targets) -> set[tuple[int, int, int, int]]:
    "(layer, image, query, object of the image)."
    first = targets.counts.cumsum(0) - targets.counts
    return set(zip(*(x.tolist() for x in matches._replace(target=matches.target - first[matches.image]))))


def match_of_theirs(logits: Tensor, boxes: Tensor, targets: Targets) -> set[tuple[int, int, int, int]]:
    matcher, wanted = their_loss.HungarianMatcher(1, 5, 2), list_targets(targets, "class_labels")
    return {(layer, image, int(q), int(n)) for layer in range(len(logits)) for image, pairs in enumerate(
        matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, wanted)) for q, n in zip(*pairs)}


def count_differing(ledger: Ledger, ours: set, theirs: set, reference: str, dtype: torch.dtype) -> None:
    wrong = torch.tensor(float(len(ours ^ theirs)), dtype=dtype)
    ledger.compare("matching, pairs that differ", wrong, torch.zeros_like(wrong), reference)


# the queries begin with nothing, so the first self-attention mixes equal values, whatever its weights
NO_GRADIENT = "transformer.decoder.layers.0.self_attn.in_proj_weight"


class SharedReLU(TorchFunctionMode):
    """Each ReLU opens where that of the model before opened, call by call.

    Among the millions of inputs of the full model's ReLUs some are zero up to rounding, in float32: open in one model
    and shut in the other, and a unit's gradient comes or goes, which is no rounding any more."""

    def __init__(self, decisions: list[Tensor] | None = None):
        super().__init__()
        self.decisions, self.own, self.differing = decisions, [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.relu, torch.relu, Tensor.relu):
            return func(*args, **(kwargs or {}))
        x, opens = args[0], args[0] > 0
        if self.decisions is not None:
            shared = self.decisions[len(self.own)]
            if shared.shape != opens.shape:  # the plain model's tokens come before its images
                shared = shared.transpose(0, 1)
            otherwise = x[opens != shared].abs()
            assert not otherwise.numel() or otherwise.max() <= 1e-6 * x.abs().max()  # only what is nearly zero
            self.differing, opens = self.differing + otherwise.numel(), shared
        self.own.append(opens)
        return x * opens


def gradients_of(run: Run) -> tuple[dict[str, Tensor], ...]:
    "Of the total loss, by all three models; where a ReLU decides otherwise in one of them, all decide as ours did."
    found, decisions, differing = [], None, 0
    for go, model in ((run_ours, run.trio.ours), (run_theirs, run.trio.theirs), (run_plain, run.trio.plain)):
        with SharedReLU(decisions) as relu:
            found.append(go(model, run.images, run.padding, run.targets)["gradients"])
        assert decisions is None or len(relu.own) == len(decisions)
        decisions, differing = relu.own, differing + relu.differing
    assert differing <= (0 if run.trio.dtype == torch.float64 else 20)
    return tuple(found) if differing else (run.ours["gradients"], run.theirs["gradients"], run.plain["gradients"])


def test_the_gradient_of_every_weight(run: Run, ledger: Ledger) -> None:
    "Of the total loss, in the released layout."
    holder = copy.deepcopy(run.trio.ours)
    ours, theirs, plain = gradients_of(run)

    def in_released_layout(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        holder.load_state_dict(gradients, strict=False)
        released = to_released(holder)["model"]
        names = {name for name, _ in run.trio.plain.named_parameters()}
        return {name: value.clone() for name, value in released.items() if name in names}

    like = from_transformers(
        to_transformers(run.trio.ours) | theirs,
        dilation=run.trio.ours.backbone.stride == 16, nheads=run.trio.theirs.config.encoder_attention_heads)
    ours, theirs = in_released_layout(ours), in_released_layout(dict(like.to(run.trio.dtype).named_parameters()))
    assert ours.keys() == theirs.keys() == plain.keys()
    whole = torch.cat([gradient.flatten() for gradient in plain.values()])
    zero = {name for name, gradient in plain.items() if gradient.norm() < 1e-6 * whole.norm()}
    assert zero == {NO_GRADIENT} and ours[NO_GRADIENT].norm() < 1e-6 * whole.norm()
    for other, reference in ((plain, PLAIN), (theirs, TRANSFORMERS)):
        one = [torch.cat([gradients[name].flatten() for name in plain]) for gradients in (ours, other)]
        ledger.compare("gradient, all weights together", *one, reference)
        for name in plain.keys() - zero:
            ledger.compare("gradient, each weight by itself", ours[name], other[name], reference)


@precisions
@pytest.mark.parametrize("counts", [[3, 0, 5], [1], [0, 0], [8, 2], [12, 1]], ids=str)
def test_the_criterion_on_equal_predictions(counts: list[int], dtype: torch.dtype, ledger: Ledger) -> None:
    "Every term and its gradient, for the same random predictions; 8 queries, so the last batch has too many objects."
    generator = torch.Generator().manual_seed(sum(counts))
    logits = torch.randn(3, len(counts), 8, 6, generator=generator, dtype=dtype, requires_grad=True)
    boxes = torch.rand(3, len(counts), 8, 4, generator=generator, dtype=dtype) * 0.5 + 0.2
    boxes.requires_grad_()
    targets = make_targets(counts, dtype, num_classes=5)
    with pytest.warns(UserWarning, match="12 objects") if max(counts) > 8 else contextlib.nullcontext():
        ours = SetCriterion(5)(Predictions(logits, boxes), targets)
    plain, _ = reference_losses(logits, boxes, list_targets(targets, "labels"))
    theirs = losses_of_theirs(logits, boxes, targets)
    for name, value in ours.items():
        kind = re.sub(r"_\d+$", "", name)
        for other, reference in ((plain, PLAIN), (theirs, TRANSFORMERS)):
            if kind == "class_error" and (other is theirs or not sum(counts)):
                continue  # they have none; without objects we say 0 where the released code says 100
            ledger.compare(kind, value, other[name].to(dtype), reference)
            if kind.startswith("loss"):
                pairs = [torch.autograd.grad(x, (logits, boxes), retain_graph=True, materialize_grads=True)
                         for x in (value, other[name])]
                ledger.compare(f"gradient of {kind}", *pairs, reference)


@precisions
def test_matching_on_equal_predictions(dtype: torch.dtype, ledger: Ledger) -> None:
    "Fifty random problems: the same pairs, and the same cost for every query and object."
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 3, 9, 6, generator=generator, dtype=dtype)
        boxes = torch.rand(2, 3, 9, 4, generator=generator, dtype=dtype) * 0.5 + 0.2
        targets = make_targets([4, 0, 7], dtype, num_classes=5, seed=seed)
        ours = pairs_of(match(Predictions(logits, boxes), targets), targets)
        count_differing(ledger, ours, match_of_theirs(logits, boxes, targets), TRANSFORMERS, dtype)
        _, plain = reference_losses(logits, boxes, list_targets(targets, "labels"))
        pairs = {(layer, image, *pair) for layer, images in enumerate(plain)
                 for image, found in enumerate(images) for pair in found}
        count_differing(ledger, ours, pairs, PLAIN, dtype)


def test_the_faster_solver_finds_costs_as_low_as_scipys() -> None:
    "Of any shape, with many equal costs, with rows that are nearly alike, and with nothing to share."
    pytest.importorskip("lap")
    assert _assign is not linear_sum_assignment
    rng = np.random.default_rng(0)
    for turn in range(600):
        rows, columns = rng.integers(0, 60), rng.integers(1, 120)
        table = rng.normal(size=(rows, columns)).astype(np.float32)
        if turn % 3 == 0:
            table = table.round()
        if turn % 5 == 0 and rows:
            table = table[:, :1] + 1e-4 * table
        found, least = _assign(table), linear_sum_assignment(table)
        assert len(set(found[1])) == len(found[1]) == min(rows, columns) and (np.diff(found[0]) > 0).all()
        assert table[found].sum(dtype=float) == pytest.approx(table[least].sum(dtype=float), abs=1e-12)


# height, width, and the real part of each of three images
PADDED_MAPS = [(7, 9, None), (7, 9, [(7, 9), (4, 9), (1, 2)]), (1, 1, None), (42, 25, [(42, 20), (30, 25), (42, 25)])]


@precisions
def test_sine_places(dtype: torch.dtype, ledger: Ledger) -> None:
    "For maps of many sizes, padded or not, also an image of which one row is left."
    for height, width, real in PADDED_MAPS:
        padding = None
        if real is not None:
            padding = torch.ones(3, height, width, dtype=torch.bool)
            for own, (h, w) in zip(padding, real):
                own[:h, :w] = False
        features = torch.zeros(3, 8, height, width, dtype=dtype)
        hidden = torch.zeros(3, height, width, dtype=torch.bool) if padding is None else padding
        ours = SinePositionEncoding(64)(features, padding).expand(3, -1, -1)
        theirs = their_model.DetrSinePositionEmbedding(32, normalize=True)(features.shape, "cpu", dtype, ~hidden)
        ledger.compare("position encoding, sine", ours, theirs.flatten(2).transpose(1, 2), TRANSFORMERS)
        plain = sine_places(hidden, 32, dtype)
        ledger.compare("position encoding, sine", ours, plain.flatten(2).transpose(1, 2), PLAIN)


@precisions
def test_learned_places(dtype: torch.dtype, ledger: Ledger) -> None:
    theirs, ours = their_model.DetrLearnedPositionEmbedding(16).to(dtype), LearnedPositionEncoding(32).to(dtype)
    ours.row_embed.weight.data.copy_(theirs.row_embeddings.weight)
    ours.col_embed.weight.data.copy_(theirs.column_embeddings.weight)
    for height, width in ((7, 9), (1, 1), (50, 31)):
        found = ours(torch.zeros(1, 8, height, width, dtype=dtype))
        expected = theirs(torch.Size((1, 8, height, width)), "cpu", dtype)
        ledger.compare("position encoding, learned", found, expected.flatten(2).transpose(1, 2), TRANSFORMERS)
        plain = learned_places(ours.row_embed.weight, ours.col_embed.weight, height, width)
        ledger.compare("position encoding, learned", found, plain.flatten(2).transpose(1, 2), PLAIN)


@precisions
def test_post_processing(dtype: torch.dtype, ledger: Ledger) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 100, CLASSES + 1, generator=generator, dtype=dtype)
    boxes, sizes = torch.rand(4, 100, 4, generator=generator, dtype=dtype), make_targets([0] * 4, dtype).sizes
    ours = postprocess(logits, boxes, sizes)
    theirs = transformers.DetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=-1, target_sizes=sizes)
    for answers, reference in ((theirs, TRANSFORMERS), (reference_answers(logits, boxes, sizes), PLAIN)):
        assert torch.equal(ours.labels, torch.stack([answer["labels"] for answer in answers]))
        scores, places = (torch.stack([answer[name] for answer in answers]) for name in ("scores", "boxes"))
        ledger.compare("post-processing, scores", ours.scores, scores, reference)
        ledger.compare("post-processing, boxes", ours.boxes, places, reference)


def test_the_last_layer_without_auxiliary_outputs(run: Run, ledger: Ledger) -> None:
    "Whether the inner layers answer too changes neither the last layer's answer nor its losses."
    images, padding, targets = run.images, run.padding, run.targets
    hidden = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool) if padding is None else padding
    with torch.no_grad():
        plain = run.trio.plain(images, hidden, auxiliary=False)
        theirs = run.trio.theirs(images, None if padding is None else (~padding).long())
    assert plain["logits"].shape[0] == 1
    for ours, alone, other in ((run.ours["logits"], plain["logits"], theirs.logits),
                               (run.ours["boxes"], plain["boxes"], theirs.pred_boxes)):
        ledger.compare("last layer, no auxiliary outputs", ours[-1], alone[0], PLAIN)
        ledger.compare("last layer, no auxiliary outputs", ours[-1], other, TRANSFORMERS)
    last = SetCriterion(CLASSES)(Predictions(run.ours["logits"][-1:], run.ours["boxes"][-1:]), targets)
    assert all(torch.equal(value, run.ours["losses"][name]) for name, value in last.items())


def test_the_released_layout_there_and_back(trio: Trio) -> None:
    "The state dict has the reference's keys and shapes, and a model made from it answers alike."
    state = to_released(trio.ours)["model"]
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in trio.plain.state_dict().items()}
    heads = trio.theirs.config.encoder_attention_heads
    back = from_released({"model": trio.plain.state_dict()}, dilation=trio.ours.backbone.stride == 16, nheads=heads)
    images = torch.randn(1, 3, 64, 64, dtype=trio.dtype)
    with torch.no_grad():
        for ours, again in zip(trio.ours(images)[:2], back.to(trio.dtype).eval()(images)[:2]):
            assert torch.equal(ours, again)


# Where transformers departs from the released code, or we from it, and what that does.


def test_their_decoder_norm_inside_the_loop(ledger: Ledger) -> None:
    "With their option for auxiliary losses the norm's output goes into the next layer, which changes every answer."
    torch.manual_seed(0)
    ours = randomize(build_detr(CLASSES, "resnet50", **REDUCED)).double().eval()
    images, answers = coarse_images(torch.float64), {}
    for auxiliary in (False, True):
        theirs = build_transformers(REDUCED, False, auxiliary_loss=auxiliary).double()
        theirs.load_state_dict(to_transformers(ours))
        with torch.no_grad():
            answers[auxiliary] = theirs(images).logits
    with torch.no_grad():
        assert (ours(images).logits[-1] - answers[False]).abs().max() < 1e-10
    difference = float((answers[True] - answers[False]).abs().max())
    assert difference > 0.01
    ledger.depart("decoder, norm of the inner layers", "of what the heads read",
                  "with `auxiliary_loss` also of what the next layer reads", "as released",
                  f"last layer's logits move by {difference:.2f}")


def test_their_number_of_boxes_over_processes(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    "Two processes with the same batch: the mean number of boxes is the number of one; they divide it again."
    from accelerate.utils import reduce

    assert inspect.signature(reduce).parameters["reduction"].default == "mean"
    logits, boxes = torch.randn(1, 2, 8, 6), torch.rand(1, 2, 8, 4) * 0.5 + 0.2
    targets = make_targets([3, 2], torch.float32, num_classes=5)
    alone = losses_of_theirs(logits, boxes, targets)["loss_bbox"]
    monkeypatch.setattr(their_loss, "reduce", lambda count: count)  # the mean of two equal numbers
    two = type("PartialState", (), {"_shared_state": {"backend": "gloo"}, "num_processes": 2})
    monkeypatch.setattr(their_loss, "PartialState", two)
    together = losses_of_theirs(logits, boxes, targets)["loss_bbox"]
    criterion = SetCriterion(5)
    divisors = 2 * criterion.normalizers(targets.counts, 8) / 2  # summed over processes, then per process
    ours = criterion(Predictions(logits, boxes), targets, divisors)["loss_bbox"]
    torch.testing.assert_close(ours, alone)
    factor = float(together / alone)
    assert factor == pytest.approx(2)
    ledger.depart("box losses, two processes", "divided by the mean number of boxes",
                  "that mean is divided by the number of processes again", "as released",
                  f"box losses {factor:.1f} times as large")


def test_their_dropout(ledger: Ledger) -> None:
    config = build_transformers(REDUCED, False).config
    ours = build_detr(5, "small", **REDUCED).transformer
    inner = [module.dropout for module in ours.modules() if hasattr(module, "in_proj_weight")]
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0, 0)
    assert inner and set(inner) == {0.1} and ours.encoder.layers[0].dropout.p == 0.1
    assert inspect.signature(ReferenceDETR).parameters["dropout"].default == 0.1
    ledger.depart("dropout in attention and inside the feed-forward part", "0.1 in both", "0 in both by default",
                  "as released", "0.1 against 0")
    tokens = torch.ones(1, 4000, REDUCED["hidden_dim"])
    nothing = DetrConfig(use_timm_backbone=False, backbone_config=ResNetConfig(), encoder_layers=0,
                         d_model=REDUCED["hidden_dim"])
    with torch.no_grad():
        after = their_model.DetrEncoder(nothing).train()(tokens).last_hidden_state
    share = float((after == 0).double().mean())
    assert share == pytest.approx(0.1, abs=0.01)
    empty = build_detr(5, "small", **REDUCED | {"enc_layers": 0}).transformer.train()
    assert torch.equal(empty(tokens, tokens[:1], torch.zeros(1, REDUCED["hidden_dim"]))[1], tokens)
    ledger.depart("dropout before the encoder", "none", "on its input", "as released", f"{share:.0%} of the numbers")


def test_their_frozen_backbone(ledger: Ledger) -> None:
    "With their own ResNet the names they look for do not occur, so that no layer of the backbone is trained."
    model = DetrForObjectDetection(DetrConfig(use_timm_backbone=False, backbone_config=ResNetConfig()))
    theirs = sum(weight.requires_grad for weight in model.model.backbone.parameters())
    ours = build_detr(5, "resnet50", pretrained=None, **REDUCED).backbone
    trained = {name.split(".")[1] for name, weight in ours.named_parameters() if weight.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"} and theirs == 0
    count = sum(weight.requires_grad for weight in ours.parameters())
    ledger.depart("backbone, layers that are trained", "all but the stem and layer1",
                  "none, when the backbone is not from timm", "as released",
                  f"{count} convolutions against {theirs}")


def test_their_dilation(ledger: Ledger) -> None:
    "With their own ResNet the option is accepted and does nothing."
    resnet = ResNetConfig(out_features=["stage4"])
    model = DetrForObjectDetection(DetrConfig(use_timm_backbone=False, backbone_config=resnet, dilation=True))
    images = torch.zeros(1, 3, 96, 128)
    with torch.no_grad():
        theirs = model.model.backbone(images, torch.ones(1, 96, 128))[-1][0].shape[-2:]
        ours = build_detr(5, "resnet50", dilation=True, **REDUCED).backbone(images).maps[-1].shape[-2:]
    assert (tuple(theirs), tuple(ours)) == ((3, 4), (6, 8))
    ledger.depart("DC5", "the last stage has stride 16",
                  "`dilation=True` does nothing, when the backbone is not from timm", "as released",
                  "stride 16 against 32")


def test_our_class_error_without_objects(ledger: Ledger) -> None:
    targets = make_targets([0], torch.float32)
    logits, boxes = torch.randn(1, 1, 4, 6), torch.rand(1, 1, 4, 4)
    ours = float(SetCriterion(5)(Predictions(logits, boxes), targets)["class_error"])
    released = float(reference_losses(logits, boxes, list_targets(targets, "labels"))[0]["class_error"])
    assert (ours, released) == (0, 100)
    ledger.depart("class_error of a batch without objects", "100", "not computed", "0",
                  f"{released:.0f} against {ours:.0f}")


def test_our_class_loss_over_processes(ledger: Ledger) -> None:
    "The class weights are summed over processes like the boxes, so that the split of a batch does not matter."
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 8, 6, generator=generator)
    boxes = torch.rand(1, 2, 8, 4, generator=generator) * 0.5 + 0.2
    halves = [(slice(0, 1), make_targets([7], torch.float32, 5)), (slice(1, 2), make_targets([0], torch.float32, 5))]
    criterion = SetCriterion(5)
    whole = halves[0][1]._replace(counts=torch.tensor([7, 0]), image_ids=torch.arange(2))
    expected = float(criterion(Predictions(logits, boxes), whole)["loss_ce"])
    divisors = sum(criterion.normalizers(targets.counts, 8) for _, targets in halves) / 2
    parts = [(logits[:, part], boxes[:, part], targets) for part, targets in halves]
    ours = sum(float(criterion(Predictions(a, b), targets, divisors)["loss_ce"]) for a, b, targets in parts) / 2
    released = sum(float(reference_losses(a, b, list_targets(targets, "labels"))[0]["loss_ce"])
                   for a, b, targets in parts) / 2
    assert ours == pytest.approx(expected, rel=1e-6) and abs(released / expected - 1) > 0.01
    ledger.depart("loss_ce, two processes", "each divides by its own class weights", "as released",
                  "both divide by the mean of the two", f"{abs(released / expected - 1):.0%} off the undivided batch")


def test_our_learned_places_beyond_the_table(ledger: Ledger) -> None:
    features = torch.zeros(1, 8, 51, 3)
    with pytest.raises(IndexError):
        their_model.DetrLearnedPositionEmbedding(16)(features.shape, "cpu", torch.float32)
    assert LearnedPositionEncoding(32)(features).isfinite().all()
    ledger.depart("learned positions, more than 50 rows or columns", "an error", "an error",
                  "the table is stretched", "51 rows")


def test_the_ledger_in_the_book() -> None:
    "Every row that must be there is there, in order, with a version and a number per precision; the page shows it."
    rows = [(component, reference.rsplit(" ", 1)[0]) for component, reference, *_ in read_table(DIFFERENCES)]
    assert rows == expected_rows()
    keys = {(name, reference, precision) for name, (_, promised, references) in COMPONENTS.items()
            for reference in references for precision in promised}
    assert Ledger().committed.keys() == keys
    page = (DIFFERENCES.parent / "parity.md").read_text(encoding="utf-8")
    assert f":file: {DIFFERENCES.name}" in page and f":file: {DEPARTURES.name}" in page


def test_every_row_is_measured_by_a_test() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in COMPONENTS if f'"{name}"' not in source and "loss" not in name] == []
    departures = set(re.findall(r'ledger\.depart\(\s*"([^"]+)"', source))
    assert departures == {line[0] for line in read_table(DEPARTURES)}
