"""Equal weights in, equal masks and mask losses out: detr_nb beside transformers' DetrForSegmentation."""
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ledger import TRANSFORMERS, Ledger
from test_parity import CLASSES, build_transformers, coarse_images, list_targets, make_targets, randomize
from torch import Tensor

from detr_nb.batching import Targets
from detr_nb.detr import Predictions, build_detr
from detr_nb.layouts import to_transformers
from detr_nb.matcher import Matches
from detr_nb.segmentation import MaskCriterion, MaskHead, SegmentationDETR, mask_losses

transformers = pytest.importorskip("transformers")
from transformers import DetrForSegmentation  # noqa: E402
from transformers.loss import loss_for_object_detection as their_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:resnet50 has random weights")

REDUCED = dict(hidden_dim=64, nheads=8, enc_layers=2, dec_layers=3, dim_feedforward=128, num_queries=15)
NAMES = [(r"^q_linear|^k_linear", lambda m: f"bbox_attention.{m[0][0]}_proj"),
         (r"^lay([12])", r"mask_head.conv\1.conv"), (r"^gn([12])", r"mask_head.conv\1.norm"),
         (r"^lay([345])", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 3}.refine.conv"),
         (r"^gn([345])", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 3}.refine.norm"),
         (r"^adapter([123])", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 1}.fpn_adapter"),
         (r"^out_lay", "mask_head.output_conv")]


def their_name(name: str) -> str:
    "What transformers calls a tensor of the mask head or of the attention maps."
    bare = name.split(".", 1)[1]
    for pattern, becomes in NAMES:
        if re.match(pattern, bare):
            return re.sub(pattern, becomes, bare)
    raise KeyError(name)


def to_theirs(tensors: dict[str, Tensor], detector: dict[str, Tensor]) -> dict[str, Tensor]:
    "Our segmentation model's tensors, or gradients, under their names; the detector's are named already."
    own = {their_name(name): tensor for name, tensor in tensors.items() if not name.startswith("detr.")}
    return own | {f"detr.{name}": tensor for name, tensor in detector.items()}


def build_theirs(dilation: bool) -> DetrForSegmentation:
    detector = build_transformers(REDUCED, dilation)
    model = DetrForSegmentation(detector.config)
    model.detr = detector
    return model.eval().requires_grad_()


class Pair(NamedTuple):
    "Two models with the same weights."
    ours: SegmentationDETR
    theirs: DetrForSegmentation
    dtype: torch.dtype


@pytest.fixture(scope="module", params=["R50-float32", "R50-float64", "DC5-float32", "DC5-float64"])
def pair(request: pytest.FixtureRequest) -> Pair:
    name, precision = request.param.split("-")
    torch.manual_seed(0)
    ours = SegmentationDETR(randomize(build_detr(CLASSES, "resnet50", name == "DC5", **REDUCED)), freeze=False)
    with torch.no_grad():
        for weight in [*ours.mask_head.parameters(), *ours.bbox_attention.parameters()]:
            if weight.dim() == 1:  # biases and norms are zeros and ones at first
                weight.add_(0.1 * torch.randn(weight.shape))
        ours.bbox_attention.q_linear.weight.mul_(2)  # look sharply,
        # and let it show, as it does trained
        ours.mask_head.lay1.weight[:, -REDUCED["nheads"] :] *= 8 / MaskHead.attention_gain
    dtype, theirs = getattr(torch, precision), build_theirs(name == "DC5")
    theirs.load_state_dict(to_theirs(ours.state_dict(), to_transformers(ours.detr)), strict=True)  # key for key
    return Pair(ours.to(dtype).eval(), theirs.to(dtype), dtype)


def make_masks(targets: Targets, height: int, width: int, dtype: torch.dtype) -> Targets:
    "Targets with a disc in every box, on a canvas of this size."
    y, x = (torch.arange(side, dtype=dtype) + 0.5 for side in (height, width))
    cx, cy, w, h = (targets.boxes.to(dtype) * torch.tensor([width, height, width, height], dtype=dtype)).unbind(-1)
    inside = (((x - cx[:, None]) / w[:, None]) ** 2)[:, None] + (((y - cy[:, None]) / h[:, None]) ** 2)[:, :, None]
    sizes = torch.tensor([[height, width]]).expand(len(targets.counts), 2)
    return targets._replace(masks=inside < 0.25, sizes=sizes)


class Run(NamedTuple):
    "What both make of one batch of two images, the second without objects."
    pair: Pair
    targets: Targets
    ours: Predictions
    theirs: object
    images: Tensor


@pytest.fixture(scope="module", params=["unpadded", "padded"])
def run(request: pytest.FixtureRequest, pair: Pair) -> Run:
    images, padding = coarse_images(pair.dtype), None
    if request.param == "padded":
        padding = torch.zeros(2, 96, 128, dtype=torch.bool)
        padding[1, 70:], padding[1, :, 90:] = True, True
        images = images.masked_fill(padding[:, None], 0)
    targets = make_masks(make_targets([3, 0], pair.dtype), 96, 128, pair.dtype)
    theirs = pair.theirs(images, None if padding is None else (~padding).long())
    return Run(pair, targets, pair.ours(images, padding), theirs, images)


def losses_of_theirs(logits: Tensor, boxes: Tensor, masks: Tensor, targets: Targets) -> dict[str, Tensor]:
    "Their criterion on the last layer; class weights in the precision of the logits."
    criterion = their_loss.ImageLoss(their_loss.HungarianMatcher(1, 5, 2), logits.shape[-1] - 1, 0.1,
                                     ["labels", "boxes", "cardinality", "masks"])
    criterion.empty_weight = criterion.empty_weight.to(logits.dtype)
    criterion.empty_weight[-1] = 0.1
    wanted = list_targets(targets, "class_labels")
    for target, own in zip(wanted, targets.masks.split(targets.counts.tolist())):
        target["masks"] = own
    return criterion({"logits": logits, "pred_boxes": boxes, "pred_masks": masks}, wanted)


def test_mask_logits(run: Run, ledger: Ledger) -> None:
    "On the image and on padding, for every query, at a quarter of the canvas."
    assert run.ours.masks.shape == (2, 15, 24, 32)
    ledger.compare("mask logits", run.ours.masks, run.theirs.pred_masks, TRANSFORMERS)
    torch.testing.assert_close(run.ours.logits[-1], run.theirs.logits)


def test_the_masks_make_a_difference(run: Run) -> None:
    "Else the comparison above would show little: queries, images and places are painted differently."
    masks = run.ours.masks
    assert all(masks.std(dim).mean() > 1e-2 for dim in (0, 1, 2, 3))


def test_mask_losses(run: Run, ledger: Ledger) -> None:
    "From each model's own predictions, all pixels of the canvas taken for image, as the released code does."
    ours = MaskCriterion(CLASSES)(run.ours.last_layer(), run.targets)
    theirs = losses_of_theirs(run.theirs.logits, run.theirs.pred_boxes, run.theirs.pred_masks, run.targets)
    assert ours.keys() == theirs.keys() | {"class_error"}
    for name in ("loss_mask", "loss_dice"):
        ledger.compare(name, ours[name], theirs[name], TRANSFORMERS)


def test_gradients_of_the_mask_losses(run: Run, ledger: Ledger) -> None:
    "With respect to every weight of mask head and attention maps, and, in double precision, of the detector."
    pair = run.pair
    ours = MaskCriterion(CLASSES)(run.ours.last_layer(), run.targets)
    theirs = losses_of_theirs(run.theirs.logits, run.theirs.pred_boxes, run.theirs.pred_masks, run.targets)
    head = {name: weight for name, weight in pair.ours.named_parameters() if not name.startswith("detr.")}
    other = dict(pair.theirs.named_parameters())
    mine = torch.autograd.grad(ours["loss_mask"] + ours["loss_dice"], list(head.values()), retain_graph=True)
    names = [their_name(name) for name in head]
    yours = torch.autograd.grad(theirs["loss_mask"] + theirs["loss_dice"], [other[name] for name in names],
                                retain_graph=True)
    flat = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (mine, yours)]
    ledger.compare("gradient of the mask losses", *flat, TRANSFORMERS)
    if pair.dtype == torch.float64:  # through the attention maps and all three finer maps into the backbone
        queries = pair.ours.detr.query_embed.weight, other["detr.model.query_position_embeddings.weight"]
        stem = (pair.ours.detr.backbone.body.conv1.weight,
                other["detr.model.backbone.model.embedder.embedder.convolution.weight"])
        for a, b in (queries, stem):
            own = torch.autograd.grad(ours["loss_mask"] + ours["loss_dice"], a, retain_graph=True)
            peer = torch.autograd.grad(theirs["loss_mask"] + theirs["loss_dice"], b, retain_graph=True)
            assert own[0].norm() > 0
            ledger.compare("gradient of the mask losses", own[0], peer[0], TRANSFORMERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [1], [0, 0], [8, 2]], ids=str)
def test_the_criterion_on_equal_masks(counts: list[int], dtype: torch.dtype, ledger: Ledger) -> None:
    "The same random predictions to both; also a batch without objects."
    generator = torch.Generator().manual_seed(sum(counts))
    logits = torch.randn(1, len(counts), 8, 6, generator=generator, dtype=dtype)
    boxes = torch.rand(1, len(counts), 8, 4, generator=generator, dtype=dtype) * 0.5 + 0.2
    masks = 3 * torch.randn(len(counts), 8, 9, 13, generator=generator, dtype=dtype)
    targets = make_masks(make_targets(counts, dtype, num_classes=5), 33, 50, dtype)
    ours = MaskCriterion(5)(Predictions(logits, boxes, masks), targets)
    theirs = losses_of_theirs(logits[0], boxes[0], masks, targets)
    for name in ("loss_mask", "loss_dice"):
        ledger.compare(name, ours[name], theirs[name], TRANSFORMERS)


def test_their_mask_losses_on_padding(ledger: Ledger) -> None:
    "Theirs changes when an image shares its batch with a larger one; ours does not."
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(1, 1, 8, 8, generator=generator)
    only = Matches(*torch.zeros(4, 1, dtype=torch.long))
    alone = make_masks(make_targets([1], torch.float32), 32, 32, torch.float32)
    margin = F.pad(masks, (0, 8))
    together = alone._replace(masks=F.pad(alone.masks, (0, 32)))
    ours = mask_losses(masks, alone, only), mask_losses(margin, together, only)
    released = mask_losses(margin, together._replace(sizes=torch.tensor([[32, 64]])), only)
    change = float((released / ours[0] - 1).abs().max())
    # cells at the edge are enlarged with their neighbours on the padding, so the last pixels move a little
    assert (ours[1] / ours[0] - 1).abs().max() < 0.02 and change > 0.2
    ledger.depart("mask losses, padded pixels", "counted as background", "as released", "left out",
                  f"an image half as wide as its batch: the losses move by {change:.0%}")
