"""DETR once more, as the paper's released code computes it: plain torch, sequence first, lists of dictionaries, loops.

Written for the parity tests, apart from the package: it imports nothing of `detr_nb`. It takes torch's own attention
and torchvision's ResNet where the book builds its own, looks at one image at a time where the book packs a batch, and
its state dict has the released checkpoints' keys.
"""
import math

import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn


class SelfThenFeedForward(nn.Module):
    "An encoder layer with the norm after each sum."

    def __init__(self, width, heads, feed_forward, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, place, hidden):
        looked, _ = self.self_attn(x + place, x + place, x, key_padding_mask=hidden)
        x = self.norm1(x + self.dropout(looked))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class SelfThenCrossThenFeedForward(nn.Module):
    "A decoder layer with the norm after each sum."

    def __init__(self, width, heads, feed_forward, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, name, memory, place, hidden):
        talked, _ = self.self_attn(x + name, x + name, x)
        x = self.norm1(x + self.dropout(talked))
        looked, _ = self.multihead_attn(x + name, memory + place, memory, key_padding_mask=hidden)
        x = self.norm2(x + self.dropout(looked))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class Stack(nn.Module):
    "Layers, and for the decoder a norm."

    def __init__(self, layers, norm=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if norm is not None:
            self.norm = norm


class ReferenceTransformer(nn.Module):
    "Encoder and decoder; the decoder's norm is for what leaves it and is never fed to the next layer."

    def __init__(self, width, heads, encoder_layers, decoder_layers, feed_forward, dropout):
        super().__init__()
        shape = (width, heads, feed_forward, dropout)
        self.encoder = Stack(SelfThenFeedForward(*shape) for _ in range(encoder_layers))
        self.decoder = Stack(
            (SelfThenCrossThenFeedForward(*shape) for _ in range(decoder_layers)), nn.LayerNorm(width)
        )

    def forward(self, tokens, place, names, hidden, auxiliary):
        for layer in self.encoder.layers:
            tokens = layer(tokens, place, hidden)
        names = names[:, None].expand(-1, tokens.shape[1], -1)
        slots, outputs = torch.zeros_like(names), []
        for layer in self.decoder.layers:
            slots = layer(slots, names, tokens, place, hidden)
            if auxiliary:
                outputs.append(self.decoder.norm(slots))
        if not auxiliary:
            outputs = [self.decoder.norm(slots)]
        return torch.stack(outputs).transpose(1, 2), tokens.transpose(0, 1)


def sine_places(hidden, half, dtype=torch.float32, temperature=10000):
    "The sine code of each cell from the padding mask (B, H, W), one wave after another; gives (B, 2 half, H, W)."
    height, width = hidden.shape[1:]
    real = (~hidden).to(dtype)
    rows, columns = real.cumsum(1), real.cumsum(2)
    rows = rows / (rows[:, height - 1 :, :] + 1e-6) * 2 * math.pi
    columns = columns / (columns[:, :, width - 1 :] + 1e-6) * 2 * math.pi
    waves = []
    for places in (rows, columns):
        for index in range(half):
            slowness = torch.tensor(float(temperature), dtype=dtype) ** (2 * (index // 2) / half)
            waves.append((places / slowness).cos() if index % 2 else (places / slowness).sin())
    return torch.stack(waves, dim=1)


def learned_places(rows, columns, height, width):
    "A column's vector, then a row's, for every cell; gives (1, D, H, W). `rows` and `columns` are tables."
    cells = [[torch.cat([columns[x], rows[y]]) for x in range(width)] for y in range(height)]
    return torch.stack([torch.stack(line) for line in cells]).permute(2, 0, 1)[None]


class Boxes(nn.Module):
    "Three linear layers with ReLU between."

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())


class Backbone(nn.Module):
    "torchvision's ResNet without its classifier, with torchvision's frozen batch norm."

    def __init__(self, name, dilation):
        super().__init__()
        resnet = getattr(torchvision.models, name)(
            weights=None,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        self.channels = resnet.fc.in_features
        self.body = nn.ModuleDict(dict(list(resnet.named_children())[:-2]))

    def forward(self, x):
        maps = []
        for name, part in self.body.items():
            x = part(x)
            if name.startswith("layer"):
                maps.append(x)
        return maps


class ReferenceDETR(nn.Module):
    "The released model. `auxiliary` chooses whether all decoder layers answer or only the last."

    def __init__(self, num_classes, num_queries=100, backbone="resnet50", dilation=False, width=256, heads=8,
                 encoder_layers=6, decoder_layers=6, feed_forward=2048, dropout=0.1):
        super().__init__()
        self.backbone = nn.ModuleList([Backbone(backbone, dilation)])
        self.transformer = ReferenceTransformer(width, heads, encoder_layers, decoder_layers, feed_forward, dropout)
        self.input_proj = nn.Conv2d(self.backbone[0].channels, width, 1)
        self.query_embed = nn.Embedding(num_queries, width)
        self.class_embed = nn.Linear(width, num_classes + 1)
        self.bbox_embed = Boxes(width)
        self.width = width

    def forward(self, images, hidden, auxiliary=True):
        "`hidden` is True on padded pixels, and always given. Returns all that the tests compare."
        maps = self.backbone[0](images)
        hidden = F.interpolate(hidden[None].float(), size=maps[-1].shape[-2:])[0].bool()
        place = sine_places(hidden, self.width // 2, images.dtype)
        tokens = self.input_proj(maps[-1]).flatten(2).permute(2, 0, 1)
        decoded, memory = self.transformer(
            tokens, place.flatten(2).permute(2, 0, 1), self.query_embed.weight, hidden.flatten(1), auxiliary
        )
        return {"maps": maps, "places": place, "memory": memory, "decoded": decoded,
                "logits": self.class_embed(decoded), "boxes": self.bbox_embed(decoded).sigmoid()}


def corners(box):
    x, y, w, h = box.unbind(-1)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def generalized_iou(a, b):
    "Of two single boxes (cxcywh)."
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = corners(a), corners(b)
    common = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    common = common * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    around = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    return common / union - (around - union) / around


@torch.no_grad()
def assign(logits, boxes, target):
    "Pairs (query, object) of one image and layer, in the order of the objects."
    if not len(target["labels"]):
        return []
    chances = logits.softmax(-1)
    cost = torch.stack([torch.stack([
        5 * (box - wanted).abs().sum() - chance[label] - 2 * generalized_iou(box, wanted)
        for label, wanted in zip(target["labels"], target["boxes"])]) for chance, box in zip(chances, boxes)])
    queries, objects = linear_sum_assignment(cost.numpy())
    return sorted(zip(queries.tolist(), objects.tolist()), key=lambda pair: pair[1])


def layer_losses(logits, boxes, targets, eos_coef=0.1):
    "The terms of one decoder layer on one process: {name: value}, and the pairs of each image."
    no_object = logits.shape[-1] - 1
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    pairs = [assign(*image) for image in zip(logits, boxes, targets)]
    entropies, weight_sum, distance, overlap = [], 0.0, 0.0, 0.0
    right = pair_count = 0
    for image, target in enumerate(targets):
        label_of = {query: int(target["labels"][thing]) for query, thing in pairs[image]}
        for query, guess in enumerate(logits[image]):
            label = label_of.get(query, no_object)
            weight = eos_coef if label == no_object else 1.0
            entropies.append(-weight * guess.log_softmax(-1)[label])
            weight_sum += weight
            right += label != no_object and int(guess.argmax()) == label
        for query, thing in pairs[image]:
            distance = distance + (boxes[image, query] - target["boxes"][thing]).abs().sum()
            overlap = overlap + 1 - generalized_iou(boxes[image, query], target["boxes"][thing])
            pair_count += 1
    claimed = [int((guess.argmax(-1) != no_object).sum()) for guess in logits]
    zero = boxes.sum() * 0
    return {
        "loss_ce": torch.stack(entropies).sum() / weight_sum,
        "loss_bbox": distance / num_boxes + zero,
        "loss_giou": overlap / num_boxes + zero,
        "cardinality_error": torch.tensor(
            sum(abs(count - len(target["labels"])) for count, target in zip(claimed, targets)) / len(targets)),
        # the released code reports 100 where nothing is matched
        "class_error": torch.tensor(100 - 100 * right / pair_count if pair_count else 100.0),
    }, pairs


def reference_losses(logits, boxes, targets, eos_coef=0.1):
    "All terms under the released names, unweighted; `class_error` of the last layer only."
    last, found, matched = len(logits) - 1, {}, []
    for layer in range(len(logits)):
        terms, pairs = layer_losses(logits[layer], boxes[layer], targets, eos_coef)
        matched.append(pairs)
        if layer < last:
            terms.pop("class_error")
        found |= {name if layer == last else f"{name}_{layer}": value for name, value in terms.items()}
    return found, matched


def reference_total(terms):
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    return sum(weights[key] * value for name, value in terms.items() if (key := name.rstrip("_0123456789")) in weights)


def reference_answers(logits, boxes, sizes):
    "What the released post-processing says: one dictionary per image, boxes xyxy in pixels; `sizes` (height, width)."
    answers = []
    for guess, box, (height, width) in zip(logits, boxes, sizes.tolist()):
        scores, labels = guess.softmax(-1)[:, :-1].max(-1)
        x1, y1, x2, y2 = corners(box)
        answers.append({"scores": scores, "labels": labels,
                        "boxes": torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], dim=-1)})
    return answers


def reference_size(width, height, short, longest=None):
    """The released rule for resizing an image, from its description: (height, width).

    The wanted short side is lowered (and rounded) when the long side would come out beyond the limit; an image whose
    short side already has that length is left alone, whatever its long side; the long side is cut, not rounded.
    """
    lower, upper = sorted((width, height))
    if longest is not None and upper / lower * short > longest:
        short = int(round(longest * lower / upper))
    if short in (width, height) and short == lower:
        return height, width
    if width < height:
        return int(short * height / width), short
    return short, int(short * width / height)
