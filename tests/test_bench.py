"The benchmarks run, and compare equal work: each scenario asserts that both sides give the same numbers."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from detr_nb.shapes_set import write_shapes

ROOT = Path(__file__).resolve().parent.parent


def test_every_scenario_runs_once(tmp_path):
    pytest.importorskip("transformers")
    photos = write_shapes(tmp_path / "photos", num_train=4, num_val=2, num_workers=1)
    command = [sys.executable, "benchmarks/bench.py", "--smoke", "--data", tmp_path, "--output", tmp_path,
               "--photos", photos]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["scenarios"]) == len(done.stdout.splitlines()) == 14
    for scenario in found["scenarios"]:
        assert 0 < scenario["ours"] and bool(scenario["peer"]) == ("ratio" in scenario)
        assert not scenario["peer"] or 0 < scenario["low"] <= scenario["ratio"] <= scenario["high"]
    assert found["machine"]["threads"] >= 1 and "torch" in (tmp_path / "bench.md").read_text()


def test_what_a_gpu_is_asked_first_can_be_asked_here(tmp_path):
    "Twenty steps give the CPU's losses; on a CPU, its own."
    pytest.importorskip("transformers")
    command = [sys.executable, "tools/gpu_check.py", "--part", "losses", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    single, half = map(json.loads, done.stdout.splitlines())
    assert single["good"] and half["good"] and half["bf16"] < half["first"]
