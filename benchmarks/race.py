"""What each idea after DETR gives on the embedded set: `make race` writes nbs/race.json, which chapter 48 draws.

    python benchmarks/race.py                            # all variants, 14 epochs each: overnight
    python benchmarks/race.py --epochs 1 --limit_val 250 # the short form
    python benchmarks/race.py --only "DETR" --seeds 1 2  # some of them, several seeds

All variants but those with a lesson of their own begin with the same backbone, which has learned its cells once; all
see the same images in the same order.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from detr_nb.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SIGMOID = "--class_loss ia_bce --cls_loss_coef 2 --set_cost_class 2 --bbox_loss_coef 5 --giou_loss_coef 2"
STAGES = f"{SIGMOID} --two_stage --repeat_proposals 4"
PROPOSALS = f"--decoder dab --box_bias rpb {STAGES}"
POINTS = (f"{STAGES} --decoder dab_deformable --num_feature_levels 2 --lr_linear_proj_mult 1 --enc_layers 0 "
          "--denoising 8")
TOLD = f"{POINTS} --no_embed_init_tgt"
OWN_LESSON, FASTER = "--pretrain_epochs", "--lr 1.5e-3 --lr_backbone 1.5e-3 --lr_muon 0.02"
VARIANTS = {  # each adds one idea to the one before
    "DETR": "",
    "anchors": "--decoder dab",
    "anchors, IA-BCE": f"--decoder dab {SIGMOID}",
    "anchors, IA-BCE, bias": f"--decoder dab {SIGMOID} --box_bias rpb",
    "anchors, IA-BCE, bias, proposals": PROPOSALS,
    "and denoising": f"{PROPOSALS} --denoising 16",
    "points of two maps, no encoder": POINTS,  # in place of the bias
    "and told what cells show": TOLD,
    "and a lesson of its own": f"{TOLD} {OWN_LESSON} 5",  # in place of the backbone's
    "its own lesson, three times the rates": f"{TOLD} {OWN_LESSON} 5 {FASTER}",
    # about the work of five epochs of full images
    "and images that begin small": f"{TOLD} {OWN_LESSON} 8 {FASTER} --progressive_resize --schedule wsd",
    "DETR, three times the rates": FASTER,
    "anchors to proposals, three groups": f"{PROPOSALS} --query_groups 3",  # beside denoising
}


def run(flags: str, folder: Path, options: argparse.Namespace, seed: int) -> list[dict]:
    "Train one variant; returns steps and scores of each evaluation, and the processor's seconds for the whole run."
    begins = [] if OWN_LESSON in flags else ["--resume", options.backbone]
    command = [sys.executable, "-m", "detr_nb.train", *flags.split(), *begins, "--output_dir", folder,
               "--epochs", options.epochs, "--eval_every", 1, "--limit_val", options.limit_val, "--seed", seed,
               "--report_to", "none", "--shapes_path", options.shapes_path]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    per_epoch = load_checkpoint(folder / "checkpoint.pth")["step"] // len(lines)
    return [{"steps": per_epoch * (line["epoch"] + 1), "AP": line["test_coco_eval_bbox"][0],
             "AP50": line["test_coco_eval_bbox"][1], "class_error": line["train_class_error"],
             "cpu_seconds": round(spent)} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--limit_val", type=int, default=0, help="validation images, 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--backbone", type=Path, default=ROOT / "runs/detr/backbone.pth")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/race")
    parser.add_argument("--shapes_path", type=Path, default=ROOT / "data/shapes")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/race.json")
    options = parser.parse_args()
    if not options.backbone.exists():
        sys.exit(f"{options.backbone} is not there: `make train ARGS='shapes --output_dir runs/detr'` makes it, "
                 "or name another run's with --backbone")
    found = {"date": str(date.today()), "torch": version("torch"), "threads": torch.get_num_threads(),
             "epochs": options.epochs, "validation_images": options.limit_val or 500, "runs": {}}
    for name in options.only:
        for seed in options.seeds:
            folder = options.folder / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            found["runs"].setdefault(name, []).append(run(VARIANTS[name], folder, options, seed))
            options.output.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}, seed {seed}: AP {found['runs'][name][-1][-1]['AP']:.3f}", flush=True)


if __name__ == "__main__":
    main()
