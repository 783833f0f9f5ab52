"""Comparing runs from the outside: logs of ours, of the released code, and damaged ones."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from detr_nb.plots import compare_runs, curve, main, plot_confusion, plot_log, read_log, runs_table

ROOT = Path(__file__).resolve().parent.parent


def released_line(epoch: int, **more) -> dict:
    "An epoch with the keys that the released code logs."
    losses = {"class_error": 90 - epoch, "loss": 20 / (epoch + 1), "loss_ce": 2.0, "loss_bbox": 1.0, "loss_giou": 1.5,
              "loss_ce_0": 2.1, "loss_bbox_0": 1.1, "loss_giou_0": 1.6, "cardinality_error_unscaled": 9.0}
    line = {"train_lr": 1e-4, **{f"train_{key}": value for key, value in losses.items()}}
    line |= {f"test_{key}": 1.1 * value for key, value in losses.items()}
    return line | {"test_coco_eval_bbox": [0.01 * epoch] * 12, "epoch": epoch, "n_parameters": 41302368} | more


def write_log(folder: Path, lines: list, end: str = "\n") -> Path:
    folder.mkdir(parents=True)
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.txt").write_text("\n".join(written) + end)
    return folder


@pytest.fixture
def released(tmp_path) -> Path:
    return write_log(tmp_path / "released", [released_line(epoch) for epoch in range(10)])


@pytest.fixture
def ours(tmp_path) -> Path:
    "Evaluated at every third epoch, killed and resumed twice, the last line cut short."
    lines = [released_line(epoch, train_loss=30.0 - place) for place, epoch in enumerate([0, 1, 2, 3, 2, 3, 4, 5, 5])]
    for line in lines:
        for key in list(line) if line["epoch"] % 3 != 2 else ():
            if key.startswith("test"):
                del line[key]
    return write_log(tmp_path / "ours", lines, end='\n{"epoch": 6, "train_lo')


def test_a_replayed_epoch_counts_once_as_it_was_done_last(ours):
    log = read_log(ours)
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3, 4, 5]
    assert [value for _, value in curve(log, "train_loss")] == [30, 29, 26, 25, 24, 22]
    assert [epoch for epoch, _ in curve(log, "AP")] == [2, 5]


def test_every_key_may_be_missing_or_without_a_value(tmp_path):
    without_value = {"epoch": 1, "train_loss": None, "test_coco_eval_bbox": []}
    lines = [{"epoch": 0}, without_value, {"epoch": 2, "train_loss": math.nan}]
    bare, empty = write_log(tmp_path / "bare", lines), write_log(tmp_path / "empty", [], end="")
    figure = compare_runs([bare, empty])
    assert [len(ax.lines) for ax in figure.axes] == [1, 0, 0, 0, 0, 0]
    assert "not in these logs" in [text.get_text() for text in figure.axes[-1].texts]
    assert [line.split()[:2] for line in runs_table([bare, empty]).splitlines()[1:]] == [["bare", "3"], ["empty", "0"]]


def test_the_picture_has_the_curves_of_all_runs(ours, released):
    figure = compare_runs([ours, released])
    titles = [ax.get_title().split(",")[0].split(" (")[0] for ax in figure.axes]
    assert titles == ["loss", "class loss", "L1 loss of the boxes", "GIoU loss of the boxes", "class error", "AP"]
    assert [len(ax.lines) for ax in figure.axes] == [4] * 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "released"]
    assert figure.axes[5].lines[0].get_ydata().tolist() == pytest.approx([0.02, 0.05])


def test_no_title_of_a_runs_curves_is_cut_off_or_lies_on_another(ours):
    figure = plot_log(ours)
    figure.set_dpi(120)
    figure.canvas.draw()
    left, middle, right = (ax.title.get_window_extent() for ax in figure.axes)
    assert 0 <= left.x0 and left.x1 < middle.x0 and middle.x1 < right.x0 and right.x1 <= figure.bbox.x1
    assert all(0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in (left, middle, right))


def test_looks_stand_between_the_epochs_and_the_reference_beside_the_run(ours):
    "An epoch's entry has its number when it is done, so half an epoch lies at -0.5; a torn last line is no look."
    looks = [{"epochs_done": 0.5, "AP": 0.01}, {"epochs_done": 2.25, "AP": 0.02}]
    (ours / "looks.jsonl").write_text("\n".join([*map(json.dumps, looks), '{"epochs_d']))
    loss, _, precision = plot_log(ours, [{"epoch": 0, "train_loss": 9.0, "AP": None}, {"epoch": 4, "AP": 0.4}]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for ax in (loss, precision) for line in ax.lines[-2:]}
    assert lines["AP of the first few"] == [[-0.5, 0.01], [1.25, 0.02]] and lines["reference"] == [[4, 0.4]]
    assert loss.lines[-1].get_xydata().tolist() == [[0, 9.0]]
    assert "reference" in [text.get_text() for text in precision.get_legend().get_texts()]


def test_the_matrix_of_many_classes_has_no_numbers_and_a_row_without_objects_no_colour():
    counts = np.diag(np.arange(81))
    figure = plot_confusion(counts, [f"class {k}" for k in range(80)])
    assert not figure.axes[0].texts and figure.axes[0].images[0].get_array()[0].max() == 0


def test_masks_have_a_curve_of_their_own(tmp_path):
    run = write_log(tmp_path / "masks", [released_line(epoch, test_coco_eval_masks=[0.3] * 12) for epoch in range(3)])
    assert len(compare_runs([run]).axes[5].lines) == 3


def test_folders_of_one_name_are_told_apart(tmp_path):
    runs = [write_log(tmp_path / place / "run", [released_line(0)]) for place in ("a", "b")]
    assert [line.split()[0] for line in runs_table(runs).splitlines()[1:]] == list(map(str, runs))


def test_the_command_writes_one_picture_and_says_how_far_each_run_came(ours, released, tmp_path):
    output = tmp_path / "new" / "both.png"
    command = [sys.executable, "-m", "detr_nb.plots", ours, released / "log.txt", "--output", output]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head, first, second, wrote = done.stdout.splitlines()
    assert first.split() == ["ours", "6", "22.0000", "0.0500", "5", "0.0500"]
    assert second.split() == ["released", "10", "2.0000", "0.0900", "9", "0.0900"]
    assert wrote == f"wrote {output}" and matplotlib.image.imread(output).shape[1] > 1000


@pytest.mark.parametrize(
    ("arguments", "words"), [(["no/such/run"], "no/such/run/log.txt"), ([], "name one run"), (["broken"], "line 2")]
)
def test_bad_input_ends_in_one_message(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "broken", ["{}", "{", "{}"])
    with pytest.raises(SystemExit, match=words):
        main(arguments)
