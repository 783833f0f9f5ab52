"The weights of the page on which a DETR runs in the browser: packed for its script, and read back."
import base64
import gzip
import json
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from detr_nb.detr import DETR, build_detr
from detr_nb.distributed import UserError
from detr_nb.layouts import architecture
from detr_nb.pretrained import load_detector
from detr_nb.transformer import Transformer

WEIGHTS = Path(__file__).parent / "_static/live/weights.js"
LIMIT = 2_850_000  # bytes of the script: with the page it stays below three million


def in_eight_bits(
    matrix: Float[Tensor, "D ..."],
) -> tuple[Float[Tensor, " D"], Int8[Tensor, "D ..."]]:  # scales and steps: their product is nearly the matrix
    "Each output's numbers as whole ones from -127 to 127, with a scale for each output."
    rows = matrix.float().flatten(1)
    scales = rows.abs().amax(1).clamp(min=1e-12) / 127
    return scales, (rows / scales[:, None]).round().to(torch.int8).view_as(matrix)


def pack(checkpoint: str | Path) -> str:
    "A checkpoint as the script that the page loads; raises `UserError` for a model that the page's script cannot run."
    detector = load_detector(checkpoint)
    settings = architecture(detector.model)
    plain = type(detector.model) is DETR and type(detector.model.transformer) is Transformer
    if not plain or settings["backbone"] != "small" or settings["position_embedding"] != "sine":
        raise UserError(f"{checkpoint}: the page's script runs chapter 13's DETR on the small backbone with sine "
                        f"positions, and this is another model: {settings}; extend nbs/_static/live/detr.js first")
    tensors, parts = [], []
    for name, tensor in detector.model.state_dict().items():
        tensors.append((name, list(tensor.shape)))
        arrays = in_eight_bits(tensor) if tensor.dim() > 1 else (tensor.float(),)
        parts += [array.contiguous().numpy().tobytes() for array in arrays]
    data = base64.b64encode(gzip.compress(b"".join(parts), mtime=0)).decode()
    packed = {"settings": settings, "classes": detector.names, "tensors": tensors, "data": data}
    script = f"var liveWeights = {json.dumps(packed, separators=(',', ':'))};\n"
    if len(script) > LIMIT:
        raise UserError(f"{checkpoint}: {len(script):,} bytes are too many for a page; the most is {LIMIT:,}")
    return script


def unpack(script: str) -> tuple[DETR, list[str]]:
    "The model in evaluation mode, with the weights as the page has them, and the names of its classes."
    packed = json.loads(script.removeprefix("var liveWeights = ").rstrip(";\n"))
    data, state, start = gzip.decompress(base64.b64decode(packed["data"])), {}, 0

    def take(kind: str, *shape: int) -> Tensor:
        nonlocal start
        array = np.frombuffer(data, kind, prod(shape), start).reshape(shape)
        start += array.nbytes
        return torch.from_numpy(array.copy())

    for name, shape in packed["tensors"]:
        scales = take("<f4", shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else None
        state[name] = take("<f4", *shape) if scales is None else take("i1", *shape) * scales
    model = build_detr(**packed["settings"], pretrained=None)
    model.load_state_dict(state)
    return model.eval(), packed["classes"]
