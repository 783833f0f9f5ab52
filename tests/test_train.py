"The launcher from the outside: several processes, killed runs, bad input."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from detr_nb.coco import open_coco
from detr_nb.distributed import Process, gather_objects, spawn, world_size
from detr_nb.shapes_set import write_shapes
from detr_nb.config import LAPTOP, Config
from detr_nb.engine import build_model, build_optimizer
from detr_nb.runs import learned_state, load_learned
from detr_nb.train import warn_of_data, whole_model

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


def losses_of(folder: Path, number: int, stage: str | None) -> list[float]:
    "The losses of the first steps, which must be of this stage."
    lines = steps(folder)[:number]
    assert [line["step"] for line in lines] == list(range(number)) and {line.get("stage") for line in lines} == {stage}
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(
    ("launcher", "pretrain_epochs", "reference"),
    [(TORCHRUN, 1, "one_process"), (ACCELERATE, 0, "one_process_from_scratch")],
    ids=["torchrun, the backbone alone", "accelerate, DETR"],
)
def test_two_processes_with_half_the_batch_give_the_losses_of_one(
    launcher, pretrain_epochs, reference, shapes, tmp_path, request
):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 4, *SMALL]
    result = launch(*arguments, "--pretrain_epochs", pretrain_epochs, launcher=launcher)
    assert "2 processes" in result.stdout
    stage = "backbone" if pretrain_epochs else None
    ours, theirs = (losses_of(folder, 10, stage) for folder in (tmp_path, request.getfixturevalue(reference)))
    assert ours == pytest.approx(theirs, rel=1e-4)


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
        "detections_bbox.json",
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


def tensors(path: Path) -> dict:
    "A checkpoint's contents."
    return torch.load(path, weights_only=True)


def test_with_frozen_weights_only_the_mask_head_learns(one_process, shapes, tmp_path):
    source = one_process / "checkpoint.pth"
    arguments = ["--masks", "--frozen_weights", source, "--dropout", "0.1", "--lr_backbone", "1e-3"]
    launch("--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, *arguments)
    before, after = tensors(source)["model"], tensors(tmp_path / "checkpoint.pth")
    assert all(torch.equal(after["model"][f"detr.{name}"], tensor) for name, tensor in before.items())
    head = [name for name in after["model"] if not name.startswith("detr.")]
    assert len(after["optimizer"]["state"]) == len(head)  # all of them parameters
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert len(line["test_coco_eval_masks"]) == 12 and line["train_loss_dice"] > 0
    box_numbers = json.loads((one_process / "log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"]
    assert line["test_coco_eval_bbox"] == pytest.approx(box_numbers, abs=1e-6)


def test_a_panoptic_run_starts_from_boxes_and_is_resumed_and_evaluated(one_process, shapes, tmp_path):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, "--resume", "auto"]
    learn = ["--dataset_file", "coco_panoptic", "--masks", "--finetune", one_process / "best.pth", "--keep_classes"]
    result = launch(*arguments, *learn, launcher=TORCHRUN)
    assert "the rows of disc" in result.stdout and "2 processes" in result.stdout
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert line["test_PQ_all"]["n"] == 10 and {"test_PQ_th", "test_PQ_st"} <= line.keys()
    classes = tensors(tmp_path / "checkpoint.pth")["classes"]
    assert sum(classes["is_thing"]) == 6 and len(classes["names"]) == 10
    again = launch(*arguments, *learn, "--eval")
    tested = json.loads(again.stdout[again.stdout.index("{\n") :])
    assert tested["test_PQ_all"]["pq"] == pytest.approx(line["test_PQ_all"]["pq"], abs=1e-6)


def test_frozen_weights_are_refused_without_masks_and_for_other_classes(one_process, shapes, tmp_path):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, *SMALL]
    frozen = ["--frozen_weights", one_process / "best.pth"]
    result = launch(*arguments, *frozen, check=False)
    assert result.returncode and "needs --masks" in result.stderr and "Traceback" not in result.stderr
    result = launch(*arguments, *frozen, "--masks", "--dataset_file", "coco_panoptic", check=False)
    assert result.returncode and "Train the boxes first" in result.stderr and "Traceback" not in result.stderr


def test_a_small_set_from_scratch_is_warned_of(shapes, caplog):
    train, val = (open_coco(shapes, split) for split in ("train", "val"))
    for config, warned in ((Config(coco_path="x"), True), (Config(coco_path="x", finetune="y"), False)):
        caplog.clear()
        warn_of_data(config, train, val)
        assert any("from scratch on 96 images" in record.message for record in caplog.records) == warned


def shard(seed: int) -> tuple:
    "A small DETR, cut up by FSDP among the processes, with its optimizer, as a run holds them."
    torch.manual_seed(seed)
    config = replace(LAPTOP, enc_layers=1, dec_layers=1, hidden_dim=32, dim_feedforward=64, optimizer="adamw")
    model = build_model(config, num_classes=3)
    for layer in (*model.transformer.encoder.layers, *model.transformer.decoder.layers, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
    optimizer = build_optimizer(model, config)
    return model, SimpleNamespace(
        config=config, model=model, bare_model=model, epoch=0, process=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP),
        optimizer=SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups),
        train_loader=SimpleNamespace(dataset=SimpleNamespace(categories=SimpleNamespace(num_classes=3))),
    )


def sharded_round_trip(process: Process) -> dict:
    "Take a step, save, load into another model, save again; and the answers of the whole and of the cut-up model."
    (model, run), (_, other) = shard(0), shard(1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(process.rank))
    predictions = model(images)
    (predictions.boxes.sum() + predictions.logits.sum()).backward()
    run.optimizer.optimizer.step()
    saved = learned_state(run)
    everywhere = gather_objects(saved)[0] | {"epoch": 0}  # the file that all processes read
    load_learned(other, everywhere)
    again = learned_state(other)
    answers = whole_model(run).eval()(images).logits, model.eval()(images).logits
    return {"saved": saved, "again": again, "answers": [answer.detach() for answer in answers]}


@pytest.mark.slow
def test_a_model_that_fsdp_has_cut_up_is_saved_whole_and_resumed():
    first, second = spawn(sharded_round_trip, 2)
    whole = build_model(replace(LAPTOP, enc_layers=1, dec_layers=1, hidden_dim=32, dim_feedforward=64), 3).state_dict()
    assert {name: x.shape for name, x in first["saved"]["model"].items()} == {n: x.shape for n, x in whole.items()}
    assert all(torch.equal(x, first["again"]["model"][name]) for name, x in first["saved"]["model"].items())
    moments = first["saved"]["optimizer"]["state"]
    assert moments.keys() == whole.keys()  # no buffers in this model
    for name, state in moments.items():
        assert all(torch.equal(x, first["again"]["optimizer"]["state"][name][key]) for key, x in state.items())
    for answers in (first["answers"], second["answers"]):
        torch.testing.assert_close(*answers)


def test_one_process_under_accelerate_uses_all_cores(shapes, tmp_path):
    alone = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "detr_nb.train"]
    result = launch("--shapes_path", shapes, "--output_dir", tmp_path, "--fast_dev_run", *SMALL, launcher=alone)
    assert f"{len(os.sched_getaffinity(0))} threads" in result.stdout


def test_what_is_wrong_with_a_command_is_said_once_by_all_processes_together(tmp_path):
    for arguments, words in (
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--finetune", "nothing.pth"], "nothing.pth: there is no such file"),
        (["--coco_path", "nowhere"], "no such folder: nowhere"),
    ):
        result = launch(*arguments, "--device", "cpu", "--no_pretrained", launcher=TORCHRUN, check=False)
        assert result.returncode != 0 and (result.stdout + result.stderr).count(words) == 1, result.stderr


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
    for words in ("not finite", "step 1", "image ids", "Learning rates", "last losses", "not_finite-0.json"):
        assert words in result.stderr, result.stderr
    report = json.loads((tmp_path / "not_finite-0.json").read_text())
    assert report["step"] == 1 and len(report["image_ids"]) == 8 and len(report["boxes"]) == sum(report["counts"])
    assert report["first_not_finite"].startswith(("the output of", "the parameter")) and report["last_losses"]


BAD_GRADIENT = """
import sys
from detr_nb import train
whole = train.batch_losses
def broken(model, *others):
    losses = whole(model, *others)
    return losses | {"loss": losses["loss"] + (0 * next(model.parameters()).sum()).sqrt()}
train.batch_losses = broken
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flag", [[], ["--detect_anomaly"]], ids=["by itself", "with --detect_anomaly"])
def test_a_gradient_that_is_not_finite_is_traced(flag, shapes, tmp_path):
    "The root of nothing has an infinite slope: the loss looks well, and the gradient, infinity times zero, does not."
    program, folder = tmp_path / "broken.py", tmp_path / "run"
    program.write_text(BAD_GRADIENT)
    arguments = ["--shapes_path", shapes, "--output_dir", folder, *SMALL, "--pretrain_epochs", "0", *flag]
    result = launch(*arguments, launcher=[sys.executable, str(program)], check=False)
    assert result.returncode != 0
    if flag:
        assert "Function 'MulBackward0' returned nan values" in result.stderr
    else:
        report = json.loads((folder / "not_finite-0.json").read_text())
        assert report["first_not_finite"].startswith("the gradient of ") and "Traceback" not in result.stderr


def test_tensorboard_gets_rates_losses_of_each_layer_speed_and_memory(shapes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = ["--limit_train", 24, "--limit_val", 4, "--batch_size", 8, "--pretrain_epochs", 0]
    launch("--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, *few, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layers = {f"step/{name}{layer}" for name in ("loss_ce", "loss_bbox", "loss_giou") for layer in ("", "_0")}
    speed = {f"step/{name}" for name in ("data_time", "step_time", "images_per_second", "memory_mb")}
    tags = set(events.Tags()["scalars"])
    assert tags >= layers | speed | {"step/lr", "step/grad_norm", "step/loss", "train_loss", "test_loss"}
    logged = {event.step: event.value for event in events.Scalars("step/loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in steps(tmp_path)}, rel=1e-5)
    assert all(event.value > 0 for event in events.Scalars("step/images_per_second"))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_named(shapes, tmp_path):
    result = launch("--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, "--report_to", "wandb", check=False)
    assert result.returncode != 0 and "pip install wandb" in result.stderr and "Traceback" not in result.stderr


def test_rank_zero_alone_says_what_was_left_out(shapes, tmp_path):
    "Of a file whose first box has no width."
    root = tmp_path / "set"
    shutil.copytree(shapes, root)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    arguments = ["--shapes_path", root, "--output_dir", tmp_path / "run", *SMALL, "--fast_dev_run"]
    result = launch(*arguments, launcher=TORCHRUN)
    assert (result.stdout + result.stderr).count("skipped 1 of") == 1
