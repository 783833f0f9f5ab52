"""What the designs of the small backbone cost for 32 images of 128 x 128 pixels, the best of several tries.

    python benchmarks/small_backbone.py [threads]
"""
import sys
import time

import torch
from torch import nn

from detr_nb.backbone import SmallBackbone

DESIGNS = [  # channels and residual blocks of each stage
    ((32, 64, 128, 128), (1, 1, 1, 1)),
    ((32, 64, 128, 256), (0, 1, 1, 1)),
    ((32, 64, 128, 128), (0, 1, 1, 1)),
    ((24, 48, 96, 192), (1, 1, 1, 1)),
    ((24, 48, 96, 192), (0, 1, 1, 2)),
    ((16, 32, 64, 128), (1, 1, 2, 2)),
    ((16, 32, 64, 128), (0, 1, 1, 1)),
]


def best_of(function, *arguments, tries: int = 6) -> float:
    "Milliseconds of the fastest try, after one to warm up."
    function(*arguments)
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def forward_and_backward(model: nn.Module, images: torch.Tensor) -> None:
    "One training step's work, without the optimizer's."
    output = model(images)
    (output if isinstance(output, torch.Tensor) else output.maps[-1]).sum().backward()


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    images = torch.randn(32, 3, 128, 128)
    print("widths               blocks        forward  with backward (ms)  parameters (M)")
    for widths, blocks in DESIGNS:
        model = SmallBackbone(widths, blocks)
        forward = best_of(model, images)
        both = best_of(forward_and_backward, model, images)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{str(widths):20} {str(blocks):13} {forward:7.0f} {both:19.0f} {size:15.2f}")
    conv, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.randn(32, 64, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = x.contiguous(memory_format=layout).requires_grad_()
        print(f"3x3 convolution, 64 channels, {layout}: {best_of(forward_and_backward, conv, inputs):.0f} ms")


if __name__ == "__main__":
    main()
