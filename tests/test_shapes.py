"""The embedded data set with several processes, interrupted and at odds with what is on the disk."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detr_nb import shapes_set
from detr_nb.distributed import UserError
from detr_nb.shapes import draw_scene
from detr_nb.shapes_set import RUNNING_INDEX, write_shapes

COUNTS = {"num_train": 14, "num_val": 5}
CALL = """
from detr_nb.shapes_set import write_shapes
write_shapes(r"{root}", num_train={train}, num_val=5, num_workers={workers})
"""


def contents(root: Path) -> dict[str, bytes]:
    "Every file below a folder, by its relative path."
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def start(root: Path, train: int = 14, workers: int = 1, script: Path | None = None) -> subprocess.Popen:
    "A process of its own that writes the data set."
    code = CALL.format(root=root, train=train, workers=workers)
    if script is not None:
        script.write_text(code)
    command = [sys.executable, *(["-c", code] if script is None else [str(script)])]
    environ = {**os.environ, "PYTHONPATH": str(Path(shapes_set.__file__).parent.parent)}
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)


def leftovers(root: Path) -> list[str]:
    "What is beside the set, but for the lock."
    return sorted(path.name for path in root.parent.iterdir() if path.name not in (root.name, f".{root.name}.lock"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, bytes]:
    "The files as one process draws them."
    return contents(write_shapes(tmp_path_factory.mktemp("reference") / "shapes", **COUNTS, num_workers=1))


def test_one_and_two_processes_write_the_same_bytes(tmp_path, reference):
    (torch.rand(500, 500) @ torch.rand(500, 500)).sum()  # torch's threads are up: a forked process could hang
    root = write_shapes(tmp_path / "shapes", **COUNTS, num_workers=2)
    assert contents(root) == reference
    assert len(reference) == 2 * (14 + 5) + 4 + 1


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path, reference):
    found = contents(write_shapes(tmp_path / "shapes", num_train=3, num_val=2, num_workers=1))
    pictures = [name for name in found if name.endswith(("jpg", "png"))]
    assert len(pictures) == 10 and all(found[name] == reference[name] for name in pictures)


def test_another_seed_is_another_set(tmp_path, reference):
    found = contents(write_shapes(tmp_path / "shapes", num_train=2, num_val=1, seed=1, num_workers=1))
    assert found["train2017/000000000001.jpg"] != reference["train2017/000000000001.jpg"]


def test_three_processes_at_once_leave_one_complete_set(tmp_path, reference):
    root = tmp_path / "shapes"
    processes = [start(root) for _ in range(3)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert contents(root) == reference
    assert leftovers(root) == []


def test_a_killed_writer_leaves_no_half_set(tmp_path, reference):
    root = tmp_path / "shapes"
    process = start(root, train=100_000)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".shapes.draft/train2017/*.jpg")):  # it is in the middle of the work
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not root.exists() and leftovers(root) == [".shapes.draft"]
    assert contents(write_shapes(root, **COUNTS, num_workers=1)) == reference
    assert leftovers(root) == []  # and the killed one's draft is gone


def test_an_error_while_drawing_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(shapes_set, "ids_to_rgb", disk_full)
    root = tmp_path / "shapes"
    with pytest.raises(OSError, match="No space left"):
        write_shapes(root, **COUNTS, num_workers=1)
    assert not root.exists() and leftovers(root) == []


def test_a_script_without_a_main_guard_works(tmp_path, reference):
    process = start(tmp_path / "shapes", workers=2, script=tmp_path / "script.py")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert contents(tmp_path / "shapes") == reference


def test_a_complete_set_is_left_as_it_is(tmp_path):
    root = write_shapes(tmp_path / "shapes", num_train=2, num_val=1, num_workers=1)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_shapes(root, num_train=2, num_val=1, num_workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("damage", ["version", "truncated", "folder"])
def test_an_outdated_or_damaged_set_is_drawn_anew(tmp_path, damage):
    root = write_shapes(tmp_path / "shapes", num_train=2, num_val=1, num_workers=1)
    good = contents(root)
    if damage == "version":
        (root / "shapes.json").write_text(json.dumps({**json.loads(good["shapes.json"]), "version": 0}))
    elif damage == "truncated":
        (root / "shapes.json").write_bytes(good["shapes.json"][:10])
    else:
        shutil.rmtree(root / "annotations")
    assert contents(write_shapes(root, num_train=2, num_val=1, num_workers=1)) == good
    assert leftovers(root) == []


@pytest.mark.parametrize("beside_a_set", [False, True])
def test_a_folder_with_other_files_is_never_touched(tmp_path, beside_a_set):
    root = tmp_path / "shapes"
    if beside_a_set:
        write_shapes(root, num_train=2, num_val=1, num_workers=1)
    root.mkdir(exist_ok=True)
    (root / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write_shapes(root, num_train=3, num_val=1, num_workers=1)
    assert (root / "thesis.tex").read_text() == "years of work"


def test_the_set_is_still_the_one_that_figures_were_measured_on():
    # whoever changes what is drawn must raise VERSION, and measure the book's figures again
    assert shapes_set.VERSION == 1
    scene = draw_scene(seed=0, index=RUNNING_INDEX)
    assert scene.labels.tolist() == [0, 3, 5, 4]
    assert scene.boxes.tolist() == [[37, 18, 90, 81], [37, 77, 52, 93], [81, 8, 108, 37], [6, 12, 29, 39]]
    assert scene.masks.sum((1, 2)).tolist() == [2575, 95, 449, 378]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test'.*train, val"):
        draw_scene(0, 0, "test")
