"""A matcher and a set loss as a reader writes them who knows PyTorch but not DETR, from chapters 14 and 15 alone.

Only what the chapters tell is used: the cost of one pair, the cheapest assignment, what each query should say, and by
what the losses are divided. Plain loops; scipy for the assignment. The package must agree, values and gradients.
"""
import inspect
import warnings

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from detr_nb.batching import Targets
from detr_nb.criterion import SetCriterion
from detr_nb.detr import Predictions
from detr_nb.matcher import match


def giou(a, b):
    "Two boxes (centre x, centre y, width, height): overlap less the empty share of the box around both."
    shared, around = 1.0, 1.0
    for i in (0, 1):
        low_a, high_a = a[i] - a[i + 2] / 2, a[i] + a[i + 2] / 2
        low_b, high_b = b[i] - b[i + 2] / 2, b[i] + b[i + 2] / 2
        shared = shared * (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0)
        around = around * (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b))
    both = a[2] * a[3] + b[2] * b[3] - shared
    return shared / both - (around - both) / around


def who_answers(logits, boxes, labels, wanted):
    "One image, one layer: which query answers for which object, as a dictionary from query to object."
    if len(labels) == 0:
        return {}
    table = torch.zeros(len(labels), len(logits), dtype=torch.float64)
    for n in range(len(labels)):
        for q in range(len(logits)):
            probability = logits[q].softmax(0)[labels[n]]
            distance = (boxes[q] - wanted[n]).abs().sum()
            table[n, q] = 5 * distance - probability - 2 * giou(boxes[q], wanted[n])
    objects, queries = linear_sum_assignment(table.detach().numpy())
    return {int(q): int(n) for q, n in zip(queries, objects)}


def set_loss(logits, boxes, images):
    "Logits (L, B, Q, C+1), boxes (L, B, Q, 4); `images` has labels and boxes of each. The three losses of each layer."
    objects, losses = max(1, sum(len(labels) for labels, _ in images)), []
    for layer in range(len(logits)):
        classes, weights, l1, area = 0.0, 0.0, 0.0, 0.0
        for b, (labels, wanted) in enumerate(images):
            object_of = who_answers(logits[layer, b], boxes[layer, b], labels, wanted)
            for q in range(logits.shape[2]):
                says = logits[layer, b, q].log_softmax(0)
                if q in object_of:
                    n, box = object_of[q], boxes[layer, b, q]
                    classes, weights = classes - says[labels[n]], weights + 1
                    l1 = l1 + (box - wanted[n]).abs().sum()
                    area = area + 1 - giou(box, wanted[n])
                else:
                    classes, weights = classes - 0.1 * says[-1], weights + 0.1
        losses.append((classes / weights, l1 / objects, area / objects))
    return losses


def problem(layers, counts, queries, seed, classes=6):
    "Random predictions that ask for gradients and random objects, as the package wants them and as pairs by image."
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    predictions = Predictions((4 * draw(layers, len(counts), queries, classes + 1) - 2).requires_grad_(),
                              (0.1 + 0.5 * draw(layers, len(counts), queries, 4)).requires_grad_())
    labels, boxes = torch.randint(0, classes, (sum(counts),), generator=random), 0.1 + 0.5 * draw(sum(counts), 4)
    sizes = torch.full((len(counts), 2), 100)
    targets = Targets(labels, boxes, torch.tensor(counts), torch.arange(len(counts)), sizes, sizes)
    return predictions, targets, list(zip(targets.labels.split(counts), targets.boxes.split(counts)))


PROBLEMS = [(1, [2], 3), (3, [2, 0, 4], 8), (2, [0, 0], 5), (2, [3, 10], 8), (6, [1], 1), (2, [5, 1, 7], 12)]


def test_both_are_written_in_under_sixty_lines():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (giou, who_answers, set_loss)) < 60


@pytest.mark.parametrize(("layers", "counts", "queries"), PROBLEMS)
def test_the_pairs_are_those_of_the_package(layers, counts, queries):
    predictions, targets, images = problem(layers, counts, queries, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten objects for eight queries
        ours = set(zip(*(index.tolist() for index in match(predictions, targets))))
    first = [sum(counts[:image]) for image in range(len(counts))]
    theirs = {(layer, image, query, first[image] + n) for layer in range(layers) for image in range(len(counts))
              for query, n in who_answers(predictions.logits[layer, image], predictions.boxes[layer, image],
                                          *images[image]).items()}
    assert ours == theirs and len(ours) == layers * sum(min(count, queries) for count in counts)


@pytest.mark.parametrize(("layers", "counts", "queries"), PROBLEMS)
def test_the_losses_and_the_gradient_of_every_query_are_those_of_the_package(layers, counts, queries):
    predictions, targets, images = problem(layers, counts, queries, seed=2)
    criterion = SetCriterion(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = criterion(predictions, targets)
    theirs = set_loss(*predictions[:2], images)
    for layer, values in enumerate(theirs):
        suffix = "" if layer == layers - 1 else f"_{layer}"
        for name, value in zip(("loss_ce", "loss_bbox", "loss_giou"), values):
            assert abs(losses[name + suffix] - value).item() < 1e-10, (name, layer)
    total = sum(classes + 5 * l1 + 2 * area for classes, l1, area in theirs)
    found = torch.autograd.grad(criterion.total(losses), predictions[:2])
    expected = torch.autograd.grad(total, predictions[:2], allow_unused=True)
    for a, b in zip(found, expected):
        assert b is not None or a.abs().max() == 0  # boxes, where there is no object
        assert b is None or (a - b).abs().max() < 1e-10
