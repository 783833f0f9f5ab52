"""The models of the paper for torch.hub: `torch.hub.load("path/to/detr_nb", "detr_resnet50", source="local")`."""
from detr_nb import convert, detr, distributed, segmentation  # modules, since torch.hub offers whatever can be called

dependencies = [
    "torch", "torchvision", "numpy", "scipy", "PIL", "jaxtyping", "matplotlib", "pycocotools", "psutil",
    "tyro", "msgspec",
]


def _build(name: str, pretrained: bool, num_classes: int) -> detr.DETR | segmentation.SegmentationDETR:
    "A model by its name; raises `UserError` for released weights with other classes."
    masks = name.endswith("panoptic")
    if not pretrained:
        model = detr.build_detr(num_classes, name.split("_")[1], dilation="dc5" in name, pretrained=None)
        return segmentation.build_segmentation(model) if masks else model
    count = 250 if masks else 91
    if num_classes != count:
        raise distributed.UserError(
            f"the released {name} has {count} classes, not {num_classes}: make one without pretrained=True and call "
            f"detr_nb.pretrained.transfer_weights(model, {name!r}, names)"
        )
    return convert.from_released(name, masks=masks)


def detr_resnet50(pretrained: bool = False, num_classes: int = 91) -> detr.DETR:
    "DETR R50 (Carion et al. 2020, table 1): released weights in evaluation mode, or random ones to be filled."
    return _build("detr_resnet50", pretrained, num_classes)


def detr_resnet50_dc5(pretrained: bool = False, num_classes: int = 91) -> detr.DETR:
    "DETR-DC5 R50, whose last feature map has stride 16; as `detr_resnet50` otherwise."
    return _build("detr_resnet50_dc5", pretrained, num_classes)


def detr_resnet101(pretrained: bool = False, num_classes: int = 91) -> detr.DETR:
    "DETR R101; as `detr_resnet50` otherwise."
    return _build("detr_resnet101", pretrained, num_classes)


def detr_resnet101_dc5(pretrained: bool = False, num_classes: int = 91) -> detr.DETR:
    "DETR-DC5 R101; as `detr_resnet50_dc5` otherwise."
    return _build("detr_resnet101_dc5", pretrained, num_classes)


def detr_resnet50_panoptic(pretrained: bool = False, num_classes: int = 250) -> segmentation.SegmentationDETR:
    "DETR R50 with masks (Carion et al. 2020, table 5): things and stuff by COCO's ids; as `detr_resnet50` otherwise."
    return _build("detr_resnet50_panoptic", pretrained, num_classes)


def detr_resnet50_dc5_panoptic(pretrained: bool = False, num_classes: int = 250) -> segmentation.SegmentationDETR:
    "DETR-DC5 R50 with masks; as `detr_resnet50_panoptic` otherwise."
    return _build("detr_resnet50_dc5_panoptic", pretrained, num_classes)


def detr_resnet101_panoptic(pretrained: bool = False, num_classes: int = 250) -> segmentation.SegmentationDETR:
    "DETR R101 with masks; as `detr_resnet50_panoptic` otherwise."
    return _build("detr_resnet101_panoptic", pretrained, num_classes)
