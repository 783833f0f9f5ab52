"""How a run starts and ends: the shipped configurations, the script for SLURM, the trainer in several processes."""

import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, prepare_multi_gpu_env
from PIL import Image
from test_distributed import clean_environ, open_process, slurm_environ

from detr_nb.batching import make_loader
from detr_nb.coco import CocoDataset
from detr_nb.detr import build_detr
from detr_nb.evaluation import CocoEvaluator, evaluate
from detr_nb.pretrained import load_detector
from detr_nb.transforms import paper_transform

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ROOT / "configs/accelerate"
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
JOB = os.getpid() * 10  # SLURM's job numbers, from which the port is made; each test its own

WHO = """
import json, os
from detr_nb.distributed import gather_objects, start, stop
process = start("auto")
everybody = gather_objects([process.rank, process.local_rank, process.launcher])
stop()
if process.is_main:
    os.write(1, (json.dumps(everybody) + chr(10)).encode())
"""


# --- configurations


def read_config(name: str) -> ClusterConfig:
    "A shipped configuration, read by accelerate; an unknown key in it is an error there."
    return load_config_from_file(str(ACCELERATE / f"{name}.yaml"))


def launch_arguments(*arguments: str) -> Namespace:
    "What `accelerate launch` makes of a command line."
    return _validate_launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))[0]


@pytest.mark.parametrize(
    ("name", "processes", "machines", "cpu", "group"),
    [
        ("one_cpu", 1, 1, True, False),
        ("two_cpu", 2, 1, True, True),
        ("one_gpu", 1, 1, False, False),
        ("eight_gpus", 8, 1, False, True),
        ("several_nodes", 16, 2, False, True),
    ],
)
def test_accelerate_reads_a_configuration_as_meant(name, processes, machines, cpu, group):
    config = read_config(name)
    assert (config.num_processes, config.num_machines, config.use_cpu) == (processes, machines, cpu)
    arguments = launch_arguments("--config_file", str(ACCELERATE / f"{name}.yaml"))
    assert (arguments.num_processes, arguments.num_machines, arguments.multi_gpu) == (processes, machines, group)
    assert arguments.mixed_precision == "no", "--mixed_precision of the program decides"
    assert bool(arguments.use_cpu) == cpu


def test_fsdp_wraps_the_layers_of_our_transformer(monkeypatch):
    arguments = launch_arguments("--config_file", str(ACCELERATE / "fsdp.yaml"))
    assert arguments.use_fsdp and arguments.num_processes == 8
    for name, value in prepare_multi_gpu_env(arguments).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    sizes = dict(hidden_dim=16, nheads=2, enc_layers=2, dec_layers=3, dim_feedforward=16, num_queries=5)
    detr = build_detr(3, backbone="small", norm="group", pretrained=False, **sizes)
    plugin.set_auto_wrap_policy(detr)  # an unknown class name is an error
    wraps = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert sum(isinstance(module, tuple(wraps)) for module in detr.modules()) == 2 + 3
    assert plugin.fsdp_version == 2 and "FULL" in str(plugin.state_dict_type)


@pytest.mark.parametrize(("name", "processes"), [("one_cpu", 1), ("two_cpu", 2)])
def test_the_configurations_for_cpus_start_as_many_processes_as_they_say(name, processes, tmp_path):
    (tmp_path / "who.py").write_text(WHO)
    process = open_process(clean_environ(), *LAUNCH, str(ACCELERATE / f"{name}.yaml"), str(tmp_path / "who.py"))
    output, errors = process.communicate(timeout=120)
    launcher = "torchrun" if processes > 1 else "alone"
    assert json.loads(output) == [[rank, rank, launcher] for rank in range(processes)], errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_configuration_for_several_nodes_joins_two_machines(tmp_path):
    "Both are this one, with one process each, on the CPU."
    (tmp_path / "who.py").write_text(WHO)
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    command = [*LAUNCH, str(ACCELERATE / "several_nodes.yaml"), *place, "--num_processes", "2"]
    environ = clean_environ(ACCELERATE_USE_CPU="true")
    nodes = [
        open_process(environ, *command, "--machine_rank", str(node), str(tmp_path / "who.py")) for node in range(2)
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert json.loads(outputs[0][0]) == [[0, 0, "torchrun"], [1, 0, "torchrun"]], outputs


# --- the script for SLURM

FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    "srun": """
echo "srun $*" >> "$CALLS"
trap 'echo "task got USR1" >> "$CALLS"; exit "${CODE#wait }"' USR1
trap 'echo "tasks were killed" >> "$CALLS"; exit 137' TERM
echo up > "$UP"
[ "${CODE% *}" = wait ] || exit "$CODE"
for _ in $(seq 300); do sleep 0.1; done
""",
}


class Slurm:
    """A cluster of one machine: the script, with an srun and a scontrol that only write down how they were called.

    As the real one does, srun passes SIGUSR1 on, and kills its tasks when it gets SIGTERM ("forcing job termination").
    """

    def __init__(self, folder: Path):
        self.folder, self.calls, self.up = folder, folder / "calls", folder / "up"
        for name, body in FAKES.items():
            path = folder / name
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, code: str, *arguments: str, restarts: int = 0) -> subprocess.Popen:
        "The script as SLURM starts it; its program exits with that code, or upon a signal."
        self.up.unlink(missing_ok=True)
        self.calls.unlink(missing_ok=True)
        environ = clean_environ(SLURM_JOB_ID="4242", SLURM_JOB_NAME="detr", SLURM_RESTART_COUNT=str(restarts))
        environ |= {"PATH": f"{self.folder}:{environ['PATH']}", "CALLS": str(self.calls), "UP": str(self.up)}
        script = [str(ROOT / "configs/slurm/train.sbatch"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = subprocess.Popen(script, env=environ | {"CODE": code}, cwd=self.folder, **pipes)
        while not self.up.exists() and job.poll() is None:
            time.sleep(0.02)
        return job


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_reaches_the_program_and_the_job_is_queued_again(slurm, name):
    job = slurm.start("wait 75", "--coco_path", "data/two words")
    job.send_signal(getattr(signal, f"SIG{name}"))
    output, _ = job.communicate(timeout=60)
    started, told, queued = slurm.calls.read_text().splitlines()
    assert job.returncode == 75, output
    assert "python -m detr_nb.train" in started and "--resume auto --coco_path data/two words" in started
    assert "--output_dir runs/detr-4242" in started, "the same folder after a requeue, since the job keeps its number"
    assert (told, queued) == ("task got USR1", "scontrol requeue 4242")
    assert f"got SIG{name}: the program finishes its step" in output and "asks to be queued again" in output


def test_after_a_signal_any_other_end_is_queued_again_as_well(slurm):
    "torchrun and `accelerate launch` end with 1 whatever the program's code was."
    job = slurm.start("wait 1")
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75 and slurm.calls.read_text().splitlines()[-1] == "scontrol requeue 4242", output


@pytest.mark.parametrize("code", [0, 1, 137])
def test_a_run_that_is_done_or_has_failed_is_not_queued_again(slurm, code):
    job = slurm.start(str(code), restarts=2)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code and f"ended with code {code}" in output and "start number 3" in output
    assert "scontrol" not in slurm.calls.read_text()


def test_slurm_reads_every_option_of_the_script():
    lines = (ROOT / "configs/slurm/train.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options and max(options) < first, "sbatch stops reading options at the first command"
    assert any("--signal=B:USR1@120" in lines[number] for number in options)
    assert any("--requeue" in lines[number] for number in options)


# --- waiting

OUTLAST = """
import time
from detr_nb.distributed import on_main, start, stop
process = start("cpu", timeout_s=6)
told = on_main(lambda: time.sleep(8) or process.rank)
stop()
assert told == 0
"""


@pytest.mark.slow
def test_work_on_rank_zero_may_outlast_the_time_out_of_collectives():
    processes = [open_process(slurm_environ(rank, 2, JOB + 8), "-c", OUTLAST) for rank in range(2)]
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


# --- the trainer itself

SMALL = [
    "--enc_layers", "1", "--dec_layers", "2", "--hidden_dim", "64", "--dim_feedforward", "128", "--dropout", "0",
    "--num_queries", "110", "--num_workers", "0", "--no_group_by_shape", "--log_every", "1", "--report_to", "none",
    "--device", "cpu", "--mixed_precision", "no", "--backbone", "small", "--backbone_norm", "group", "--no_pretrained",
    "--image_size", "96", "--epochs", "3", "--eval_every", "3", "--optimizer", "adamw",
]  # fmt: skip


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    "Eight images of which every other one has no object, and the others a hundred."
    root, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": 64, "width": 64})
        for _ in range(100 * (number % 2)):
            x, y, w, h = (*rng.uniform(0, 40, 2), *rng.uniform(6, 20, 2))
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "bbox": [x, y, w, h], "area": w * h,
                                "category_id": int(rng.integers(1, 4)), "iscrowd": 0})
    categories = [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


TRAIN = """
import os, sys, time
from detr_nb import coco, train
read, calls = coco.CocoDataset.__getitem__, []
def changed(self, index):
    calls.append(index)
    if os.environ.get("RANK") == "1" and len(calls) == 3:
        CHANGE
    return read(self, index)
coco.CocoDataset.__getitem__ = changed
train.main(sys.argv[1:])
"""


def arguments_for(folder: Path, uneven: Path, batch_size: int, *more: object) -> list[str]:
    "The trainer's command line."
    data = ["--train_annotations", uneven / "annotations.json", "--val_annotations", uneven / "annotations.json"]
    return [str(part) for part in (*data, "--output_dir", folder / "run", "--batch_size", batch_size, *SMALL, *more)]


def train(folder: Path, arguments: list[str], processes: int = 1, change: str = "pass") -> str:
    "Run the trainer, alone or by torchrun; `change` is what rank 1 does before it reads its third image."
    (folder / "train.py").write_text(TRAIN.replace("CHANGE", change))
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    process = open_process(clean_environ(), *launcher[: 4 * (processes > 1)], str(folder / "train.py"), *arguments)
    output, errors = process.communicate(timeout=400)
    if process.returncode:
        raise RuntimeError(errors)
    return output


def read_losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run/steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(uneven, tmp_path_factory) -> Path:
    "The folder of one process."
    folder = tmp_path_factory.mktemp("alone")
    train(folder, arguments_for(folder, uneven, 2))
    return folder


@pytest.mark.slow
def test_no_objects_here_and_a_hundred_there_and_a_slow_rank_give_the_losses_of_one_process(alone, uneven, tmp_path):
    train(tmp_path, arguments_for(tmp_path, uneven, 1), 2, change="time.sleep(30)")
    losses = read_losses(tmp_path)
    assert len(losses) == 12 and losses == pytest.approx(read_losses(alone), rel=1e-5)


@pytest.mark.slow
def test_srun_starts_the_same_run(alone, uneven, tmp_path):
    arguments = arguments_for(tmp_path, uneven, 1)
    environs = [slurm_environ(rank, 2, JOB + 9) for rank in range(2)]
    tasks = [open_process(environ, "-m", "detr_nb.train", *arguments) for environ in environs]
    outputs = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert read_losses(tmp_path) == pytest.approx(read_losses(alone), rel=1e-5)


@pytest.mark.slow
def test_one_two_and_four_processes_with_the_same_global_batch_give_the_same_losses_and_ap(uneven, tmp_path):
    "Twenty steps of four images."
    losses, aps = [], []
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        more = ("--epochs", 10, "--eval_every", 10)
        train(folder, arguments_for(folder, uneven, 4 // processes, *more), processes)
        losses.append(read_losses(folder))
        aps.append(json.loads((folder / "run/log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"])
    assert len(losses[0]) == 20
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)
        assert aps[other] == pytest.approx(aps[0], abs=1e-3)


def from_own_detections(checkpoint: Path, uneven: Path, path: Path) -> Path:
    "Annotations near the ten best detections of each image, so that AP is neither zero nor one."
    dataset = CocoDataset(uneven, uneven / "annotations.json", transform=paper_transform(train=False, scale=96 / 800))
    evaluator, model = CocoEvaluator(dataset), load_detector(checkpoint).model
    evaluate(model, make_loader(dataset, 4, shuffle=False), evaluator, "cpu")
    content, rng = json.loads((uneven / "annotations.json").read_text()), np.random.default_rng(1)
    content["annotations"] = annotations = []
    evaluator.write_detections(path)
    results = json.loads(path.read_text())
    results.sort(key=lambda result: (result["image_id"], -result["score"]))
    for _, of_image in itertools.groupby(results, key=lambda result: result["image_id"]):
        for result in list(of_image)[:100:10]:
            box = [max(value, 1.0) for value in (np.array(result["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist()]
            annotations.append({"id": len(annotations) + 1, "image_id": result["image_id"], "bbox": box,
                                "area": box[2] * box[3], "category_id": result["category_id"], "iscrowd": 0})
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_a_checkpoint_has_the_same_twelve_numbers_with_one_two_and_three_processes(alone, uneven, tmp_path):
    truth = from_own_detections(alone / "run/checkpoint.pth", uneven, tmp_path / "truth.json")
    more = ("--eval", "--resume", alone / "run/checkpoint.pth", "--val_annotations", truth, "--val_images", uneven)
    numbers = []
    for processes in (1, 2, 3):
        output = train(tmp_path, arguments_for(tmp_path, uneven, 2, "--train_images", uneven, *more), processes)
        numbers.append(json.loads(output[output.index("{\n") :])["test_coco_eval_bbox"])
    assert 0.02 < numbers[0][0] < 0.98
    for other in (1, 2):
        assert numbers[other] == pytest.approx(numbers[0], abs=1e-3)


@pytest.mark.slow
def test_an_error_in_a_training_ends_it_and_is_shown(uneven, tmp_path):
    with pytest.raises(RuntimeError) as failure:
        train(tmp_path, arguments_for(tmp_path, uneven, 1), 2, change="raise KeyError('a label')")
    errors = str(failure.value)
    root_cause = errors.split("Root Cause")[1]
    assert "(local_rank: 1)" in root_cause and "KeyError: 'a label'" in root_cause, errors
