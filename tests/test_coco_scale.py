"""An annotation file of COCO's size: how long until a training can step, and what each loader worker costs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured with Linux's /proc"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    "The figures of `benchmarks/coco_index.py` with 118,000 images, 860,000 objects and 8 workers; takes minutes."
    command = [sys.executable, str(ROOT / "benchmarks" / "coco_index.py"), "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("coco"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("start", ["first_start", "later_start"])
def test_a_training_steps_in_half_the_time_that_pycocotools_takes_for_its_index(start, found):
    "Imports, model and loader included; a later start finds the index that the first one has kept."
    assert found["pycocotools_index"]["objects"] == found["our_kept_index"]["objects"] == 860_000
    assert found[start]["images"] == 2
    assert found[start]["seconds"] <= 0.5 * found["pycocotools_index"]["seconds"], found[start]


def test_the_index_alone_takes_half_the_time_also_when_nothing_was_kept(found):
    assert found["our_index"]["objects"] == 860_000
    assert found["our_index"]["seconds"] <= 0.5 * found["pycocotools_index"]["seconds"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_adds_at_most_50_mb(found, method):
    assert found[method]["processes"] == 8
    assert max(found[method]["added_mb"]) <= 50, found[method]


def test_the_main_process_holds_little_more_than_the_columns(found):
    assert found["our_index"]["held_mb"] <= 0.25 * found["pycocotools_index"]["held_mb"]
    assert found["our_index"]["peak_mb"] <= found["pycocotools_index"]["peak_mb"]
