"The names that `import detr_nb` offers, and that they do what the first chapter says."
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_nb
from detr_nb.distributed import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_import_is_instant_and_offers_about_ten_names():
    program = "import sys, detr_nb; print(*dir(detr_nb)); print(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    listed, heavy = done.stdout.splitlines()
    assert set(detr_nb.__all__) <= set(listed.split()) and heavy == "False"
    assert set(detr_nb.__all__) == {"load", "train", "evaluate", "Config", "DataConfig", "ModelConfig", "LossConfig",
                                    "OptimizerConfig", "RunConfig", "DETR", "boxes"}


def test_every_name_is_there_and_the_verbs_can_be_called():
    for name in detr_nb.__all__:
        assert getattr(detr_nb, name) is not None
    assert all(map(callable, (detr_nb.load, detr_nb.train, detr_nb.evaluate)))
    with pytest.raises(AttributeError, match="no attribute 'Train'"):
        detr_nb.Train  # noqa: B018
    assert inspect.ismodule(detr_nb.boxes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "A run of two steps on two images, trained and loaded without a string of flags."
    folder = tmp_path_factory.mktemp("front")
    config = detr_nb.Config(
        data=detr_nb.DataConfig(coco_path=str(folder / "set"), train_images=4, val_images=2, num_workers=0),
        run=detr_nb.RunConfig(output_dir=str(folder / "run"), epochs=1),
    )
    return detr_nb.train(config)
