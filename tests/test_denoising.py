"Noised copies of objects: as in RT-DETR and DN-DETR, in plain loops, and through every command."
import json
import math

import ledger as ledgers
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_parity import list_targets, make_targets
from test_train import SMALL as SMALL_RUN
from test_train import here, steps  # noqa: F401
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from detr_nb import denoising
from detr_nb.batching import Batch, Targets
from detr_nb.config import PRESETS
from detr_nb.denoising import DenoisingDETR, lay_out
from detr_nb.detr import Predictions
from detr_nb.distributed import UserError
from detr_nb.engine import build_criterion, build_model, check_settings, train_step
from detr_nb.shapes_set import write_shapes

pytest.importorskip("transformers")
IMAGES, CLASSES, QUERIES = (3, 3, 64, 96), 5, 6
SMALL = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=QUERIES,
             decoder="dab", class_loss="focal")


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(**settings) -> DenoisingDETR:
    "A small model that learns; its box heads do not begin at zero, so that copies could be told from each other."
    torch.manual_seed(0)
    model = build_model(PRESETS["shapes"].but(**SMALL | settings), CLASSES).train()
    for name, module in model.named_modules():
        if name in ("bbox_embed", "enc_bbox_embed"):
            torch.nn.init.normal_(module.layers[-1].weight, std=0.1)
    return model


def targets_of(counts: list[int], seed: int = 0) -> Targets:
    return make_targets(counts, torch.get_default_dtype(), CLASSES, seed)


def begin(model: DenoisingDETR, targets: Targets):
    "What the decoder begins with, for images of six cells."
    width, images = model.transformer.decoder.width, len(targets.counts)
    return model.begin(torch.randn(images, 6, width), torch.zeros(images, width, 2, 3), None, targets)


def draw_from(monkeypatch, tables: dict[str, Tensor]) -> None:
    "Let every draw of torch give what is in the tables: for boxes those with four columns, for labels the others."
    def give(name: str, shape, dtype=None) -> Tensor:
        found = tables[f"{name}, boxes" if len(shape) == 3 else f"{name}, labels"]
        assert found.shape == tuple(shape)
        return found.to(dtype or found.dtype)

    monkeypatch.setattr(torch, "rand", lambda shape, **_: give("rand", shape))
    monkeypatch.setattr(torch, "rand_like", lambda x, dtype=None, **_: give("rand", x.shape, dtype))
    monkeypatch.setattr(torch, "randint_like", lambda x, *_, dtype=None: give("randint", x.shape, dtype or x.dtype))


def draws(images: int, places: int) -> dict[str, Tensor]:
    "Random numbers for each image and place."
    return {"rand, labels": torch.rand(images, places), "randint, labels": torch.randint(CLASSES, (images, places)),
            "rand, boxes": torch.rand(images, places, 4), "randint, boxes": torch.randint(2, (images, places, 4))}


@pytest.mark.parametrize("counts", [[3, 3], [1], [4], [10], [7, 7, 7]], ids=str)
def test_copies_are_those_of_rt_detr(ledger, in_float64, monkeypatch, counts):
    "Of images with as many objects each; ours need not pad, so an image among others gets what it gets alone."
    from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

    places, objects, targets = 10, counts[0], targets_of(counts)
    model = build(denoising=places, dn_label_noise=0.9)
    tables = draws(len(counts), 2 * places)
    draw_from(monkeypatch, tables)
    ours = begin(model, targets)
    groups = places // objects
    theirs = torch.arange(2 * objects * groups)  # place by place: ours have all positives first, theirs group by group
    group, rest = theirs // (2 * objects), theirs % (2 * objects)
    order = torch.where(rest < objects, 0, places) + group * objects + rest % objects
    draw_from(monkeypatch, {name: table[:, order] for name, table in tables.items()})
    content, boxes, mask, told = get_contrastive_denoising_training_group(
        list_targets(targets, "class_labels"), CLASSES, QUERIES,
        lambda labels: F.pad(model.label_embed(labels), (0, 1), value=1.0), places, 0.9, 1.0)
    reference, (height, _) = ledgers.TRANSFORMERS, mask.shape
    ledger.compare("denoising, labels and boxes", [ours.extra["content"][:, order], ours.queries[:, order].sigmoid()],
                   [content, boxes.sigmoid().clamp(0.01, 0.99)], reference)
    every = torch.cat([order, 2 * places + torch.arange(QUERIES)])
    heard = ours.extra["heard"][:, 0][:, every][:, :, every]
    ledger.compare("denoising, mask and places", heard.double(), (mask == 0).double().expand(len(counts), -1, -1),
                   reference)
    assert height == 2 * objects * groups + QUERIES == told["dn_num_split"][0] + QUERIES
    first = 0
    for image, found in enumerate(told["dn_positive_idx"]):
        used = ours.copies.group[image] >= 0
        ledger.compare("denoising, mask and places", used.nonzero()[:, 0].double(), order[found].double(), reference)
        assert ours.copies.target[image, used].tolist() == [*range(first, first + objects)] * groups
        assert torch.allclose(ours.copies.weight[image, used], torch.tensor(1 / groups))
        first += objects


def test_plain_copies_are_those_of_dn_detr(ledger, in_float64, monkeypatch):
    "Li et al. 2022's released code: the centre by half a side, a side by all of it; labels at their full share."
    targets, tables = targets_of([3, 0, 2]), draws(3, 8)
    model = build(denoising=8, dn_groups=2, dn_noise="plain", dn_label_noise=0.2, dn_box_noise=0.4)
    draw_from(monkeypatch, tables)
    ours, first = begin(model, targets), [0, 3, 3]
    for image, count in enumerate([3, 0, 2]):
        for place in range(8):
            group = place // count if count and place < 2 * count else -1
            assert ours.copies.group[image, place] == group
            if group < 0:
                assert ours.copies.weight[image, place] == 0 and ours.copies.target[image, place] == 5
                continue
            target = first[image] + place % count
            assert ours.copies.target[image, place] == target and ours.copies.weight[image, place] == 1 / 2
            label = targets.labels[target]
            if tables["rand, labels"][image, place] < 0.2:
                label = tables["randint, labels"][image, place]
            cx, cy, w, h = targets.boxes[target].tolist()
            reach = torch.tensor([w / 2, h / 2, w, h])
            box = targets.boxes[target] + (2 * tables["rand, boxes"][image, place] - 1) * reach * 0.4
            content = torch.cat([model.label_embed.weight[label], torch.ones(1)])
            ledger.compare("denoising, labels and boxes", [ours.extra["content"][image, place],
                                                           ours.queries[image, place].sigmoid()],
                           [content, box.clamp(0.01, 0.99)], ledgers.PLAIN)
    unknown = torch.cat([model.label_embed.weight[-1], torch.zeros(1)])  # a row that no class has
    assert len(model.label_embed.weight) == CLASSES + 1
    assert torch.equal(ours.extra["content"][:, 8:], unknown.expand(3, QUERIES, -1))


def class_loss(name: str, logits: Tensor, label: int | None, overlap: Tensor) -> Tensor:
    "Of one copy, with its class or without any, in plain logarithms."
    if name == "ce":
        return -logits.log_softmax(-1)[CLASSES if label is None else label] * (0.1 if label is None else 1)
    total = torch.zeros(())
    for place, logit in enumerate(logits):
        p, there = logit.sigmoid(), place == label
        if name == "focal":
            total += -0.25 * (1 - p) ** 2 * p.log() if there else -0.75 * p**2 * (1 - p).log()
            continue
        power, scale = {"ia_bce": (2, 1), "vfl": (2, 0.75), "mal": (1.5, 1)}[name]
        if not there:
            weight = p if name == "ia_bce" else p.detach()
            total += -scale * weight**power * (1 - p).log()
            continue
        t = {"ia_bce": (p.detach() ** 0.25 * overlap**0.75).clamp(min=0.01), "vfl": overlap, "mal": overlap**1.5}[name]
        total += (t if name == "vfl" else 1) * -(t * p.log() + (1 - t) * (1 - p).log())
    return total


@pytest.mark.parametrize("kind", ["contrastive", "plain"])
@pytest.mark.parametrize("name", ["ce", "focal", "ia_bce", "vfl", "mal"])
def test_losses_and_gradients_of_copies_are_those_of_a_loop(ledger, in_float64, name, kind):
    "Image by image, group by group; the middle image has no object, the last one more than there are places."
    places, counts, groups = 7, [3, 0, 9], [2, 0, 1]
    targets, generator = targets_of(counts), torch.Generator().manual_seed(1)
    copies, number = lay_out(targets, places), places * (2 if kind == "contrastive" else 1)
    logits = torch.randn(2, 3, number, CLASSES + (name == "ce"), generator=generator).requires_grad_()
    boxes = (0.2 + 0.5 * torch.rand(2, 3, number, 4, generator=generator)).requires_grad_()
    config = PRESETS["shapes"].but(**SMALL | {"class_loss": name}, denoising=places, dn_noise=kind)
    criterion = build_criterion(config, CLASSES)
    matched = Predictions(torch.randn(2, 3, QUERIES, logits.shape[-1]), torch.rand(2, 3, QUERIES, 4),
                          sigmoid=name != "ce", denoised=denoising.Denoised(logits, boxes, copies))
    found = criterion(matched, targets)
    plain, bounds = {}, [0, 3, 3, 12]
    for layer in range(2):
        sums = dict.fromkeys(("loss_ce", "loss_bbox", "loss_giou"), 0.0)
        for image, count in enumerate(counts):
            size = min(count, places)
            for place in range(groups[image] * size):
                target = bounds[image] + place % size
                box, wanted = boxes[layer, image, place], targets.boxes[target]
                corners = (box_convert(x[None], "cxcywh", "xyxy") for x in (box, wanted))
                ours, true = corners
                overlap = box_iou(ours.detach(), true)[0, 0]
                parts = {"loss_ce": class_loss(name, logits[layer, image, place], int(targets.labels[target]), overlap),
                         "loss_bbox": (box - wanted).abs().sum(),
                         "loss_giou": 1 - generalized_box_iou(ours, true)[0, 0]}
                if kind == "contrastive":
                    parts["loss_ce"] = parts["loss_ce"] + class_loss(name, logits[layer, image, places + place], None,
                                                                     overlap)
                for key, value in parts.items():
                    sums[key] = sums[key] + value / groups[image] / 12  # objects in the batch
        plain |= {f"{key}_dn" + ("_0" if layer == 0 else ""): value for key, value in sums.items()}
    keys = sorted(plain)
    assert keys == sorted(key for key in found if "_dn" in key)
    ledger.compare("denoising, losses", torch.stack([found[key] for key in keys]),
                   torch.stack([plain[key] for key in keys]), ledgers.PLAIN)
    weights = {"loss_ce": 1, "loss_bbox": 3, "loss_giou": 1.2}
    ours = torch.autograd.grad(criterion.total(found), (logits, boxes))
    theirs = torch.autograd.grad(sum(weights[key.split("_dn")[0]] * value for key, value in plain.items()),
                                 (logits, boxes))
    ledger.compare("denoising, gradients", ours, theirs, ledgers.PLAIN)
    last = criterion(matched.last_layer(), targets)  # as with --no_aux_loss
    assert [key for key in last if "_dn" in key] == ["loss_ce_dn", "loss_bbox_dn", "loss_giou_dn"]
    assert last["loss_giou_dn"] == found["loss_giou_dn"] and "loss_ce_dn" in criterion.named_for_log(found)


VARIANTS = {
    "anchors": dict(), "plain": dict(dn_noise="plain", dn_groups=2), "ce": dict(class_loss="ce"),
    "all": dict(query_groups=3, box_bias="rpb", two_stage=True, repeat_proposals=2, class_loss="ia_bce"),
    "gauss": dict(query_groups=2, box_bias="gauss", class_loss="mal"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_queries_do_not_hear_copies(in_float64, name):
    "Whatever copies there are, and whether there are any: what the queries answer is the same, in all layers."
    model, images = build(denoising=9, **VARIANTS[name]), torch.randn(IMAGES)
    padding = torch.zeros(3, *IMAGES[2:], dtype=torch.bool)
    padding[1, 32:] = True
    with torch.no_grad():
        alone = model(images, padding)
        for counts, seed in (([3, 1, 2], 0), ([3, 1, 2], 1), ([0, 12, 4], 0), ([0, 0, 0], 0)):
            found = model(images, padding, targets=targets_of(counts, seed))
            assert torch.allclose(found.logits, alone.logits, atol=1e-12, rtol=0)
            assert torch.allclose(found.boxes, alone.boxes, atol=1e-12, rtol=0)
            assert found.groups == alone.groups and found.denoised.logits.isfinite().all()


def test_copies_hear_their_own_group_and_the_first_queries(in_float64):
    "By the gradient of an answer: it is zero with respect to everything that is not heard."
    model, targets = build(denoising=4, query_groups=2), targets_of([2])
    first, memory = begin(model, targets), torch.randn(1, 6, 32)
    content = first.extra["content"].detach().requires_grad_()
    extra = first.extra | {"content": content}
    slots, _ = model.transformer.decoder(first.queries, memory, torch.randn(1, 6, 32), None, first.groups, **extra)
    parts = {"group 0": [0, 1, 4, 5], "group 1": [2, 3, 6, 7], "first queries": [*range(8, 14)],
             "second queries": [*range(14, 20)]}
    hears = {"group 0": {"group 0", "first queries"}, "group 1": {"group 1", "first queries"},
             "first queries": {"first queries"}, "second queries": {"second queries"}}
    for who, rows in parts.items():
        (slope,) = torch.autograd.grad(slots[:, :, rows].square().sum(), content, retain_graph=True)
        assert {name for name, places in parts.items() if slope[0, places].abs().max() > 0} == hears[who]


def test_an_open_mask_would_be_noticed(in_float64):
    "The two tests above can fail: without the mask, queries hear copies."
    model, images = build(denoising=4), torch.randn(IMAGES)
    closed = denoising.who_hears_whom
    with torch.no_grad():
        alone = model(images)
        try:
            denoising.who_hears_whom = lambda *parts: torch.ones_like(closed(*parts))
            found = model(images, targets=targets_of([3, 1, 2]))
        finally:
            denoising.who_hears_whom = closed
    assert (found.logits - alone.logits).abs().max() > 1e-3


def test_an_image_gets_the_same_copies_whatever_else_is_in_the_batch(in_float64):
    "Without noise, what is answered for copies; so two processes are one, and batches can be accumulated."
    settings = dict(denoising=6, dn_label_noise=0.0, dn_box_noise=0.0, query_groups=2, two_stage=True)
    model, images, targets = build(**settings), torch.randn(IMAGES), targets_of([4, 0, 1])
    with torch.no_grad():
        whole = model(images, targets=targets).denoised
        for image, (start, end) in enumerate(((0, 4), (4, 4), (4, 5))):
            own = Targets(targets.labels[start:end], targets.boxes[start:end],
                          *(x[[image]] for x in targets[2:6]))
            alone = model(images[[image]], targets=own).denoised
            used = alone.copies.weight[0].repeat(2) > 0
            assert torch.equal(alone.copies.weight[0], whole.copies.weight[image])
            assert torch.allclose(alone.boxes[:, 0, used], whole.boxes[:, image, used], atol=1e-12)
            assert torch.allclose(alone.logits[:, 0, used], whole.logits[:, image, used], atol=1e-12)


def test_accumulated_batches_are_one_batch(in_float64):
    config = PRESETS["shapes"].but(**SMALL, denoising=6, dn_label_noise=0.0, dn_box_noise=0.0, clip_max_norm=0.0)
    images, targets = torch.randn(IMAGES), targets_of([4, 0, 1])
    parts = [Targets(targets.labels[a:b], targets.boxes[a:b], *(x[c:d] for x in targets[2:6]))
             for a, b, c, d in ((0, 4, 0, 2), (4, 5, 2, 3))]
    batches = {"one": [Batch(images, None, targets)],
               "two": [Batch(images[:2], None, parts[0]), Batch(images[2:], None, parts[1])]}
    accelerator, found = Accelerator(cpu=True), {}
    for name, those in batches.items():
        model, criterion = build(denoising=6, dn_label_noise=0.0, dn_box_noise=0.0), build_criterion(config, CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses, norm = train_step(model, criterion, optimizer, accelerator, those, config)
        found[name] = torch.tensor([float(losses["loss_giou_dn"]), float(losses["loss"]), norm])
    assert torch.allclose(found["one"], found["two"], rtol=1e-10) and found["one"][0] > 0


@pytest.mark.parametrize("counts", [[2, 0, 0], [0, 0, 0]], ids=str)
def test_images_without_objects_teach_nothing_and_stop_nothing(counts):
    model, criterion = build(denoising=5, **VARIANTS["all"]), build_criterion(
        PRESETS["shapes"].but(**SMALL | VARIANTS["all"], denoising=5), CLASSES)
    targets = targets_of(counts)
    losses = criterion(model(torch.randn(IMAGES), targets=targets), targets)
    criterion.total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (losses["loss_ce_dn"] > 0) == (losses["loss_bbox_dn"] > 0) == (sum(counts) > 0)
    assert bool(model.label_embed.weight.grad.any()) == (sum(counts) > 0)


def test_the_middle_of_an_evaluation_has_no_copies():
    model, images = build(denoising=5), torch.randn(IMAGES)
    with torch.no_grad():
        answers = model.eval()(images)
    assert answers.denoised is None and answers.logits.shape[2] == QUERIES


def test_half_precision_keeps_boxes_precise():
    model = build(denoising=5, **VARIANTS["all"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(torch.randn(IMAGES), targets=targets_of([2, 1, 0])).denoised
    assert found.boxes.dtype == found.logits.dtype == torch.float32 and found.boxes.isfinite().all()


@pytest.mark.parametrize("settings, message", [
    (dict(decoder="detr", class_loss="ce"), "needs --decoder dab"), (dict(decoder="conditional"), "are no boxes")])
def test_queries_that_are_no_boxes_cannot_be_copies(settings, message):
    with pytest.raises(UserError, match="--denoising.*" + message):
        build_model(PRESETS["shapes"].but(**SMALL | settings, denoising=10), CLASSES)


def test_masks_are_learned_without_copies():
    with pytest.raises(UserError, match="--denoising 0"):
        check_settings(PRESETS["shapes"].but(decoder="dab", denoising=10, masks=True))


def test_the_preset_has_the_papers_settings():
    model, usual = PRESETS["dn"].model, PRESETS["dab"].model
    assert (model.dn_groups, model.dn_noise, model.dn_label_noise, model.dn_box_noise) == (5, "plain", 0.2, 0.4)
    assert PRESETS["dn"].but(denoising=0, dn_groups=0, dn_noise="contrastive", dn_label_noise=0.5,
                             dn_box_noise=1.0).model == usual


def test_a_resumed_run_draws_the_noise_that_it_would_have_drawn(here, tmp_path):  # noqa: F811
    "With a running mean of the weights; and copies differ from step to step and from seed to seed."
    shapes = write_shapes(tmp_path / "shapes", num_train=16, num_val=4, num_workers=1)
    few = [*SMALL_RUN, "--shapes_path", shapes, "--pretrain_epochs", 0, "--optimizer", "adamw", "--batch_size", 8,
           "--num_threads", 1, "--ema", 0.9, "--decoder", "dab", "--class_loss", "focal", "--denoising", 8,
           "--schedule", "step"]
    here(*few, "--epochs", 2, "--output_dir", tmp_path / "whole")
    here(*few, "--epochs", 1, "--output_dir", tmp_path / "first")
    here(*few, "--epochs", 2, "--resume", tmp_path / "first/checkpoint.pth", "--output_dir", tmp_path / "second")
    here(*few, "--epochs", 1, "--output_dir", tmp_path / "other", "--seed", 7)
    lines = {name: [line["loss_giou_dn"] for line in steps(tmp_path / name)]
             for name in ("whole", "first", "second", "other")}
    assert lines["whole"] == lines["first"] + lines["second"][-2:] and len(set(lines["whole"])) == 4
    assert lines["other"][0] != lines["first"][0]
    log = [json.loads(line) for line in (tmp_path / "whole/log.txt").read_text().splitlines()]
    assert math.isfinite(log[-1]["train_loss_bbox_dn_0"]) and "test_loss_bbox_dn_0" not in log[-1]
