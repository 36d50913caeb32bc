"""Models of other libraries trained unmodified: their step against the paper's order, and a run from start to export.

The paper's order is written here for a function of pixels: counterfactual pixels, whole forward passes, maps that are
written out. It shares with the package the selection of patches and the fill's pixels alone.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from families import MEAN, PATCHES, SIDE, STD, pixels, save
from runs import after_dying
from safetensors.torch import load_file
from students import moved, own_methods
from zoo import sdpa_maps

from maskcf_fast import evaluate
from maskcf_fast.core.errors import UserError
from maskcf_fast.explain.backbone import LibraryBackbone
from maskcf_fast.methods import CounterfactualDistiller, MaskStrategy, strategy_names
from maskcf_fast.methods.registry import build_method
from maskcf_fast.models import ImageClassifier, LinearClassifier
from maskcf_fast.training.build import build_model
from maskcf_fast.training.export import export_model
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.settings import ModelConfig
from maskcf_fast.training.trainer import Trainer

timm = pytest.importorskip("timm")
SMALL = {"embed_dim": 32, "num_heads": 2, "num_classes": 5}
VITAMIN = {"patch_size": 1, "img_size": 64, "embed_dim": 384, "num_heads": 6}
FAST = {"layers": [1, 1, 1, 2], "embed_dims": [8, 8, 16, 64], "num_classes": 5, "layer_scale_init_value": 1.0}
MODELS = {  # name, arguments, tokens before the patches, what of the last layer the feature reads
    "relu": ("vit_tiny_patch16_224", {"act_layer": "relu"}, 1, "class"),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}, 2, "both"),
    "mixed rotary positions, a mean": ("vit_small_patch16_rope_mixed_224", {"global_pool": "avg"}, 1, "mean"),
    "a hybrid: convolutions before global attention": ("vit_tiny_r_s16_p8_224", {"patch_size": 2}, 1, "class"),
    "ViTamin": ("vitamin_small_224", VITAMIN, 0, "mean"),
    "FastViT: convolutions between attention layers, too": ("fastvit_sa12", FAST, 0, "mean"),
    "attention and MLP side by side": ("vit_base_patch16_xp_224", {}, 1, "class"),
    "gated attention pool": ("vit_base_patch16_siglip_224", {"act_layer": "relu"}, 0, "pool"),
}


def saved(folder, name, options):
    return save("timm", name, folder, **({} if options is FAST else SMALL) | options)[0]


def forward(backbone, images, hidden=None):
    """Features, and the maps [N, H, Tq, T], of the library's module on its own."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    module = backbone.module
    features = lambda x: module.forward_head(module.forward_features(x), pre_logits=True)  # noqa: E731
    return sdpa_maps(features, (images - mean) / std, hidden)


def paper(student, teacher, strategy, images, labels, draw, prefix, reads):
    feature, maps = forward(student.backbone, images)
    logits = student.head(feature)
    cam = None
    if strategy.needs_cam:
        grads = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), maps, retain_graph=True)
        layers = [(p * g).clamp(min=0).mean(dim=1) for p, g in zip(maps, grads, strict=True)]
        t = PATCHES + prefix
        start = torch.zeros(len(images), 1, t)
        start[:, :, : {"class": 1, "both": 2}.get(reads, 0)] = {"class": 1, "both": 0.5}.get(reads, 0)
        if reads == "mean":
            start[:, :, prefix:] = 1 / PATCHES
        rows = layers.pop() if reads == "pool" else start
        r = torch.eye(t).expand(len(images), t, t)
        for layer in layers:
            r = r + layer @ r
        cam = (rows @ r - start)[:, 0, prefix:].detach()
    mask = strategy.mask(cam, draw)
    fill = strategy.filling
    made, hidden = (images, mask) if fill.leaves_out else (fill.pixels(images, mask, draw.donors), None)
    with torch.no_grad():
        target = forward(teacher, made, hidden)[0]
    distill = F.mse_loss(forward(student.backbone, made, hidden)[0], target)
    return F.cross_entropy(logits, labels) + 30 * distill, cam, mask


def prepared(folder, key):
    name, options, *known = MODELS[key]
    student, teacher = moved(LibraryBackbone(saved(folder, name, options)))
    return student, teacher.backbone, *known


@pytest.mark.parametrize("key", MODELS)
def test_step(tmp_path, key):
    """Loss, map, mask and every gradient are the paper's; in one graph, and in two passes."""
    student, teacher, prefix, reads = prepared(tmp_path, key)
    side = student.backbone.config.image_size
    images, labels = torch.rand(3, 3, side, side), torch.tensor([0, 3, 4])
    assert (student.backbone.config.prefix, student.backbone.config.depth) == (prefix, 2)
    for strategy in map(MaskStrategy.from_name, strategy_names()):
        draw = strategy.draw(3, PATCHES, generator=torch.Generator().manual_seed(0))
        method = CounterfactualDistiller(student, teacher, strategy).train()
        if strategy.filling.leaves_out and reads in ("mean", "pool"):
            with pytest.raises(UserError, match=r"(from all|convolutions between its) tokens.*single, multi"):
                method(images, labels, draw=draw)
            continue
        fast = method(images, labels, draw=draw)
        loss, cam, mask = paper(student, teacher, strategy, images, labels, draw, prefix, reads)
        trained = [p for p in student.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(x, trained) for x in (fast.loss, loss)]
        method.zero_grad()
        assert torch.equal(method.backward(images, labels, draw=draw).mask, mask)
        grads.insert(1, [p.grad for p in trained])
        assert torch.equal(fast.mask, mask)
        assert mask.any()
        torch.testing.assert_close(fast.loss, loss, rtol=1e-5, atol=0)
        if cam is not None:
            assert (fast.cam - cam).norm() <= 1e-4 * cam.norm()
        whole = torch.cat([grad.flatten() for grad in grads[2]]).norm()
        for one, two, expected in zip(*grads, strict=True):
            for got in (one, two):
                assert (got - expected).norm() <= 5e-5 * expected.norm() + 1e-6 * whole


def test_uint8_pixels_are_the_same_images(tmp_path):
    student, *_ = prepared(tmp_path, "relu")
    images = torch.randint(256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    assert torch.equal(student(images), student(images.permute(0, 3, 1, 2) / 255))


def test_every_method_takes_it(tmp_path):
    student, *_ = prepared(tmp_path, "relu")
    settings = {"strategy": "object-single", "weight": 1.0, "temperature": 2.0, "cam_target": "logprob"}
    images, labels = torch.rand(3, 3, SIDE, SIDE), torch.tensor([0, 3, 4])
    for name in own_methods():
        method = build_method(name, copy.deepcopy(student), settings).train()
        out = method.backward(images, labels, generator=torch.Generator().manual_seed(0))
        assert out.loss.isfinite()
        trained = [p for p in method.student.parameters() if p.requires_grad]
        assert any(p.grad is not None and p.grad.any() for p in trained), name


@pytest.mark.parametrize("key", [None, "relu", "FastViT: convolutions between attention layers, too"])
def test_a_run_from_start_to_export(tmp_path, change, capsys, key):
    """By itself, with a notice of what it costs; resumed exactly; evaluated from its file; given back."""
    source, asked = tmp_path / "source", key is None
    source.mkdir()
    name = saved(source, *(("vit_tiny_patch16_224", {}) if asked else MODELS[key][:2]))
    model = {"name": name, "weights": None, "head_kind": "linear", "native": not asked}
    config = change(model=model, optim={"epochs": 2, "lr": 1e-3}, out=tmp_path / "whole")
    accuracy = Trainer(config, quiet=True).run()
    said = capsys.readouterr().err
    assert ("this model is not supported because" in said and "pixels are refilled" in said) == (not asked)
    assert ("has convolutions between its attention layers" in said) == (str(key).startswith("Fast"))
    whole = load_file(tmp_path / "whole" / "model.safetensors")

    after_dying(config, tmp_path / "half", step=5).run()
    again = load_file(tmp_path / "half" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)

    line = ["--run", config.out, "--data", f"folder:{config.data.id}", "--weights", "final", "--wise-ft", "0,1"]
    assert evaluate.main([*map(str, line), "--device", "cpu", "--out", str(tmp_path / "evaluated")]) == 0
    tuned, start, end = json.loads((tmp_path / "evaluated" / "results.json").read_text())["rows"]
    began = next(line for line in map(json.loads, (config.out / "metrics.jsonl").open()) if "accuracy/id" in line)
    name = config.data.id.name
    assert tuned["top1"][name] == end["top1"][name] == pytest.approx(accuracy["id"])
    assert start["top1"][name] == pytest.approx(began["accuracy/id"])
    run = read_run(tmp_path / "whole")
    tuned = run.tuned()
    initial = run.initial()
    side = tuned.backbone.config.image_size
    images = torch.rand(2, 3, side, side)
    assert not torch.equal(tuned(images), initial(images))
    with pytest.raises(UserError, match=r"was trained unmodified, as a model of its own library: take --to timm"):
        export_model(tuned, run.classes, "hf", tmp_path / "hf")
    exported = export_model(tuned, run.classes, "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{source}")
    assert exported.load.startswith(f"timm.create_model('local-dir:{source}').load_state_dict(")
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    x = theirs.eval().forward_features((images - mean) / std)
    torch.testing.assert_close(theirs.forward_head(x, pre_logits=True), tuned.features(images))


def test_sizes_and_weights_that_do_not_fit(tmp_path, weights):
    name, _ = save("timm", "vit_tiny_patch16_224", tmp_path, **SMALL)
    for side in (33, 36):  # of which 36 would divide into as many patches, but of other places
        with pytest.raises(UserError, match=f"image_size={side} does not divide into its 4 × 4 patches: take 32"):
            LibraryBackbone(name, side)
    state = LibraryBackbone(name, 40).module.state_dict()
    with pytest.raises(UserError, match=r"not those of .* at 32 px: .*size mismatch.* give its --model.image-size"):
        LibraryBackbone(name, weights=state)
    with pytest.raises(UserError, match=r"holds no model that was trained unmodified: leave out --model.native False"):
        build_model(ModelConfig(name=name, weights=weights, native=False), 5, seed=0)


def test_sizes_that_the_library_refuses(tmp_path):
    (tmp_path / "wide").mkdir()
    name, _ = save("timm", "vit_tiny_patch16_224", tmp_path / "wide", **SMALL, img_size=[32, 48])
    with pytest.raises(UserError, match=r"not square, but 32×48; --model.image-size N asks .*cannot be trained unmod"):
        build_model(ModelConfig(name=name), 5, seed=0)
    assert build_model(ModelConfig(name=name, image_size=48), 5, seed=0).backbone.config.num_patches == 36
    (tmp_path / "dynamic").mkdir()
    options = {"act_layer": "relu", "dynamic_img_size": True}
    name, _ = save("timm", "vit_tiny_patch16_224", tmp_path / "dynamic", **SMALL, **options)
    with pytest.raises(
        UserError, match=r"unmodified either: Input height \(33\) should be divisible by patch size \(8\)"
    ):
        LibraryBackbone(name, 33)
    (tmp_path / "fast").mkdir()
    with pytest.raises(UserError, match="runs at its own image size only: leave out"):
        LibraryBackbone(saved(tmp_path / "fast", "fastvit_sa12", FAST), 64)


def test_what_a_normalised_feature_reads(tmp_path):
    """Its sum is constant as long as the last norm's weights are one, so that this shows no read-out."""
    name, theirs = save("timm", "vit_tiny_patch16_224", tmp_path, **SMALL)
    state = {key: t.fill_(1.0) if key == "norm.weight" else t for key, t in theirs.state_dict().items()}
    assert LibraryBackbone(name, weights=state).config.pool == (1.0, *[0.0] * PATCHES)


SWIN = {"img_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

DAVIT = {"depths": [1] * 4, "embed_dims": [8, 8, 16, 16], "num_heads": [2] * 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, "windowed attention, or heads or frames folded into the batch"),
        ("swin_tiny_patch4_window7_224", SWIN, "attention by an explicit softmax"),
        ("davit_tiny", DAVIT, r"attention calls with queries \[.*\] lie between those over all tokens .*: windowed"),
        ("vit_small_patch16_18x2_224", {}, "attention calls side by side"),
        ("resnet18", {}, "no attention call was recorded"),
        ("beit_base_patch16_224", {}, "a mask, a position bias"),
        (
            "vit_base_patch16_224",
            {"global_pool": "max"},
            r"the score reads \d+ of 16 patches [^:]*not the class token alone$",
        ),
    ],
)
def test_models_that_neither_can_take(tmp_path, monkeypatch, name, options, reason):
    if "windowed" in reason:  # timm's switch for it
        monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 2)
    sizes = {} if name.startswith(("swin", "davit", "resnet")) else SMALL
    name, _ = save("timm", name, tmp_path, **sizes, **options)
    message = f"(?s)not supported because .*cannot be trained unmodified either: .*{reason}"
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(name=name), 5, seed=0)


@pytest.mark.parametrize("library", ["hf", "open_clip"])
def test_models_of_the_other_libraries(tmp_path, library):
    """Against the features of the library's own module."""
    images, normalised = pixels(count=2)
    if library == "hf":
        name, theirs = save("hf", "DeiTModel", tmp_path, intermediate_size=48)
        expected = theirs(normalised).last_hidden_state[:, 0]
    else:
        name, theirs = save("open_clip", "VisionTransformer", tmp_path, qk_norm=True)
        expected = theirs.visual(normalised)
    backbone = LibraryBackbone(name)
    torch.testing.assert_close(backbone(images), expected)
    student = ImageClassifier(backbone, LinearClassifier(backbone.config.feature_dim, 3))
    method = CounterfactualDistiller(student, copy.deepcopy(backbone), "object-none")
    assert method.backward(images, torch.tensor([0, 2])).cam.abs().max() > 0


def test_what_needs_the_compact_transformer_is_refused(tmp_path, change):
    name, _ = save("timm", "vit_tiny_patch16_224", tmp_path, act_layer="relu")
    model = {"name": name, "weights": None, "head_kind": "linear"}
    for section, option in ({"recompute": True}, "recompute"), ({"optim": {"lora_rank": 2}}, "optim.lora_rank"):
        with pytest.raises(UserError, match=f"{option} does not go with {name}, which is trained unmodified"):
            Trainer(change(model=model, **section), quiet=True)
