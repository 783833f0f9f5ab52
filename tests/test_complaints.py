"What breaks in other people's trainers, each with a test that it cannot break here; the names are the complaints."
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from book_demos import spawn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from detr_nb import convert, engine, predict, train
from detr_nb.batching import Batch, collate
from detr_nb.checkpoints import load_checkpoint, save_checkpoint
from detr_nb.coco import Sample
from detr_nb.config import PRESETS, Config
from detr_nb.detector import load
from detr_nb.distributed import Process, UserError
from detr_nb.engine import NotFinite, build_criterion, build_model, build_optimizer, check_settings, train_step
from detr_nb.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore::detr_nb.annotations.DataWarning")
IDS = {42: "platelet", 7: "cell"}  # as the file lists them
PICTURES = [(60, 80), (80, 60), (64, 64), (40, 120), (64, 64), (90, 60)]  # (height, width); object counts are 0 to 5
QUIET = ["--device", "cpu", "--num_workers", "0", "--report_to", "none", "--num_threads", "1", "--log_every", "1"]
TINY = ["--backbone", "small", "--backbone_norm", "group", "--no_pretrained", "--enc_layers", "1", "--dec_layers", "2",
        "--hidden_dim", "32", "--dim_feedforward", "32", "--nheads", "4", "--num_queries", "12", "--temperature", "20",
        "--image_size", "64", "--epochs", "2", "--batch_size", "2"]  # fmt: skip


def write_set(folder: Path) -> Path:
    "A small set in COCO's layout with masks, of pictures of several shapes; returns its folder."
    rng = np.random.default_rng(0)
    categories = [{"id": key, "name": name} for key, name in IDS.items()]
    for split in ("train", "val"):
        content = {"images": [], "annotations": [], "categories": categories}
        (folder / f"{split}2017").mkdir(parents=True)
        for number, (height, width) in enumerate(PICTURES, start=1):
            pixels = np.full((height, width, 3), 220, dtype=np.uint8)
            for _ in range(number - 1):
                (x, y), (w, h) = rng.integers(0, 30, 2).tolist(), rng.integers(8, 20, 2).tolist()
                key = int(rng.choice(list(IDS)))
                w, h = min(w, width - x), min(h, height - y)
                pixels[y : y + h, x : x + w] = 4 * key
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": key, "iscrowd": 0,
                    "bbox": [x, y, w, h], "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
            name = f"{number:012d}.png"
            Image.fromarray(pixels).save(folder / f"{split}2017" / name)
            content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        path = folder / f"annotations/instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def go(pictures, tmp_path, caplog) -> Callable[..., str]:
    "Trains on the pictures into a folder of that name; returns what was logged, and the message it ended with."

    def go(name: str, *flags: object, fails: bool = False) -> str:
        caplog.clear()
        words = ["--coco_path", pictures, "--output_dir", tmp_path / name, *TINY, *QUIET, *flags]
        with caplog.at_level("INFO", "detr_nb"):
            if not fails:
                train.main(list(map(str, words)))
                return caplog.text
            with pytest.raises(SystemExit) as end:
                train.main(list(map(str, words)))
        return f"{caplog.text}{end.value.code}"

    return go


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


# ---- "It ran for two days and then CUDA was out of memory"


def prepared(go: Callable, monkeypatch: pytest.MonkeyPatch, *flags: object) -> Run:
    "A run that is ready for its first step."
    found = []

    def stop_here(run: Run) -> None:
        found.append(run)
        raise SystemExit(3)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_rehearse", stop_here)
        go("prepared", *flags, fails=True)
    found[0].lock.release(force=True)
    return found[0]


@pytest.mark.parametrize("flags", [
    [], ["--batch_size", 1], ["--masks", "--batch_size", 3], ["--image_size", 40, "--group_by_shape"],
    ["--overfit", 4], ["--limit_train", 3]], ids=lambda flags: " ".join(map(str, flags)) or "as it is")
def test_no_batch_is_larger_than_the_one_of_the_first_step(flags, go, monkeypatch):
    "Nor much smaller, in many epochs of crops and sizes at random."
    run = prepared(go, monkeypatch, *flags)
    worst = train._largest_batch(run)
    sides, most, pixels = [0, 0], 0, 0
    for epoch in range(60):
        run.train_loader.batch_sampler.set_epoch(epoch, 0)
        for batch in run.train_loader:
            sides = [max(pair) for pair in zip(sides, batch.images.shape[2:])]
            most, pixels = max(most, int(batch.targets.counts.max())), max(pixels, batch.images.numel())
            assert (batch.targets.masks is None) == (worst.targets.masks is None)
    assert len(worst.images) == run.config.optimizer.batch_size and int(worst.targets.counts.min()) == most
    assert 0.65 * worst.images.numel() < pixels <= worst.images.numel()
    if len(worst.images) > 1:
        assert all(0.8 * limit < side <= limit for side, limit in zip(sides, worst.images.shape[2:]))


def test_memory_runs_out_at_the_first_step_or_never_and_the_peak_is_said(go, tmp_path, monkeypatch):
    "On a device that holds so many pixels at a time; from too few for any step to just enough."
    step, ended = engine.batch_losses, []
    for room in (10_000, 40_000, 50_000, 60_000, 64_151, 64_152):
        def on_the_device(model, criterion, accelerator, batch, *rest, room=room):
            if batch.images.numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(model, criterion, accelerator, batch, *rest)

        monkeypatch.setattr(train, "batch_losses", on_the_device)
        monkeypatch.setattr(engine, "batch_losses", on_the_device)
        folder, enough = tmp_path / str(room), room == 64_152
        said = go(str(room), fails=not enough)
        ended.append((folder / "log.txt").exists())
        largest = "the largest step, 2 images of 99 x 108 pixels with 5 objects each"
        if enough:
            assert re.search(rf"{largest}: \d+\.\d GB of memory", said) and len(losses_of(folder)) == 6
        else:
            assert f"{largest}, does not fit into the memory of cpu: lower --batch_size" in said
            assert not (folder / "steps.jsonl").exists() and not list(folder.glob("*.pth"))
    assert ended == [False] * 5 + [True]


def test_the_first_step_leaves_no_trace_in_the_run(go, tmp_path, monkeypatch):
    "Neither in weights and moments, nor in batch norms' means, nor in the dice of dropout and crops."
    flags = ["--backbone", "resnet18", "--backbone_norm", "batch", "--dropout", 0.2, "--ema", 0.9, "--masks"]
    go("with", *flags)
    monkeypatch.setattr(train, "_rehearse", lambda run: None)
    go("without", *flags)
    first, second = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("with", "without"))
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    for key in ("model", "ema"):
        assert all(torch.equal(tensor, second[key][name]) for name, tensor in first[key].items())
    assert any(name.endswith("running_mean") for name in first["model"])


# ---- "Expected to have finished reduction in the prior iteration: unused parameters"

SMALLEST = PRESETS["paper"].but(enc_layers=1, dec_layers=2, hidden_dim=32, nheads=4, dim_feedforward=16, num_queries=5,
                                pretrained=False, backbone="small", backbone_norm="group")  # fmt: skip
BACKBONES = {
    "small": dict(backbone="small", backbone_norm="group"),
    "resnet18": dict(backbone="resnet18", backbone_norm="frozen"),
    "resnet18-batch": dict(backbone="resnet18", backbone_norm="batch"),
    "timm-lite0": dict(backbone="timm/tf_efficientnet_lite0", backbone_norm="frozen"),
    "timm-hrnet": dict(backbone="timm/hrnet_w18_small", backbone_norm="batch"),  # its last map needs not all of it
}
MASKS = {"boxes": {}, "masks": dict(masks=True), "frozen": dict(masks=True, frozen_weights="boxes.pth")}
FLAGS = dict(aux_loss=(True, False), pre_norm=(True, False), position_embedding=("sine", "learned"),
             dec_layers=(1, 2), enc_layers=(0, 1), lr_backbone=(1e-5, 0), optimizer=("adamw", "muon"),
             dilation=(False, True))  # fmt: skip


def combinations(backbone: str) -> list[dict]:
    "Every combination of the flags that this backbone has."
    flags = FLAGS if backbone in ("resnet18", "resnet18-batch", "timm-lite0") else FLAGS | dict(dilation=(False,))
    return [dict(zip(flags, values)) for values in itertools.product(*flags.values())]


def some_batch(counts: Sequence[int], masks: bool) -> Batch:
    "Images of different heights with as many objects."
    samples = []
    for place, count in enumerate(counts):
        size = (32 - 8 * place, 32)
        boxes = torch.tensor([[4.0, 4, 16, 16]]).repeat(count, 1) + torch.arange(count)[:, None]
        painted = torch.ones(count, *size, dtype=torch.bool) if masks else None
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        samples.append(Sample(image, torch.zeros(count, dtype=torch.int64), boxes, place, size, painted))
    return collate(samples)


def loss_of(model: torch.nn.Module, bare: torch.nn.Module, config: Config, counts: Sequence[int]) -> torch.Tensor:
    "The loss of a batch, as the trainer takes it."
    accelerator = SimpleNamespace(unwrap_model=lambda model: bare, autocast=nullcontext)
    batch, criterion = some_batch(counts, config.model.masks), build_criterion(config, 2)
    return engine.batch_losses(model, criterion, accelerator, batch, None, config.loss.aux_loss)["loss"]


def without_gradient(config: Config) -> list[str]:
    "What is to learn and gets no gradient, or is to learn and is in no group of the optimizer; with objects or none."
    torch.manual_seed(0)
    model, found = build_model(config, 2).train(), []
    groups = build_optimizer(model, config).param_groups
    learns = {id(parameter) for group in groups for parameter in group["params"]}
    assert learns
    for counts in ([2, 1], [0, 0]):
        model.zero_grad()
        loss_of(model, model, config, counts).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (id(parameter) in learns) or parameter.requires_grad != (
                    parameter.grad is not None):
                found.append(f"{name} with {counts} objects")
    return found


@pytest.mark.filterwarnings("ignore:.*random weights and frozen batch norm")
@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["every seventh", "all"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_that_learns_gets_a_gradient_with_every_combination_of_flags(backbone, masks, share):
    "Nothing else is in the optimizer, either; with no objects in the batch, too."
    if "timm" in BACKBONES[backbone]["backbone"]:
        pytest.importorskip("timm")
    combined = combinations(backbone)[::share]
    assert all({settings[name] for settings in combined} == set(values) for name, values in FLAGS.items()
               if name != "dilation")
    wrong = {str(settings): found for settings in combined if (found := without_gradient(
        SMALLEST.but(**BACKBONES[backbone], **MASKS[masks], **settings)))}
    assert not wrong, f"{len(wrong)} of {len(combined)}: {next(iter(wrong.items()))}"


def steps_beside_nobody(process: Process, settings: dict) -> list[float]:
    "Three steps of a process whose images have no objects in turn with the other's."
    torch.manual_seed(0)
    config = SMALLEST.but(**settings)
    bare = build_model(config, 2).train()
    optimizer = build_optimizer(bare, config)
    model, norms = DistributedDataParallel(bare), []
    for step in range(3):
        counts = [3, 1] if step % 2 == process.rank else [0, 0]
        loss_of(model, bare, config, counts).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in bare.parameters() if p.grad is not None]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("settings", [
    dict(), dict(masks=True), dict(aux_loss=False, position_embedding="learned", dec_layers=1),
    dict(masks=True, frozen_weights="boxes.pth", lr_backbone=0),
    pytest.param(dict(BACKBONES["timm-hrnet"], aux_loss=False), id="timm-hrnet")], ids=str)
def test_a_process_without_objects_does_not_stop_the_other(settings):
    "DistributedDataParallel would raise at the second step where a parameter took no part in the first."
    if "timm" in settings.get("backbone", ""):
        pytest.importorskip("timm")
    first, second = spawn(steps_beside_nobody, 2, settings)
    assert first == second and len(first) == 3 and all(norm > 0 for norm in first)


# ---- "I resumed with other settings, and do not know what I have now"


@pytest.fixture(scope="module")
def begun(pictures, tmp_path_factory) -> Path:
    "The folder of a run that has come to its end."
    folder = tmp_path_factory.mktemp("begun") / "run"
    train.main(list(map(str, ["--coco_path", pictures, "--output_dir", folder, *TINY, *QUIET])))
    return folder


@pytest.mark.parametrize("flags, says", [
    (["--batch_size", 3], ["--batch_size was 2", "is 3 now", "batches of 2 images were saved, they have 3 now",
                           "what was learned is kept, going on at batch 0 of epoch 2 as step 4"]),
    (["--accumulate", 2], ["--accumulate was 1", "(1, now 2, to a step): what was learned is kept"]),
    (["--batch_size", 1, "--accumulate", 2], ["they have 1 now (1, now 2, to a step)", "as step 6"]),
    (["--optimizer", "muon"], ["--optimizer was adamw", "is muon now", "its means begin anew; weights, epoch, step and "
                               "the best score are kept"]),
    (["--optimizer", "muon", "--accumulate", 2], ["its means begin anew", "(1, now 2, to a step)"]),
    (["--lr_backbone", 0], ["--lr_backbone was 1e-05", "learns other parts", "its means begin anew"]),
    (["--ema", 0.9], ["--ema was 0.0", "is 0.9 now"]),
], ids=lambda words: " ".join(map(str, words)) if str(words[0]).startswith("--") else "")
def test_a_run_resumed_with_other_settings_says_what_changed_and_keeps_the_rest(flags, says, begun, go, tmp_path,
                                                                                monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = load_checkpoint(folder / "checkpoint.pth")
    found = []
    monkeypatch.setattr(train, "_rehearse", lambda run: found.append({
        name: tensor.clone() for name, tensor in run.bare_model.state_dict().items()}))
    said = go("run", "--resume", folder / "checkpoint.pth", "--epochs", 3, *flags)
    for words in says:
        assert words in said
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in before["model"].items())
    after = load_checkpoint(folder / "checkpoint.pth")
    assert after["epoch"] == 3 and len((folder / "log.txt").read_text().splitlines()) == 3
    assert after["optimizer"]["state"] and any(
        not torch.equal(tensor, after["model"][name]) for name, tensor in before["model"].items())
    if "begin anew" not in "".join(says):
        taken, in_all = (state["optimizer"]["state"][0]["step"] for state in (before, after))
        assert "begin anew" not in said and in_all > taken > 0


def test_a_run_whose_model_is_another_is_not_resumed(begun, go):
    for flags in (["--backbone", "resnet18"], ["--hidden_dim", 64], ["--masks"]):
        assert "does not fit the model of this command line" in go(
            "run", "--resume", begun / "checkpoint.pth", "--epochs", 3, *flags, fails=True)


# ---- "My classes are 7 and 42, and it predicts 0 and 1"


def check_ids(found: Sequence[dict]) -> None:
    assert found and {entry["category_id"] for entry in found} <= set(IDS)


def test_ids_stay_the_data_sets_own_from_training_to_predictions(begun, pictures, go, tmp_path):
    "Of the run, of its checkpoint, of one that an older version wrote, of finetuned ones, of a folder of transformers."
    check_ids(json.loads((begun / "detections_bbox.json").read_text()))
    state = load_checkpoint(begun / "best.pth")
    older = {key: state[key] for key in ("format", "version", "epoch", "step", "model", "config", "architecture")}
    older |= {"classes": {key: state["classes"][key] for key in ("ids", "names")},
              "preprocessing": {key: state["preprocessing"][key] for key in ("short_side", "max_size")}}
    save_checkpoint(tmp_path / "older.pth", older)
    go("finetuned", "--finetune", begun / "best.pth", "--keep_classes")
    go("resumed", "--resume", begun / "checkpoint.pth", "--epochs", 3)
    scores = []
    for source in (begun, begun / "best.pth", tmp_path / "older.pth", tmp_path / "finetuned", tmp_path / "resumed"):
        detector = load(source)
        result = detector(pictures / "val2017/000000000006.png", threshold=0.0, device="cpu")
        assert [IDS[key] for key in result.category_ids] == list(result.names)
        assert dict(zip(detector.category_ids, detector.names)) == IDS
        scores.append(result.scores)
        predict.main([str(pictures / "val2017"), "--weights", str(source), "--threshold", "0", "--no_pictures",
                      "--output", str(tmp_path / "out"), "--device", "cpu", "--num_workers", "0"])
        written = json.loads((tmp_path / "out/detections.json").read_text())
        assert {entry["id"]: entry["name"] for entry in written["categories"]} == IDS
        check_ids(written["annotations"])
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_ids_stay_through_the_folder_of_another_program(go, tmp_path):
    flags = ["--backbone", "resnet18", "--backbone_norm", "batch", "--temperature", 10000, "--fast_dev_run"]
    go("run", *flags)
    convert.main([str(tmp_path / "run"), str(tmp_path / "theirs"), "--to", "transformers"])
    detector = load(tmp_path / "theirs")
    assert dict(zip(detector.category_ids, detector.names)) == IDS


# ---- "The warm-up was longer than the training", "the rate never dropped", "float16 gave NaN"


@pytest.mark.parametrize("flags, warmup, says", [
    (["--epochs", 10, "--warmup_steps", 100], 3, "--warmup_steps 100 is more than a tenth of the run: it is 3"),
    (["--epochs", 10, "--warmup_steps", 3, "--lr_drop", 9], 3, None),
    (["--epochs", 1, "--warmup_steps", 2], 1, "it is 1"),
    (["--epochs", 10, "--lr_drop", 10], 0, "--lr_drop 10: the learning rate never drops in 10 epochs"),
    (["--epochs", 10, "--lr_drop", 9], 0, None),
    (["--epochs", 10, "--lr_drop", 10, "--schedule", "cosine"], 0, None),
], ids=lambda words: " ".join(map(str, words)) if isinstance(words, list) else "")
def test_warm_up_and_drops_fit_the_run(flags, warmup, says, go, monkeypatch, caplog):
    run = prepared(go, monkeypatch, *flags)
    assert run.config.optimizer.warmup_steps == warmup
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = " ".join(text for text in told if "warmup" in text or "lr_drop" in text)
    assert (says in told) if says else told == ""
    steps = run.config.optimizer.epochs * run.steps_per_epoch
    rates = [engine.rate_factor(step, run.steps_per_epoch, run.config) for step in range(steps)]
    assert max(rates) > 0.97  # the rate that was asked for is reached, or nearly, where a cosine begins
    if "--lr_drop" in flags and not told and "cosine" not in flags:
        assert rates[-1] == pytest.approx(0.1)


def test_half_precision_is_refused_where_it_cannot_work(monkeypatch):
    wanted = PRESETS["paper"].but(coco_path="x", mixed_precision="fp16", report_to="none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp16 is for GPUs: use bf16, or no"):
        check_settings(wanted)
    check_settings(wanted.but(mixed_precision="bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_settings(wanted)


class Float16:
    "What accelerate does for float16 on a GPU, on this CPU: gradients too large for it, steps that are left out."

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.scaler, self.optimizer, self.num_processes = torch.amp.GradScaler("cpu", init_scale=2.0**16), optimizer, 1
        self.autocast, self.unwrap_model = nullcontext, lambda model: model

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad.half().float()  # which is where float16 overflows

    def clip_grad_norm_(self, parameters: Sequence, limit: float) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_float16_with_many_layers_leaves_out_steps_that_overflow_and_never_learns_from_them():
    "The first steps overflow and change nothing; the scale falls until they fit; a loss that is none ends the run."
    torch.manual_seed(0)
    config = SMALLEST.but(enc_layers=6, dec_layers=6, lr=1e-3)
    model = build_model(config, 2).train()
    accelerator = Float16(build_optimizer(model, config))
    rest = build_criterion(config, 2), accelerator, accelerator, [some_batch([3, 1], False)], config
    left_out, norms = 0, []
    for _ in range(12):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        losses, norm = train_step(model, *rest)
        assert bool(losses["loss"].isfinite()) and all(parameter.isfinite().all() for parameter in model.parameters())
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert same == (not np.isfinite(norm))
        left_out += same
        norms.append(norm)
    assert 0 < left_out < 12 and np.isfinite(norms[-1]) and accelerator.scaler.get_scale() < 2.0**16
    model.class_embed.bias.data.fill_(torch.inf)
    with pytest.raises((NotFinite, FloatingPointError)):
        train_step(model, *rest)
