"The record behind the page `slow`: what it counts, and that its command makes it."
import base64
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from detr_nb.checkpoints import save_checkpoint
from detr_nb.config import PRESETS
from detr_nb.engine import build_model
from detr_nb.shapes_set import write_shapes

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "nbs/slow.json"


def numbers(text: str) -> list[int]:
    return list(base64.b64decode(text))


@pytest.mark.parametrize("kind", ["none", "mask", "bias"])
def test_attention_that_is_written_out_is_torchs(kind):
    spec = importlib.util.spec_from_file_location("watched", ROOT / "benchmarks/slow.py")
    watched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watched)
    queries, keys, values = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = {"none": None, "mask": torch.arange(7) < torch.tensor([7, 4]).view(2, 1, 1, 1),
            "bias": torch.randn(2, 4, 5, 7)}[kind]
    kept = []
    found = watched.note_attention(kept, queries, keys, values, attn_mask=mask, dropout_p=0.0)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
    torch.testing.assert_close(kept[0].sum(-1), torch.ones(2, 4, 5))


def test_the_command_records_what_the_page_reads(tmp_path):
    shapes = write_shapes(tmp_path / "shapes", num_train=40, num_val=4, num_workers=1)
    model = build_model(PRESETS["shapes"], 6)
    save_checkpoint(tmp_path / "backbone.pth", {"format": "detr_nb", "version": 1, "model": model.state_dict()})
    names = ["DETR", "anchors with a bias"]
    command = [sys.executable, "benchmarks/slow.py", "--steps", 1, "--short", 1, "--only", *names, "--backbone",
               tmp_path / "backbone.pth", "--shapes_path", shapes, "--output", tmp_path / "slow.json"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, kept = (json.loads(path.read_text())["runs"] for path in (tmp_path / "slow.json", RECORD))
    assert list(found) == names and found.keys() <= kept.keys()
    for name, run in found.items():
        (look,), counts = run["looks"], run["counts"]
        assert look.keys() == kept[name]["looks"][0].keys()
        query = torch.tensor(numbers(look["query"])).split(counts)  # nobody answers for two objects of an image
        assert len(counts) == 40 and all(len(set(own.tolist())) == len(own) and (own < 16).all() for own in query)
        assert all(0 < spread <= 1 + 1e-5 for spread in look["spread"]) and len(look["spread"]) == 3
        assert all(0 < inside < 1 for inside in look["inside"]) and 0 < look["area"] < 0.5
