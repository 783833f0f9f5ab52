"The launcher from the outside: several processes, killed runs, bad input."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detr_nb.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--enc_layers", "1", "--dec_layers", "2", "--hidden_dim", "64", "--dim_feedforward", "128", "--epochs", "1",
    "--dropout", "0", "--num_workers", "0", "--no_group_by_shape", "--log_every", "1", "--report_to", "none",
    "--device", "cpu", "--mixed_precision", "no", "--warmup_steps", "0",
]  # fmt: skip
ALONE = [sys.executable, "-m", "detr_nb.train"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "detr_nb.train",
]  # fmt: skip
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/two_cpu.yaml"),
    "-m", "detr_nb.train",
]  # fmt: skip


def launch(*arguments: object, launcher: list[str] = ALONE, check: bool = True) -> subprocess.CompletedProcess:
    "Run the launcher in a process of its own."
    environ = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    command = [*launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=600)
    if check and result.returncode:
        raise AssertionError(
            f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        )
    return result


def steps(folder: Path) -> list[dict]:
    "The lines of a run's steps.jsonl."
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    "A small embedded set."
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=96, num_val=8, num_workers=1)


@pytest.fixture(scope="module")
def one_process(shapes, tmp_path_factory) -> Path:
    "The run folder of one process with eight images a step, the backbone first."
    return train_on_eight(shapes, tmp_path_factory.mktemp("one"), "--pretrain_epochs", 1)


@pytest.fixture(scope="module")
def one_process_from_scratch(shapes, tmp_path_factory) -> Path:
    "The same without the backbone's own training: the first step is DETR's."
    return train_on_eight(shapes, tmp_path_factory.mktemp("scratch"), "--pretrain_epochs", 0)


def train_on_eight(shapes: Path, folder: Path, *arguments: object) -> Path:
    "Train with eight images a step in one process; returns the run folder."
    launch("--shapes_path", shapes, "--output_dir", folder, "--batch_size", 8, *SMALL, *arguments)
    return folder


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
@pytest.mark.parametrize(("pretrain_epochs", "reference"), [(1, "one_process"), (0, "one_process_from_scratch")])
def test_two_processes_with_half_the_batch_give_the_losses_of_one(
    launcher, pretrain_epochs, reference, shapes, tmp_path, request
):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 4, *SMALL]
    result = launch(*arguments, "--pretrain_epochs", pretrain_epochs, launcher=launcher)
    assert "2 processes" in result.stdout
    ours, theirs = steps(tmp_path)[:10], steps(request.getfixturevalue(reference))[:10]
    assert len(ours) == 10 and [line.get("stage") for line in ours] == [("backbone" if pretrain_epochs else None)] * 10
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), f"step {a['step']}"


def test_a_run_writes_its_folder(one_process):
    names = {path.name for path in one_process.iterdir()}
    assert names >= {
        "config.yaml",
        "log.txt",
        "checkpoint.pth",
        "best.pth",
        "curves.png",
        "predictions.png",
        "steps.jsonl",
    }
    line = json.loads((one_process / "log.txt").read_text().splitlines()[-1])
    assert {"epoch", "train_loss", "train_loss_ce", "train_loss_bbox_0_unscaled", "n_parameters"} <= line.keys()
    assert len(line["test_coco_eval_bbox"]) == 12


def test_eval_of_a_checkpoint_gives_the_numbers_of_its_log(one_process, shapes):
    result = launch(
        "--shapes_path", shapes, "--eval", "--resume", one_process / "checkpoint.pth", "--batch_size", 8, *SMALL
    )
    tested = json.loads(result.stdout[result.stdout.index("{\n") :])
    line = json.loads((one_process / "log.txt").read_text().splitlines()[-1])
    assert tested["test_coco_eval_bbox"] == pytest.approx(line["test_coco_eval_bbox"], abs=1e-6)


def test_one_process_under_accelerate_uses_all_cores(shapes, tmp_path):
    alone = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "detr_nb.train"]
    result = launch("--shapes_path", shapes, "--output_dir", tmp_path, "--fast_dev_run", *SMALL, launcher=alone)
    assert f"{len(os.sched_getaffinity(0))} threads" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--coco_path", "no/such/folder"], ["no/such/folder"]),
        (["--resume", "no/such/file.pth"], ["no/such/file.pth", "no such file"]),
        (["--resume", __file__], ["test_train.py", "not a checkpoint"]),
    ],
)
def test_bad_input_ends_in_one_message(arguments, words, shapes, tmp_path):
    extra = [] if "--coco_path" in arguments else ["--shapes_path", shapes]
    model = ["--backbone", "small", "--no_pretrained"]
    result = launch(*arguments, *extra, *model, "--output_dir", tmp_path, *SMALL, check=False)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_an_image_that_a_loader_process_cannot_read_is_named_in_one_message(shapes, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shapes, broken)
    victim = sorted((broken / "train2017").iterdir())[5]
    victim.write_bytes(victim.read_bytes()[:200])
    result = launch("--shapes_path", broken, "--output_dir", tmp_path / "run", *SMALL, "--num_workers", 1, check=False)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert victim.name in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(shapes, tmp_path):
    arguments = ["--lr", "1e30", "--lr_backbone", "1e30", "--clip_max_norm", "0", "--warmup_steps", "0"]
    result = launch(
        "--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, *arguments, check=False
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr
    for words in ("not finite", "step", "image ids", "learning rates", "last losses"):
        assert words in result.stderr, result.stderr
