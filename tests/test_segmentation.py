"""Masks: the model's parts and promises, the losses, and mask evaluation in one and in two processes."""
import json
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from book_demos import spawn
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detr_nb.batching import Batch, Targets, make_loader
from detr_nb.coco import CocoDataset
from detr_nb.detr import Predictions, build_detr
from detr_nb.distributed import Process, UserError
from detr_nb.evaluation import evaluate
from detr_nb.matcher import Matches, match
from detr_nb.segmentation import (
    AttentionMaps,
    MaskCriterion,
    MaskEvaluator,
    SegmentationDETR,
    build_segmentation,
    encode_masks,
    likely_objects,
    mask_losses,
    postprocess_masks,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools, NumPy 2
    pytest.mark.filterwarnings("ignore:resnet.* has random weights"),
]
TINY = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32, num_queries=6)


def make_model(freeze: bool = False, seed: int = 0, **settings) -> SegmentationDETR:
    torch.manual_seed(seed)
    return build_segmentation(build_detr(3, **{"backbone": "small", **TINY, **settings}), freeze)


def make_batch(counts: list[int], size: tuple[int, int] = (48, 64)) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(sum(counts))
    total, (height, width) = sum(counts), size
    boxes = torch.rand(total, 4, generator=generator) * 0.4 + 0.2
    masks = torch.rand(total, height, width, generator=generator) > 0.5
    sizes = torch.tensor([[height, width]]).expand(len(counts), 2)
    targets = Targets(torch.randint(3, (total,), generator=generator), boxes, torch.tensor(counts),
                      torch.arange(len(counts)), sizes, sizes, masks)
    return torch.randn(len(counts), 3, height, width, generator=generator), targets


# The model


def released_head(width: int, heads: int, channels: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    "Names and shapes of the released code's attention maps and mask head, written down from its description."
    widths = [width + heads, width + heads, width // 2, width // 4, width // 8, width // 16]
    shapes = {f"bbox_attention.{x}_linear.{kind}": (width,) * (2 if kind == "weight" else 1)
              for x in "qk" for kind in ("weight", "bias")}
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:]), start=1):
        shapes |= {f"mask_head.lay{number}.weight": (outputs, inputs, 3, 3), f"mask_head.lay{number}.bias": (outputs,),
                   f"mask_head.gn{number}.weight": (outputs,), f"mask_head.gn{number}.bias": (outputs,)}
    shapes |= {"mask_head.out_lay.weight": (1, widths[-1], 3, 3), "mask_head.out_lay.bias": (1,)}
    for number, (inputs, outputs) in enumerate(zip(channels, widths[2:]), start=1):
        shapes |= {f"mask_head.adapter{number}.weight": (outputs, inputs, 1, 1),
                   f"mask_head.adapter{number}.bias": (outputs,)}
    return shapes


@pytest.mark.parametrize("depth, channels", [(18, (256, 128, 64)), (50, (1024, 512, 256)), (101, (1024, 512, 256))])
def test_the_released_names_and_shapes(depth: int, channels: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = build_segmentation(build_detr(250, f"resnet{depth}", pretrained=None))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = {name: shape for name, shape in shapes.items() if not name.startswith("detr.")}
    assert head == released_head(256, 8, channels)
    assert shapes.keys() - head.keys() == {f"detr.{name}" for name in model.detr.state_dict()}
    assert [model.mask_head.get_submodule(f"gn{k}").num_groups for k in range(1, 6)] == [8] * 5


@pytest.mark.parametrize("backbone, dilation, stride", [
    ("resnet18", False, 4), ("resnet34", False, 4), ("resnet50", False, 4), ("resnet50", True, 4),
    ("resnet101", True, 4), ("small", False, 2)])
def test_every_backbone(backbone: str, dilation: bool, stride: int) -> None:
    "Also sizes that no stride divides, padded or not: masks at the size of the backbone's finest map."
    model = make_model(backbone=backbone, dilation=dilation).eval()
    padding = torch.zeros(2, 45, 71, dtype=torch.bool)
    padding[1, 30:] = True
    images = torch.randn(2, 3, 45, 71)
    for mask in (None, padding):
        with torch.no_grad():
            found, detected = model(images, mask), model.detr(images, mask)
        assert found.masks.shape == (2, 6, -(-45 // stride), -(-71 // stride)) and found.masks.isfinite().all()
        assert found.logits.shape == (2, 2, 6, 4) and detected.masks is None
        assert torch.equal(found.logits, detected.logits) and torch.equal(found.boxes, detected.boxes)  # as before


def test_a_backbone_without_four_maps_is_refused() -> None:
    model = build_detr(3, **{**TINY, "backbone": "small"})
    model.backbone.channels = model.backbone.channels[:2]
    with pytest.raises(UserError, match="four maps"):
        build_segmentation(model)
    with pytest.raises(UserError, match="by 16, got hidden_dim=40"):
        make_model(hidden_dim=40)


def test_attention_maps_by_loop() -> None:
    "One softmax over heads and cells together; padded cells get nothing; an image of padding alone stays finite."
    torch.manual_seed(0)
    maps, queries, memory = AttentionMaps(8, 2), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    padding = torch.tensor([[False, False, True, False, True], [True] * 5])
    found = maps(queries, memory, padding)
    scores = torch.stack([
        torch.stack([maps.k_linear(memory[0, cell])[part] @ maps.q_linear(queries[0, 1])[part] / 2
                     for part in (slice(0, 4), slice(4, 8))]) for cell in (0, 1, 3)], dim=-1)
    torch.testing.assert_close(found[0, 1][:, [0, 1, 3]], scores.flatten().softmax(0).view(2, 3))
    assert found[0, :, :, [2, 4]].abs().max() == 0 and found[1].isfinite().all()
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(2, 3))


def test_the_mask_head_as_the_released_code_runs_it() -> None:
    "All features repeated for every query and put beside its attention, in plain torch."
    model, images = make_model().double().eval(), torch.randn(2, 3, 48, 64, dtype=torch.float64)
    head, detr = model.mask_head, model.detr
    with torch.no_grad():
        features = detr.backbone(images)
        projected = detr.input_proj(features.maps[-1])
        decoded, memory = detr.attend(projected)
        attention = model.bbox_attention(decoded.slots[-1], memory).unflatten(-1, projected.shape[-2:])
        x = torch.cat([projected.repeat_interleave(6, 0), attention.flatten(0, 1)], dim=1)
        x = head.gn1(head.lay1(x)).relu()
        x = head.gn2(head.lay2(x)).relu()
        for number, finer in zip((3, 4, 5), features.maps[2::-1]):
            finer = head.get_submodule(f"adapter{number - 2}")(finer).repeat_interleave(6, 0)
            x = finer + F.interpolate(x, finer.shape[-2:], mode="nearest")
            x = head.get_submodule(f"gn{number}")(head.get_submodule(f"lay{number}")(x)).relu()
        expected = head.out_lay(x).view(2, 6, *x.shape[-2:])
        torch.testing.assert_close(model(images).masks, expected)


# Which queries get a mask


def test_masks_of_kept_queries_only() -> None:
    "Also when they are painted in portions."
    model, images = make_model().eval(), torch.randn(3, 3, 48, 64)
    kept = torch.rand(3, 6) > 0.5
    with torch.no_grad():
        every, some = model(images), model(images, keep=lambda predictions: kept)
        none = model(images, keep=lambda predictions: torch.zeros(3, 6, dtype=torch.bool))
    torch.testing.assert_close(some.masks[kept], every.masks[kept], rtol=1e-5, atol=1e-6)
    assert some.masks[~kept].abs().max() == 0 and none.masks.abs().max() == 0
    assert none.masks.shape == every.masks.shape
    model.at_once = 5
    with torch.no_grad():
        torch.testing.assert_close(model(images).masks, every.masks, rtol=1e-5, atol=1e-6)


def test_likely_objects() -> None:
    logits = torch.full((2, 1, 3, 4), -9.0)
    logits[0, 0, 0, 0] = logits[1, 0, 1, 2] = logits[1, 0, 2, 3] = logits[1, 0, 0, 3] = 9
    predictions = Predictions(logits, torch.rand(2, 1, 3, 4))
    assert likely_objects(predictions).tolist() == [[False, True, False]]  # an object by the last layer alone
    assert likely_objects(predictions, 1.0).tolist() == [[False] * 3]


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [6], [8, 1]], ids=str)
@pytest.mark.filterwarnings("ignore:image 0 has 8 objects")
def test_the_gradient_needs_only_the_matched_queries(counts: list[int]) -> None:
    "The same losses and gradients as with the masks of all queries; every weight has a gradient, also without objects."
    model, (images, targets) = make_model(dropout=0).train(), make_batch(counts)
    criterion = MaskCriterion(3)

    def learn(keep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        losses = criterion(model(images, keep=keep), targets)
        criterion.total(losses).backward()
        return losses, {name: weight.grad for name, weight in model.named_parameters()}

    losses, every = learn(None)
    same_losses, matched = learn(partial(criterion.matched_queries, targets=targets))
    torch.testing.assert_close(same_losses, losses, rtol=1e-5, atol=1e-6)
    assert None not in every.values() and None not in matched.values()
    torch.testing.assert_close(matched, every, rtol=1e-4, atol=1e-6)


def saved_bytes(function) -> int:
    "What autograd keeps for the backward pass, each storage once."
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(seen.values())


def test_matched_queries_save_memory() -> None:
    "3 of 100 queries: what is kept for the backward pass shrinks with them, and a frozen detector keeps nothing."
    model, (images, targets) = make_model(freeze=True, num_queries=100).train(), make_batch([3])
    keep = partial(MaskCriterion(3).matched_queries, targets=targets)
    every, matched = (saved_bytes(lambda keep=keep: model(images, keep=keep).masks) for keep in (None, keep))
    weights = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert matched - weights < (every - weights) / 8


# Frozen weights


def test_frozen_weights_stay() -> None:
    "No gradient, no optimizer state, no dropout, no batch statistics, and not a bit of the detector changes."
    model = make_model(freeze=True, backbone="resnet18", norm="batch", dropout=0.5).train()
    assert not any(module.training for module in model.detr.modules()) and model.mask_head.training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(learning) == 32 and not any(weight.requires_grad for weight in model.detr.parameters())
    optimizer, (images, targets) = torch.optim.AdamW(learning, lr=1e-2), make_batch([2, 1])
    for _ in range(2):
        optimizer.zero_grad()
        criterion = MaskCriterion(3)
        criterion.total(criterion(model(images), targets)).backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("detr.")}
    assert all(weight.grad is None for weight in model.detr.parameters())
    with torch.no_grad():
        assert torch.equal(model(images).logits, model.eval()(images).logits)


def test_not_frozen_everything_learns() -> None:
    model, (images, targets) = make_model(dropout=0.5).train(), make_batch([2, 1])
    assert all(module.training for module in model.modules())
    losses = MaskCriterion(3)(model(images), targets)
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert {name.split(".")[1] for name in without} <= {"class_embed", "bbox_embed"}  # masks alone do not reach those


def test_half_precision() -> None:
    model, images = make_model().eval(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        single = model(images).masks
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images).masks
        assert half.dtype == torch.float32 and (half - single).abs().mean() < 0.1 * single.std()
        assert model.double()(images.double()).masks.dtype == torch.float64


# Losses


def loop_losses(masks: Tensor, targets: Targets, matches: Matches) -> tuple[float, float]:
    "Pixel by pixel in float64, from the formulas; only enlarging is torch's."
    focal, dice = 0.0, 0.0
    canvas = targets.masks.shape[-2:]
    for image, query, target in zip(*(index.tolist() for index in matches[1:])):
        large = F.interpolate(masks[image, query][None, None].double(), canvas, mode="bilinear")[0, 0]
        height, width = targets.sizes[image].tolist()
        terms, overlap, areas = [], 0.0, 0.0
        for row in range(height):
            for column in range(width):
                p, true = float(large[row, column].sigmoid()), int(targets.masks[target, row, column])
                right = p if true else 1 - p
                terms.append((0.25 if true else 0.75) * (1 - right) ** 2 * -np.log(right))
                overlap, areas = overlap + p * true, areas + p + true
        focal += np.mean(terms)
        dice += 1 - (2 * overlap + 1) / (areas + 1)
    return focal, dice


def test_mask_losses_by_loop() -> None:
    "Images of two sizes on one canvas."
    _, targets = make_batch([2, 1], (10, 14))
    targets = targets._replace(sizes=torch.tensor([[10, 9], [7, 14]]))
    targets.masks[:2, :, 9:], targets.masks[2, 7:] = False, False
    predictions = Predictions(torch.randn(1, 2, 4, 4), torch.rand(1, 2, 4, 4), 2 * torch.randn(2, 4, 3, 4))
    matches = match(predictions, targets)
    found = mask_losses(predictions.masks, targets, matches)
    torch.testing.assert_close(found.tolist(), list(loop_losses(predictions.masks, targets, matches)),
                               rtol=1e-5, atol=1e-6)


def test_what_is_painted_on_padding_does_not_count() -> None:
    _, targets = make_batch([2], (16, 16))
    wide = targets._replace(masks=F.pad(targets.masks, (0, 16)))
    matches = Matches(*torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1]]))
    masks = torch.randn(1, 3, 16, 32)
    other = masks.clone()
    other[..., 16:] += 5 * torch.randn(1, 3, 16, 16)
    assert torch.equal(mask_losses(masks, wide, matches), mask_losses(other, wide, matches))
    torch.testing.assert_close(mask_losses(masks, wide, matches), mask_losses(masks[..., :16], targets, matches))


def test_mask_losses_share_the_divisor_of_boxes() -> None:
    "Two halves with the number of boxes of both give the loss of the whole; only the last layer has masks."
    _, targets = make_batch([1, 3])
    predictions = Predictions(torch.randn(2, 2, 5, 4), torch.rand(2, 2, 5, 4), torch.randn(2, 5, 6, 8))
    criterion = MaskCriterion(3, mask_loss_coef=2, dice_loss_coef=3)
    whole = criterion(predictions, targets)
    assert {"loss_mask", "loss_dice"} <= whole.keys() and "loss_mask_0" not in whole
    divisors, parts = criterion.normalizers(targets.counts, 5), []
    for image, objects in ((0, slice(0, 1)), (1, slice(1, 4))):
        own = Targets(targets.labels[objects], targets.boxes[objects], *(x[[image]] for x in targets[2:6]),
                      targets.masks[objects])
        part = Predictions(*(x[:, [image]] for x in predictions[:2]), predictions.masks[[image]])
        parts.append(criterion(part, own, divisors))
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    without = criterion.total({name: value for name, value in whole.items() if name not in ("loss_mask", "loss_dice")})
    torch.testing.assert_close(criterion.total(whole) - without, 2 * whole["loss_mask"] + 3 * whole["loss_dice"])


def test_masks_without_true_masks_are_refused(folder: Path) -> None:
    _, targets = make_batch([1])
    predictions = Predictions(torch.randn(1, 1, 5, 4), torch.rand(1, 1, 5, 4), torch.randn(1, 5, 6, 8))
    with pytest.raises(UserError, match="with_masks=True"):
        MaskCriterion(3)(predictions, targets._replace(masks=None))
    with pytest.raises(UserError, match="with_masks=True"):
        MaskEvaluator(CocoDataset(folder, folder / "annotations.json"))


# Results and evaluation


def test_masks_in_pixels_of_the_original_image() -> None:
    "Half of the image is object, and what lies on padding does not come along."
    masks = torch.full((2, 8, 12), -5.0)
    masks[0, :, :4], masks[:, :, 8:] = 5, 5  # left half of an image of 32 x 32 pixels on a canvas of 32 x 48
    found = postprocess_masks(masks, (32, 48), (32, 32), (100, 60))
    assert found.shape == (2, 100, 60) and found.dtype == torch.bool
    assert found[0, :, :29].all() and not found[0, :, 31:55].any()
    assert not found[1, :, :55].any()


def test_run_lengths() -> None:
    masks = torch.rand(4, 13, 7) > 0.5
    masks[1], masks[2] = False, True
    codes = [{"size": [13, 7], "counts": code} for code in encode_masks(masks)]
    assert all(np.array_equal(run_length.decode(code), mask) for code, mask in zip(codes, masks.numpy()))
    assert encode_masks(masks[:0]) == []


CATEGORY_IDS = (3, 5, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Seven images of 40 x 60 pixels with up to three L-shaped objects each."
    root, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(7):
        Image.new("RGB", (60, 40)).save(root / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": 40, "width": 60})
        for _ in range(number % 4):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 20, 2), *rng.integers(8, 20, 2)))
            corner = [x, y, x + w, y, x + w, y + h // 2, x + w // 2, y + h // 2, x + w // 2, y + h, x, y + h]
            annotations.append({"id": len(annotations) + 1, "image_id": 100 + number, "bbox": [x, y, w, h],
                                "area": 0.75 * w * h, "category_id": int(rng.choice(CATEGORY_IDS)), "iscrowd": 0,
                                "segmentation": [corner]})
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": k, "name": f"class {k}"} for k in CATEGORY_IDS]}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def load(folder: Path) -> CocoDataset:
    return CocoDataset(folder, folder / "annotations.json", with_masks=True)


def perfect_answer(batch: Batch, grow: int = 0) -> Predictions:
    "What a model would say that knows the annotations; its masks too large by `grow` pixels on every side."
    targets, (height, width) = batch.targets, batch.images.shape[-2:]
    logits, boxes = torch.zeros(1, len(targets.counts), 4, 4), torch.full((1, len(targets.counts), 4, 4), 0.5)
    masks = torch.full((len(targets.counts), 4, height, width), -9.0)
    logits[..., -1] = 9
    start = 0
    for image, count in enumerate(targets.counts.tolist()):
        own = slice(start, start + count)
        logits[0, image, range(count), -1], logits[0, image, range(count), targets.labels[own]] = 0, 9
        boxes[0, image, :count] = targets.boxes[own]
        wide = F.max_pool2d(targets.masks[own].float()[:, None], 2 * grow + 1, 1, grow)[:, 0] if count else masks[0, :0]
        masks[image, :count] = 18 * wide - 9
        start += count
    return Predictions(logits, boxes, masks)


def score(process: Process | None, folder: Path, grow: int, repeat: bool = False) -> dict:
    "Evaluate this process's share of the images."
    dataset = load(folder)
    evaluator = MaskEvaluator(dataset)
    rank, size = (process.rank, process.world_size) if process else (0, 1)
    loader = make_loader(dataset, 2, rank=rank, world_size=size, shuffle=False, num_workers=0)
    for batch in [*loader] * (2 if repeat else 1):
        evaluator.update(batch.targets.image_ids, evaluator.detect(perfect_answer(batch, grow), batch.targets))
    return evaluator.compute()


def test_masks_and_boxes_are_scored_apart(folder: Path) -> None:
    "Perfect masks score one; masks that are too large cost mask AP alone."
    perfect, result = score(None, folder, grow=0), score(None, folder, grow=1)
    assert perfect["coco_eval_masks"][:3] == [1, 1, 1] and perfect["coco_eval_bbox"][0] == 1 and perfect["images"] == 7
    assert result["coco_eval_bbox"][0] == 1 and 0 < result["coco_eval_masks"][0] < 1
    dataset = load(folder)
    scores = []
    for batch in make_loader(dataset, 1, shuffle=False, num_workers=0):
        answer = perfect_answer(batch, 1)
        for target in range(int(batch.targets.counts.sum())):
            own = run_length.encode(np.asfortranarray(answer.masks[0, target].numpy() > 0, dtype=np.uint8))
            true = run_length.encode(np.asfortranarray(batch.targets.masks[target].numpy(), dtype=np.uint8))
            scores.append(run_length.iou([own], [true], [0])[0, 0])
    assert 0.5 < min(scores) < 0.95  # so the overlaps lie between COCO's thresholds


def test_two_processes_score_as_one(folder: Path) -> None:
    alone = score(None, folder, 1)
    assert score(None, folder, 1, repeat=True) == alone  # an image that comes twice counts once
    for other in spawn(score, 2, folder, 1):
        assert other["images"] == alone["images"]
        for name in ("coco_eval_bbox", "coco_eval_masks"):
            assert other[name] == pytest.approx(alone[name], abs=1e-3)


def test_an_evaluator_forgets(folder: Path) -> None:
    dataset = load(folder)
    evaluator, batch = MaskEvaluator(dataset), next(iter(make_loader(dataset, 7, shuffle=False, num_workers=0)))
    found, results = [evaluator.detect(perfect_answer(batch, grow), batch.targets) for grow in (0, 3)], []
    for _ in range(2):
        evaluator.update(batch.targets.image_ids, found[0])
        results.append(evaluator.compute())
    evaluator.update(batch.targets.image_ids, found[1])
    evaluator.reset()
    evaluator.update(batch.targets.image_ids, found[0])
    assert results[0] == results[1] == evaluator.compute()
    nothing = evaluator.compute()  # no image was looked at
    assert nothing["coco_eval_masks"] == nothing["coco_eval_bbox"] == [-1] * 12


def test_results_are_those_of_a_model_and_can_be_written(folder: Path, tmp_path: Path) -> None:
    "`evaluate` with a model of ours; the file it leaves scores the same when pycocotools reads it."
    dataset = load(folder)
    evaluator = MaskEvaluator(dataset)
    result = evaluate(make_model(), make_loader(dataset, 3, shuffle=False, num_workers=0), evaluator, "cpu",
                      MaskCriterion(3))
    assert len(result["coco_eval_masks"]) == 12 and {"loss_mask", "loss_dice"} <= result.keys()
    evaluator.write_detections(tmp_path / "masks.json", "segm")
    written = json.loads((tmp_path / "masks.json").read_text())
    assert len(written) == 7 * 6 and written[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    truth = dataset.coco_api()
    with redirect_stdout(None):
        theirs = COCOeval(truth, truth.loadRes(str(tmp_path / "masks.json")), "segm")
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    assert theirs.stats.tolist() == result["coco_eval_masks"]
