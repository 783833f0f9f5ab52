"""The models of the paper for torch.hub: `torch.hub.load("path/to/detr_nb", "detr_resnet50", source="local")`."""
from detr_nb.pretrained import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)

dependencies = ["torch", "torchvision", "jaxtyping", "matplotlib", "pycocotools"]
__all__ = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5",
           "detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic"]
