"""The models of the paper for torch.hub, to be called as those of the released code.

`torch.hub.load("path/to/detr_nb", "detr_resnet50", source="local")`
"""
import io
import re

import numpy as np
import torch
from PIL import Image

from detr_nb import (  # modules, since torch.hub offers whatever can be called
    detr,
    distributed,
    evaluation,
    layouts,
    panoptic,
    segmentation,
    shapes_set,
)

dependencies = [
    "torch", "torchvision", "numpy", "scipy", "PIL", "jaxtyping", "matplotlib", "pycocotools", "psutil",
    "tyro", "msgspec", "filelock", "tqdm",
]


class _AsReleased:
    "A model that is called and filled as the released one is, and answers like it: with a dictionary."

    def forward(self, samples, padding=None):
        "`samples`: a normalised tensor (B, 3, H, W), a list of (3, H, W), or what has `tensors` and `mask`."
        if hasattr(samples, "tensors"):
            samples, padding = samples.tensors, samples.mask
        elif not isinstance(samples, torch.Tensor):
            samples, padding = _pad(list(samples))
        logits, boxes, masks = super().forward(samples, padding)[:3]
        layers = [{"pred_logits": logits[k], "pred_boxes": boxes[k]} for k in range(len(logits))]
        return layers[-1] | ({} if masks is None else {"pred_masks": masks}) | {"aux_outputs": layers[:-1]}

    def load_state_dict(self, state_dict, *args, **settings):
        "Tensors under our names, or under those of the released code."
        part = {"0": "backbone.", "1": "position_encoding."}
        state_dict = {re.sub(r"\bbackbone\.([01])\.", lambda found: part[found[1]], name): tensor
                      for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **settings)


class _DETR(_AsReleased, detr.DETR):
    pass


class _SegmentationDETR(_AsReleased, segmentation.SegmentationDETR):
    pass


def _pad(images):
    "Images of several sizes as one tensor, and True where it is padded."
    size = [max(image.shape[side] for image in images) for side in (1, 2)]
    batch = images[0].new_zeros(len(images), 3, *size)
    padding = torch.ones(len(images), *size, dtype=torch.bool, device=batch.device)
    for image, place, pad in zip(images, batch, padding):
        place[:, : image.shape[1], : image.shape[2]] = image
        pad[: image.shape[1], : image.shape[2]] = False
    return batch, padding if padding.any() else None


def _boxes_in_pixels(outputs, target_sizes):
    "For each image the scores, labels and boxes (xyxy, pixels) of all queries."
    found = evaluation.postprocess(outputs["pred_logits"], outputs["pred_boxes"], target_sizes)
    return [dict(zip(("scores", "labels", "boxes"), image)) for image in zip(*found)]


class _PanopticMaps:
    "For each image a PNG whose colours are segments' ids, and what each segment is."

    def __init__(self, threshold):
        self.threshold, self.is_thing = threshold, torch.arange(250) < 91

    def __call__(self, outputs, processed_sizes, target_sizes=None):
        sizes, wanted = (torch.stack([torch.as_tensor(size) for size in some])
                         for some in (processed_sizes, processed_sizes if target_sizes is None else target_sizes))
        cut = panoptic.panoptic_segments(outputs["pred_logits"], outputs["pred_masks"], sizes, wanted, self.is_thing,
                                         self.threshold)
        return [self._written(segments) for segments in cut]

    def _written(self, segments):
        "The map and the list as the released code gives them."
        file = io.BytesIO()
        Image.fromarray(shapes_set.ids_to_rgb(np.asarray(segments.pixels))).save(file, format="png")
        columns = (segments.ids, segments.is_thing, segments.labels, segments.areas)
        keys = ("id", "isthing", "category_id", "area")
        return {"png_string": file.getvalue(),
                "segments_info": [dict(zip(keys, row)) for row in zip(*(column.tolist() for column in columns))]}


def _build(name, pretrained, num_classes, return_postprocessor, threshold=0.85):
    "A model by its name, and what makes its outputs results; raises `UserError` for released weights of other classes."
    masks = name.endswith("panoptic")
    count = 250 if masks else 91
    if not pretrained:
        model = detr.build_detr(num_classes, name.split("_")[1], dilation="dc5" in name, pretrained=None)
        model = segmentation.build_segmentation(model) if masks else model
    elif num_classes == count:
        model = layouts.from_released(name, masks=masks)
    else:
        raise distributed.UserError(
            f"the released {name} has {count} classes, not {num_classes}: make one without pretrained=True and call "
            f"detr_nb.pretrained.transfer_weights(model, {name!r}, names)"
        )
    model.__class__ = _SegmentationDETR if masks else _DETR
    if return_postprocessor:
        return model, _PanopticMaps(threshold) if masks else _boxes_in_pixels
    return model


def detr_resnet50(pretrained=False, num_classes=91, return_postprocessor=False):
    "DETR R50 (Carion et al. 2020, table 1): released weights in evaluation mode, or random ones to be filled."
    return _build("detr_resnet50", pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(pretrained=False, num_classes=91, return_postprocessor=False):
    "DETR-DC5 R50, whose last feature map has stride 16; as `detr_resnet50` otherwise."
    return _build("detr_resnet50_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet101(pretrained=False, num_classes=91, return_postprocessor=False):
    "DETR R101; as `detr_resnet50` otherwise."
    return _build("detr_resnet101", pretrained, num_classes, return_postprocessor)


def detr_resnet101_dc5(pretrained=False, num_classes=91, return_postprocessor=False):
    "DETR-DC5 R101; as `detr_resnet50_dc5` otherwise."
    return _build("detr_resnet101_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet50_panoptic(pretrained=False, num_classes=250, threshold=0.85, return_postprocessor=False):
    "DETR R50 with masks (Carion et al. 2020, table 5): things and stuff by COCO's ids; as `detr_resnet50` otherwise."
    return _build("detr_resnet50_panoptic", pretrained, num_classes, return_postprocessor, threshold)


def detr_resnet50_dc5_panoptic(pretrained=False, num_classes=250, threshold=0.85, return_postprocessor=False):
    "DETR-DC5 R50 with masks; as `detr_resnet50_panoptic` otherwise."
    return _build("detr_resnet50_dc5_panoptic", pretrained, num_classes, return_postprocessor, threshold)


def detr_resnet101_panoptic(pretrained=False, num_classes=250, threshold=0.85, return_postprocessor=False):
    "DETR R101 with masks; as `detr_resnet50_panoptic` otherwise."
    return _build("detr_resnet101_panoptic", pretrained, num_classes, return_postprocessor, threshold)
