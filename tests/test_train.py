"The launcher from the outside: several processes, killed runs, bad input."

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from book_demos import spawn
from child import Child, clean_environ, pair_environs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import detr_nb
from detr_nb import engine, evaluation, report, score, train
from detr_nb.config import PRESETS, Config
from detr_nb.distributed import Process, world_size
from detr_nb.engine import Muon, build_model, build_optimizer
from detr_nb.runs import Run, resume, save
from detr_nb.shapes_set import write_shapes

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
    command = [*launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean_environ(), timeout=600)
    if check and result.returncode:
        raise AssertionError(
            f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        )
    return result


def together(*arguments: object, fails: bool = False, program: Sequence[str] = ("-m", "detr_nb.train")) -> str:
    "Run the launcher as two processes; returns all that they said."
    command = [*program, *map(str, arguments)]
    pair = [Child(command, environ) for environ in pair_environs()]
    said = "".join(text for process in pair for text in process.communicate(timeout=300))
    assert all(bool(process.returncode) == fails for process in pair), said[-8000:]
    return said


class Here:
    "The launcher called in this process, which saves its start; `said` is what it logged and how it ended."

    def __init__(self, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture):
        self.caplog, self.capsys, self.said = caplog, capsys, ""

    def __call__(self, *arguments: object, fails: bool = False) -> str:
        "Train or evaluate; returns what went to standard output."
        self.caplog.clear()
        self.capsys.readouterr()
        with self.caplog.at_level(logging.INFO):
            if fails:
                with pytest.raises(SystemExit) as end:
                    train.main(list(map(str, arguments)))
                assert end.value.code
            else:
                train.main(list(map(str, arguments)))
        printed = self.capsys.readouterr()
        self.said = self.caplog.text + printed.err + (str(end.value.code) if fails else "")
        return printed.out


@pytest.fixture
def here(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> Here:
    return Here(caplog, capsys)


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


def train_on_eight(shapes: Path, folder: Path, *arguments: object) -> Path:
    "Train with eight images a step in one process; returns the run folder."
    train.main(list(map(str, ["--shapes_path", shapes, "--output_dir", folder, "--batch_size", 8, *SMALL, *arguments])))
    return folder


@pytest.mark.parametrize(
    ("optimizer", "pretrain_epochs", "launcher"),
    [
        pytest.param("adamw", 0, ACCELERATE, id="AdamW, by accelerate"),
        pytest.param("adamw", 1, None, id="AdamW, the backbone alone"),
        pytest.param("adamw", 1, TORCHRUN, id="by torchrun", marks=pytest.mark.slow),
        pytest.param("muon", 0, None, id="Muon"),
    ],
)
def test_two_processes_with_half_the_batch_give_the_losses_of_one(
    optimizer, pretrain_epochs, launcher, shapes, tmp_path
):
    "In float64: there the rounding of sums in another order, which training magnifies, stays below any claim."
    program = str(ROOT / "tests/in_float64.py")
    few = ["--limit_train", 80, "--limit_val", 2, "--save_every", 0, "--optimizer", optimizer]
    few += ["--pretrain_epochs", pretrain_epochs, "--shapes_path", shapes, *SMALL]
    one, two = ([*few, "--output_dir", tmp_path / name, "--batch_size", size]
                for name, size in (("one", 8), ("two", 4)))
    alone = Child([program, *map(str, one)], clean_environ())
    assert alone.wait(timeout=300) == 0, alone.communicate()
    if launcher:
        said = launch(*two, launcher=[*launcher[:-2], program]).stdout
    else:
        said = together(*two, program=[program])
    assert "2 processes" in said
    ours, theirs = (steps(tmp_path / name)[:10] for name in ("two", "one"))
    assert {line.get("stage") for line in ours} == ({"backbone"} if pretrain_epochs else {None})
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-8)


def test_learning_happens_and_the_module_is_the_function(tmp_path):
    "Sixty steps on two images halve the loss; from Python, without a string of flags."
    config = Config().but(
        shapes_path=str(write_shapes(tmp_path / "shapes", num_train=2, num_val=2, num_workers=1)), overfit=2,
        output_dir=str(tmp_path / "run"), epochs=60, eval_every=60, pretrain_epochs=0, batch_size=2, warmup_steps=5,
        enc_layers=1, dec_layers=2, hidden_dim=64, dim_feedforward=128, report_to="none", device="cpu",
    )  # fmt: skip
    assert detr_nb.train(config) == tmp_path / "run"
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert len(losses) == 60 and losses[-1] < losses[0] / 2


def test_the_optimizer_steps_by_itself_and_with_a_closure():
    weight, other = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for parameter, closure in ((weight, False), (other, True)):
        optimizer = Muon([parameter], lr=0.1)
        if closure:
            assert optimizer.step(lambda: (other**2).sum().backward() or 16.0) == 16.0
        else:
            (weight**2).sum().backward()
            assert optimizer.step() is None
    assert torch.equal(weight, other) and not torch.equal(weight, torch.ones(4, 4))


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


def test_eval_of_a_checkpoint_gives_the_numbers_of_its_log(one_process, shapes, here):
    newest = one_process / "checkpoint.pth"
    printed = here("--shapes_path", shapes, "--eval", "--resume", newest, "--batch_size", 8, *SMALL)
    tested = json.loads(printed[printed.index("{\n") :])
    line = json.loads((one_process / "log.txt").read_text().splitlines()[-1])
    assert tested["test_coco_eval_bbox"] == pytest.approx(line["test_coco_eval_bbox"], abs=1e-6)


def tensors(path: Path) -> dict:
    "A checkpoint's contents."
    return torch.load(path, weights_only=True)


def test_with_frozen_weights_only_the_mask_head_learns(one_process, shapes, tmp_path, here):
    source = one_process / "checkpoint.pth"
    arguments = ["--masks", "--frozen_weights", source, "--dropout", "0.1", "--lr_backbone", "1e-3"]
    here("--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, *arguments)
    before, after = tensors(source)["model"], tensors(tmp_path / "checkpoint.pth")
    assert all(torch.equal(after["model"][f"detr.{name}"], tensor) for name, tensor in before.items())
    head = [name for name in after["model"] if not name.startswith("detr.")]
    assert len(after["optimizer"]["state"]) == len(head)  # all of them parameters
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert len(line["test_coco_eval_masks"]) == 12 and line["train_loss_dice"] > 0
    box_numbers = json.loads((one_process / "log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"]
    assert line["test_coco_eval_bbox"] == pytest.approx(box_numbers, abs=1e-6)


@pytest.mark.parametrize("launcher", [None, pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["here", "torchrun"])
def test_a_panoptic_run_starts_from_boxes_and_is_resumed_and_evaluated(one_process, shapes, tmp_path, here, launcher):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, "--resume", "auto"]
    learn = ["--dataset_file", "coco_panoptic", "--masks", "--finetune", one_process / "best.pth", "--keep_classes"]
    first = [*arguments, *learn, "--limit_train", 32]
    said = launch(*first, launcher=launcher).stdout if launcher else here(*first) + here.said
    assert "the rows of disc" in said and ("2 processes" in said) == bool(launcher)
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert line["test_PQ_all"]["n"] == 10 and {"test_PQ_th", "test_PQ_st"} <= line.keys()
    classes = tensors(tmp_path / "checkpoint.pth")["classes"]
    assert sum(classes["is_thing"]) == 6 and len(classes["names"]) == 10
    again = [*arguments, *learn, "--eval"]
    printed = launch(*again, launcher=launcher).stdout if launcher else here(*again)
    tested = json.loads(printed[printed.index("{\n") :])
    assert tested["test_PQ_all"]["pq"] == pytest.approx(line["test_PQ_all"]["pq"], abs=1e-6)


def test_frozen_weights_are_refused_without_masks_and_for_other_classes(one_process, shapes, tmp_path, here):
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, *SMALL]
    frozen = ["--frozen_weights", one_process / "best.pth"]
    here(*arguments, *frozen, fails=True)
    assert "needs --masks" in here.said
    here(*arguments, *frozen, "--masks", "--dataset_file", "coco_panoptic", fails=True)
    assert "Train the boxes first" in here.said


def test_a_small_set_from_scratch_is_warned_of(shapes, tmp_path, here):
    arguments = ["paper", *SMALL, "--coco_path", shapes, "--fast_dev_run", "--backbone", "small", "--no_pretrained"]
    arguments += ["--image_size", 64, "--output_dir", tmp_path]
    warning = "from scratch on 96 images"
    here(*arguments)
    assert warning in here.said
    here(*arguments, "--overfit", 2)
    assert warning not in here.said


FSDP = PRESETS["shapes"].but(enc_layers=1, dec_layers=1, hidden_dim=32, dim_feedforward=64, optimizer="adamw")


def shard(seed: int, process: Process, folder: Path) -> Run:
    "A run whose small DETR is cut up by FSDP among the processes."
    torch.manual_seed(seed)
    model = build_model(FSDP, num_classes=3)
    for layer in (*model.transformer.encoder.layers, *model.transformer.decoder.layers, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
    optimizer = build_optimizer(model, FSDP)
    categories = SimpleNamespace(num_classes=3, ids=[1, 2, 3], names=["a", "b", "c"])
    values = dict(
        config=FSDP.but(resume=str(folder / "checkpoint.pth")), process=process, folder=folder, lock=None, model=model,
        criterion=None, val_loader=None, train_loader=SimpleNamespace(dataset=SimpleNamespace(categories=categories)),
        optimizer=SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups),
        accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, scaler=None, unwrap_model=lambda x: x),
    )  # fmt: skip
    return Run(**values)


def sharded_round_trip(process: Process, folder: Path) -> torch.Tensor:
    "Take a step and save; resume into another model and save again. Returns the answers of the cut-up model."
    run, other = shard(0, process, folder), shard(1, process, folder)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    predictions = run.model(images)
    (predictions.boxes.sum() + predictions.logits.sum()).backward()
    run.optimizer.optimizer.step()
    save(run)
    torch.distributed.barrier()
    resume(other, other.config.run.resume)
    save(other, "again.pth")
    return other.model.eval()(images).logits.detach()


@pytest.mark.slow
def test_a_model_that_fsdp_has_cut_up_is_saved_whole_and_resumed(tmp_path):
    answers = spawn(sharded_round_trip, 2, tmp_path)
    first, second = tensors(tmp_path / "checkpoint.pth"), tensors(tmp_path / "again.pth")
    whole = build_model(FSDP, 3).eval()
    whole.load_state_dict(second["model"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for answer in answers:
        torch.testing.assert_close(answer, whole(images).logits.detach())
    assert all(torch.equal(x, second["model"][name]) for name, x in first["model"].items())
    for name, state in first["optimizer"]["state"].items():
        assert all(torch.equal(x, second["optimizer"]["state"][name][key]) for key, x in state.items())


def test_the_threads_are_those_that_were_asked_for(shapes, tmp_path, here):
    few = ["--fast_dev_run", "--pretrain_epochs", 0, "--num_threads", 3]
    here("--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, *few)
    assert ", 3 threads" in here.said


def test_help_is_there_at_once_and_grouped():
    "Without torch; every flag has a sentence."
    program = "import runpy, sys; sys.argv = ['x', '--help']\n"
    program += "try: runpy.run_module('detr_nb.train', run_name='__main__', alter_sys=True)\n"
    program += "finally: print('heavy', 'torch' in sys.modules or 'accelerate' in sys.modules)"
    result = launch(launcher=[sys.executable, "-c", program])
    assert "heavy False" in result.stdout
    for words in ("data options", "model options", "loss options", "optimizer options", "run options", "(paper: 1e-4)"):
        assert words in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--finetune", "nothing.pth"], "nothing.pth: there is no such file"),
        (["--coco_path", "nowhere"], "no such folder: nowhere"),
    ],
)
@pytest.mark.parametrize("launcher", [None, pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["pair", "torchrun"])
def test_what_is_wrong_with_a_command_is_said_once_by_all_processes_together(arguments, words, launcher):
    arguments = [*arguments, "--device", "cpu", "--no_pretrained"]
    if launcher:
        result = launch(*arguments, launcher=launcher, check=False)
        assert result.returncode
        said = result.stdout + result.stderr
    else:
        said = together(*arguments, fails=True)
    assert said.count(words) == 1, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--coco_path", "no/such/folder"], ["no/such/folder"]),
        (["--resume", "no/such/file.pth"], ["no/such/file.pth", "no such file"]),
        (["--resume", __file__], ["test_train.py", "not a checkpoint"]),
        (["--shapes_path", ROOT / "tests"], ["tests holds something else"]),
        (["--nheads", 3], ["over 3 heads"]),
        (["--num_queries", 0], ["at least one class and one query"]),
        (["--batch_size", 0], ["batches of 0"]),
        (["--dilation"], ["--dilation is for ResNets"]),
        (["--backbone", "resnet18", "--backbone_norm", "group", "--pretrained"], ["ResNets have batch norm"]),
    ],
)
def test_bad_input_ends_in_one_message(arguments, words, shapes, tmp_path, here):
    usual = ["--backbone", "small", "--no_pretrained", "--output_dir", tmp_path, *SMALL]
    usual += [] if "--coco_path" in arguments else ["--shapes_path", shapes]
    here(*usual, *arguments, fails=True)
    assert all(word in here.said for word in words), here.said


def test_an_image_that_a_loader_process_cannot_read_is_named_in_one_message(shapes, tmp_path, here):
    broken = tmp_path / "broken"
    shutil.copytree(shapes, broken)
    victim = sorted((broken / "train2017").iterdir())[5]
    victim.write_bytes(victim.read_bytes()[:200])
    here("--shapes_path", broken, "--output_dir", tmp_path / "run", *SMALL, "--num_workers", 1, fails=True)
    assert victim.name in here.said and "Traceback" not in here.said


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(shapes, tmp_path, here):
    arguments = ["--lr", "1e30", "--lr_backbone", "1e30", "--clip_max_norm", "0", "--warmup_steps", "0"]
    arguments += ["--pretrain_epochs", 0]
    here("--shapes_path", shapes, "--output_dir", tmp_path, "--batch_size", 8, *SMALL, *arguments, fails=True)
    assert "Traceback" not in here.said
    for words in ("not finite", "step 1", "image ids", "Learning rates", "last losses", "not_finite-0.json"):
        assert words in here.said, here.said
    report = json.loads((tmp_path / "not_finite-0.json").read_text())
    assert report["step"] == 1 and len(report["image_ids"]) == 8 and len(report["boxes"]) == sum(report["counts"])
    assert report["first_not_finite"].startswith(("the output of", "the parameter")) and report["last_losses"]


@pytest.mark.parametrize("flag", [[], ["--detect_anomaly"]], ids=["by itself", "with --detect_anomaly"])
def test_a_gradient_that_is_not_finite_is_traced(flag, shapes, tmp_path, here, monkeypatch):
    "The root of nothing has an infinite slope: the loss looks well, and the gradient, infinity times zero, does not."
    whole, folder = engine.batch_losses, tmp_path / "run"

    def broken(model: torch.nn.Module, *others: object) -> dict:
        losses = whole(model, *others)
        return losses | {"loss": losses["loss"] + (0 * next(model.parameters()).sum()).sqrt()}

    monkeypatch.setattr(engine, "batch_losses", broken)
    arguments = ["--shapes_path", shapes, "--output_dir", folder, *SMALL, "--pretrain_epochs", "0", *flag]
    if flag:
        with pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan values"):
            here(*arguments)
        torch.autograd.set_detect_anomaly(False)
    else:
        here(*arguments, fails=True)
        report = json.loads((folder / "not_finite-0.json").read_text())
        assert report["first_not_finite"].startswith("the gradient of ") and "Traceback" not in here.said


def test_tensorboard_gets_rates_losses_of_each_layer_speed_and_memory(shapes, tmp_path, here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = ["--limit_train", 24, "--limit_val", 4, "--batch_size", 8, "--pretrain_epochs", 0]
    here("--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, *few, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layers = {f"step/{name}{layer}" for name in ("loss_ce", "loss_bbox", "loss_giou") for layer in ("", "_0")}
    speed = {f"step/{name}" for name in ("data_time", "step_time", "images_per_second", "memory_mb")}
    tags = set(events.Tags()["scalars"])
    assert tags >= layers | speed | {"step/lr", "step/grad_norm", "step/loss", "train_loss", "test_loss"}
    logged = {event.step: event.value for event in events.Scalars("step/loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in steps(tmp_path)}, rel=1e-5)
    assert all(event.value > 0 for event in events.Scalars("step/images_per_second"))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_named(shapes, tmp_path, here):
    here("--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, "--report_to", "wandb", fails=True)
    assert "pip install wandb" in here.said


def test_rank_zero_alone_says_what_was_left_out(shapes, tmp_path):
    "Of a file whose first box has no width."
    root = tmp_path / "set"
    shutil.copytree(shapes, root)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    arguments = ["--shapes_path", root, "--output_dir", tmp_path / "run", *SMALL, "--fast_dev_run"]
    arguments += ["--pretrain_epochs", 0]
    assert together(*arguments).count("skipped 1 of") == 1


SCORES = [0.1, 0.3, 0.2, 0.2, 0.3, 0.1]  # of epochs: the best is the second, and nothing is better after it


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    "Evaluations that give the scores above, one after the other."
    left = list(SCORES)
    monkeypatch.setattr(train, "main_score", lambda tested: left.pop(0) if tested else -1.0)
    return left


def epochs_of(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_patience_ends_a_run_and_holds_after_resume(shapes, tmp_path, here, scored):
    "Two evaluations without a better one after the second: four epochs, whether the run was resumed or not."
    arguments = ["--shapes_path", shapes, "--batch_size", 8, *SMALL, "--pretrain_epochs", 0, "--limit_train", 8]
    arguments += ["--eval_every", 1, "--patience", 2, "--epochs", 6]
    here(*arguments, "--output_dir", tmp_path / "whole")
    assert epochs_of(tmp_path / "whole") == [0, 1, 2, 3] and scored == SCORES[4:]
    assert "best.pth is of epoch 1, with AP 0.300" in here.said
    best = tensors(tmp_path / "whole/best.pth")
    assert (best["best_ap"], best["best_epoch"], best["best_by"], best["epoch"]) == (0.3, 1, "AP", 2)
    scored[:] = SCORES
    here(*arguments, "--output_dir", tmp_path / "cut", "--epochs", 3)
    assert epochs_of(tmp_path / "cut") == [0, 1, 2]
    here(*arguments, "--output_dir", tmp_path / "cut", "--resume", "auto")
    assert epochs_of(tmp_path / "cut") == [0, 1, 2, 3] and "best.pth is of epoch 1, with AP 0.300" in here.said
    before = {path: path.read_bytes() for path in (tmp_path / "cut").iterdir() if path.is_file()}
    here(*arguments, "--output_dir", tmp_path / "cut", "--resume", "auto")
    assert "is finished: 4 epochs. Nothing to do; to train on, give more --epochs or --patience" in here.said
    assert all(path.read_bytes() == content for path, content in before.items()) and "wrote" not in here.said


def test_a_finished_run_with_other_flags_trains_nothing_and_its_settings_stay_true(one_process, shapes, tmp_path, here):
    folder = tmp_path / "run"
    shutil.copytree(one_process, folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    here("--resume", folder / "checkpoint.pth", "--lr", "1e-3", "--shapes_path", shapes)
    assert "is finished: 1 epochs" in here.said and "wrote" not in here.said
    assert all(path.read_bytes() == content for path, content in before.items())


def test_more_epochs_after_the_end_of_a_schedule_are_said_with_two_ways_out(one_process, shapes, tmp_path, here):
    "The cosine of one epoch has ended; of two it is in its middle, and the rate jumps up. Both ways are then gone."
    folder = tmp_path / "run"
    shutil.copytree(one_process, folder)
    again = ["--resume", folder / "checkpoint.pth", "--shapes_path", shapes]
    here(*again, "--epochs", 2, "--output_dir", tmp_path / "jump")
    assert "the learning rate goes on at 2.5e-04, where the run of" in here.said
    assert "--schedule step" in here.said and "--finetune" in here.said and "--keep_classes" in here.said
    here(*again, "--epochs", 2, "--output_dir", tmp_path / "keep", "--schedule", "step", "--lr_drop", 2, "--lr", "5e-5")
    rates = {line["lr"] for line in steps(tmp_path / "keep") if "lr" in line}
    assert rates == {5e-5}, "one rate, and no jump"
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path / "anew", "--batch_size", 8, *SMALL]
    here(*arguments, "--finetune", folder / "checkpoint.pth", "--keep_classes")
    assert steps(tmp_path / "anew")[0]["lr"] == pytest.approx(5e-4, rel=0.01)


def test_what_is_logged_has_the_names_and_the_weights_of_the_released_code(one_process):
    "Weighted in training and in evaluation, the bare ones beside them; and its plots read them."
    line = json.loads((one_process / "log.txt").read_text().splitlines()[-1])
    weights = {"loss_ce": 1, "loss_bbox": 3, "loss_giou": 1.2}
    for name, weight in weights.items():
        for kind in ("train", "test"):
            assert line[f"{kind}_{name}"] == pytest.approx(weight * line[f"{kind}_{name}_unscaled"], rel=1e-5)
    wanted = ("class_error", "loss_bbox_unscaled", "loss_giou_unscaled", "cardinality_error_unscaled", "loss_ce_0")
    assert all(f"{kind}_{name}" in line for kind in ("train", "test") for name in wanted)
    assert 0 <= line["test_duplicates"] <= 1


def test_a_short_run_is_looked_at_six_times_and_says_on_how_many_images(shapes, tmp_path, here):
    "Sixteen epochs of 32 images: five looks, and one evaluation, by which alone the best is chosen."
    arguments = ["--shapes_path", shapes, "--batch_size", 8, *SMALL, "--pretrain_epochs", 0, "--limit_train", 32]
    here(*arguments, "--output_dir", tmp_path, "--epochs", 16)
    assert here.said.count("a look at the first 8 of 8 validation images, AP") == 5
    assert "evaluated after every 16 epochs and the last; between them five looks at the first 8" in here.said
    assert sum("test_coco_eval_bbox" in line for line in (tmp_path / "log.txt").read_text().splitlines()) == 1
    assert "best.pth is of epoch 15" in here.said and "\r" not in here.said
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"looks.jsonl", "curves.png", "confusion.png", "worst.png", "thresholds.json", "mistakes.json"}


@pytest.mark.parametrize("frozen", ["", "boxes.pth"])
def test_of_any_length_a_run_has_six_points_in_a_twentieth_of_its_time(frozen):
    "The cost is that which 33 has measured; the last evaluation comes in any case."
    cost = 2.5 if frozen else 0.6
    for epochs in (1, 2, 3, 5, 6, 7, 9, 11, 13, 14, 50, 300):
        for num_train, num_val in ((2500, 300), (5000, 500), (5000, 5000), (118_287, 5000)):
            config = PRESETS["shapes"].but(epochs=epochs, frozen_weights=frozen)
            every, few = score.plan_evaluations(config, num_train, num_val)
            whole, looks = -(-epochs // every), 5 * bool(few)
            assert whole + looks >= 6 and few <= num_val, (epochs, num_train, num_val)
            assert cost * ((whole - 1) * num_val + looks * few) <= epochs * num_train / 20


def test_a_run_of_the_preset_says_what_to_expect_and_no_other_does():
    "Its log line names the loss of the reference at this epoch, and the AP where that was evaluated."
    run = SimpleNamespace(config=PRESETS["shapes"], epoch=7, train_loader=SimpleNamespace(dataset=range(5000)))
    assert report.expected(run) == " (reference at this epoch: loss 3.99, AP 0.375)"
    run.epoch = 0
    assert report.expected(run) == " (reference at this epoch: loss 13.14)"
    for other in (run.config.but(lr=1e-3), run.config.but(coco_path="coco"), run.config.but(masks=True)):
        assert report.expected(SimpleNamespace(**vars(run) | {"config": other})) == ""
    run.train_loader.dataset = range(96)
    assert report.expected(run) == ""


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker_that_is_missing_is_refused_with_what_to_install(tracker, shapes, tmp_path, here, monkeypatch):
    find = engine.find_spec
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == tracker else find(name))
    here("--shapes_path", shapes, "--output_dir", tmp_path / "run", *SMALL, "--report_to", tracker, fails=True)
    assert f"--report_to {tracker} needs a package: pip install {tracker}" in here.said
    assert not (tmp_path / "run").exists()


TRACKIO = """
import json, pathlib
def note(*what):
    with open(pathlib.Path(__file__).with_name("said.jsonl"), "a") as file:
        file.write(json.dumps(what) + chr(10))
class config:
    update = staticmethod(lambda values, **settings: note("config", values))
class Run:
    log = staticmethod(lambda values, step=None: note(step, values))
    finish = staticmethod(lambda: note("finish"))
def init(project, **settings):
    note("init", project)
    return Run
"""


def test_a_tracker_is_told_settings_steps_scores_and_the_end(shapes, tmp_path, monkeypatch):
    "A stand-in for trackio, with the four calls that accelerate makes."
    packages = tmp_path / "packages"
    (packages / "trackio").mkdir(parents=True)
    (packages / "trackio/__init__.py").write_text(TRACKIO)
    (packages / "trackio-1.0.dist-info").mkdir()
    (packages / "trackio-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path / "run", "--batch_size", 8, *SMALL]
    launch(*arguments, "--limit_train", 16, "--pretrain_epochs", 0, "--report_to", "trackio")
    said = [json.loads(line) for line in (packages / "trackio/said.jsonl").read_text().splitlines()]
    assert said[0] == ["init", "detr_nb"] and said[1][1]["batch_size"] == 8 and said[-1] == ["finish"]
    assert [step for step, values in said[2:-1] if "step/loss" in values] == [0, 1]
    assert any("test_loss" in values for _, values in said[2:-1])


def test_a_library_for_the_scores_that_is_missing_is_refused_and_auto_does_without(shapes, tmp_path, here, monkeypatch):
    for module in (score, evaluation):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    arguments = ["--shapes_path", shapes, "--output_dir", tmp_path, *SMALL, "--fast_dev_run", "--pretrain_epochs", 0]
    here(*arguments, "--evaluator", "faster_coco_eval", fails=True)
    assert "pip install faster-coco-eval" in here.said
    here(*arguments)
    assert "AP 0." in here.said
