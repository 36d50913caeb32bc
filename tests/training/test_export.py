"""Exported checkpoints, loaded by the libraries themselves, compute the same."""

import json
import resource
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from maskcf_fast.export import main
from maskcf_fast.models import HEADS, ImageClassifier, Rotary, VisionTransformer, VisionTransformerConfig, load_source
from maskcf_fast.training.build import build_model
from maskcf_fast.training.export import export_model
from maskcf_fast.training.settings import ModelConfig
from maskcf_fast.training.trainer import Trainer

CLASSES = ["ant", "bee", "cat"]
CLIP = VisionTransformerConfig(32, 8, 128, 3, 4, 48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
VIT = replace(CLIP, output_dim=None, pre_norm=False, patch_bias=True, activation="gelu", eps=1e-6)
DINOV2 = replace(VIT, layer_scale=True)
DINOV3 = replace(DINOV2, registers=2, positions="none", rotary=Rotary(100.0, "centred", halves=True), gated_mlp=True)
SIGLIP = replace(VIT, pool="attention", class_token=False, activation="gelu_tanh", mlp_width=200)


def classifier(config, kind):
    torch.manual_seed(0)
    model = ImageClassifier(VisionTransformer(config), HEADS[kind](config.feature_dim, len(CLASSES)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def pixels(config):
    """Pixels for ours, and normalised for theirs."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, config.image_size, config.image_size)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    return images, (images - mean) / std


def assert_same(ours, theirs):
    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=1e-5, atol=1e-5 * float(ours.detach().abs().max()))


def assert_head_beside(model, folder, features):
    """The features and the head that lies beside them give the logits, with the head's own formula."""
    state = load_file(folder / "head.safetensors")
    if type(model.head) is HEADS["cosine"]:
        features = F.normalize(features, dim=-1)
    images, _ = pixels(model.backbone.config)
    assert_same(model(images), features @ state["weight"].T + state["bias"])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("config", "name", "feature"),
    [
        (CLIP, "CLIPVisionModelWithProjection", "image_embeds"),
        (replace(CLIP, mlp_width=200, eps=1e-3, activation="gelu"), "CLIPVisionModelWithProjection", "image_embeds"),
        (replace(CLIP, output_dim=None), "CLIPVisionModel", "pooler_output"),
        (DINOV2, "Dinov2Model", "pooler_output"),
        (SIGLIP, "SiglipVisionModel", "pooler_output"),
        (replace(SIGLIP, activation="gelu", mlp_width=None, eps=1e-5), "SiglipVisionModel", "pooler_output"),
    ],
)
def test_hugging_face(tmp_path, config, name, feature, kind):
    transformers = pytest.importorskip("transformers")
    model = classifier(config, kind)
    exported = export_model(model, CLASSES, "hf", tmp_path / "out")
    assert exported.load == f'transformers.{name}.from_pretrained("{tmp_path / "out"}")'
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, normalised = pixels(config)
    features = getattr(theirs.eval()(pixel_values=normalised), feature)
    assert_same(model.features(images), features)
    assert_head_beside(model, tmp_path / "out", features)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == list(config.mean)
    assert load_source(f"hf:{tmp_path / 'out'}")[0] == config


def test_hugging_face_vit_takes_a_linear_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = classifier(VIT, "linear")
    assert export_model(model, CLASSES, "hf", tmp_path / "out").head_inside
    kind = transformers.AutoModelForImageClassification
    theirs, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, normalised = pixels(VIT)
    assert_same(model(images), theirs.eval()(pixel_values=normalised).logits)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_hugging_face_vit_with_a_cosine_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = classifier(VIT, "cosine")
    export_model(model, CLASSES, "hf", tmp_path / "out")
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    images, normalised = pixels(VIT)
    features = theirs(pixel_values=normalised).last_hidden_state[:, 0]
    assert_same(model.features(images), features)
    assert_head_beside(model, tmp_path / "out", features)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(
    "changes", [{}, {"activation": "gelu", "mlp_width": 201, "pre_norm": False, "layer_scale": True}]
)
def test_open_clip(tmp_path, changes, kind):
    open_clip = pytest.importorskip("open_clip")
    config = replace(CLIP, **changes)
    model = classifier(config, kind)
    export_model(model, CLASSES, "open_clip", tmp_path / "out")
    vision = {"image_size": 32, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8}
    if changes:
        vision |= {"mlp_ratio": 201.5 / 128, "no_ln_pre": True, "ls_init_value": 1.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(48, vision, text, quick_gelu=not changes).visual
    visual.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    images, normalised = pixels(config)
    features = visual.eval()(normalised)
    assert_same(model.features(images), features)
    assert_head_beside(model, tmp_path / "out", features)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(
    "config", [CLIP, replace(CLIP, activation="gelu", mlp_width=201), replace(CLIP, output_dim=None), VIT, DINOV2,
               replace(VIT, activation="quick_gelu"), SIGLIP, replace(SIGLIP, activation="gelu", mlp_width=None)]
)  # fmt: skip
def test_timm(tmp_path, config, kind):
    timm = pytest.importorskip("timm")
    model = classifier(config, kind)
    out = tmp_path / "out"
    exported = export_model(model, CLASSES, "timm", out)
    settings = json.loads((out / "config.json").read_text())
    args = settings["model_args"] | {"num_classes": settings["num_classes"]}
    images, normalised = pixels(config)
    by_path = timm.create_model(settings["architecture"], checkpoint_path=out / "model.safetensors", **args).eval()
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for theirs in (by_path, by_folder):
        output = theirs(normalised)
        assert exported.head_inside == (kind == "linear")
        if exported.head_inside:
            assert_same(model(images), output)
        else:
            assert_same(model.features(images), output)
            assert_head_beside(model, out, output)
    assert list(by_folder.pretrained_cfg["mean"]) == list(config.mean)
    if kind == "cosine":
        assert load_source(f"timm:local-dir:{out}")[0] == config


@pytest.mark.parametrize(("config", "known"), [
    ("ViT-B/32", "ViT-B-32-quickgelu"), ("ViT-B/16", "ViT-B-16-quickgelu"), ("ViT-L/14", "ViT-L-14-quickgelu"),
])  # fmt: skip
def test_the_presets_are_open_clip_models(config, known):
    pytest.importorskip("open_clip")
    from maskcf_fast.models import preset
    from maskcf_fast.models.libraries.open_clip import known_name

    assert known_name(preset(config)) == known
    assert known_name(preset(config).resized(448)) == known  # with force_image_size


@pytest.mark.parametrize(("changes", "known"), [({"activation": "gelu"}, "ViT-B-16-SigLIP"), ({}, None)])
def test_siglips_of_open_clip_have_the_exact_gelu(changes, known):
    pytest.importorskip("open_clip")
    from maskcf_fast.models import preset
    from maskcf_fast.models.libraries.open_clip import known_name

    assert known_name(preset("SigLIP-B/16", **changes)) == known


def testknown_name(tmp_path, monkeypatch):
    """timm models within open_clip, whose sizes are in their names: here with those of the small model."""
    open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm")
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, **small}))
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map"}
    vision["timm_proj"] = "none"
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small-SigLIP", cfg)
    config = replace(SIGLIP, mlp_width=None)
    model = classifier(config, "cosine")
    out = tmp_path / "out"
    exported = export_model(model, CLASSES, "open_clip", out)
    assert exported.load.startswith('open_clip.create_model("ViT-small-SigLIP").visual.load_state_dict(')
    visual = open_clip.create_model("ViT-small-SigLIP").visual
    visual.load_state_dict(load_file(out / "model.safetensors"))
    images, normalised = pixels(config)
    features = visual.eval()(normalised)
    assert_same(model.features(images), features)
    assert_head_beside(model, out, features)
    with pytest.raises(ValueError, match=r"open_clip has no SigLIP with.*activation=gelu,"):
        export_model(classifier(replace(config, activation="gelu"), "cosine"), CLASSES, "open_clip", tmp_path / "no")


@pytest.mark.parametrize(("config", "kind"), [(CLIP, "cosine"), (DINOV3, "linear"), (SIGLIP, "cosine")])
def test_onnx(tmp_path, config, kind):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = classifier(config, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export_model(model, CLASSES, "onnx", tmp_path / "out").head_inside
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    for count in (1, 2, 5):  # any number of images
        images = torch.rand(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"pixels": images.numpy()})
        assert_same(model(images), torch.from_numpy(logits))


@pytest.mark.parametrize(
    ("to", "config", "message"),
    [
        ("hf", replace(CLIP, layer_scale=True), "Hugging Face has no CLIP, ViT or DINO with.*layer_scale=True"),
        ("open_clip", VIT, "open_clip has no vision transformer with"),
        ("timm", replace(VIT, eps=1e-12), "timm has no ViT with.*eps=1e-12"),
        ("timm", replace(SIGLIP, eps=1e-5), "timm has no SigLIP with.*eps=1e-05"),
        ("hf", replace(SIGLIP, output_dim=64), "Hugging Face has no SigLIP with.*output_dim=64"),
        ("tf", CLIP, "--to tf: there are hf, open_clip, timm, onnx"),
    ],
)
def test_what_a_library_cannot_hold(tmp_path, to, config, message):
    with pytest.raises(ValueError, match=message):
        export_model(classifier(config, "cosine"), CLASSES, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "open_clip", "timm", "onnx"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, to):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = classifier(CLIP, "cosine")
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model\..* MiB\): File too large"):
            export_model(model, CLASSES, to, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_run(config, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    Trainer(replace(config, optim=replace(config.optim, epochs=1)), quiet=True).run()
    out = tmp_path / "exports" / "hf"
    assert main(["--run", str(config.out), "--to", "hf", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the head is beside it" in said
    assert f'CLIPVisionModelWithProjection.from_pretrained("{out}")' in said
    run = ModelConfig("tiny", config.out / "model.safetensors")
    model = build_model(run, 3, seed=1).eval()
    images, normalised = pixels(model.backbone.config)
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(out).eval()
    assert_same(model.features(images), theirs(pixel_values=normalised).image_embeds)

    # And back: the exported model and head are where another run can start.
    again = build_model(ModelConfig(name=f"hf:{out}", head=out / "head.safetensors"), 3, seed=2)
    assert_same(model(images), again(images))
    assert main(["--run", str(config.out), "--to", "hf", "--out", str(out)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["--run", str(tmp_path / "absent"), "--to", "timm", "--out", str(tmp_path / "x")]) == 1
    assert "is no run" in capsys.readouterr().err


def test_a_siglip_from_folder_to_folder(image_folders, tmp_path, capsys):
    """Taken from Hugging Face, fine-tuned and given back by the commands, at another image size."""
    transformers = pytest.importorskip("transformers")
    from maskcf_fast.train import main as train

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    before = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, intermediate_size=100))
    before.save_pretrained(tmp_path / "siglip")
    command = ["--config", "context-none", "--model.name", f"hf:{tmp_path / 'siglip'}", "--model.head-kind", "linear"]
    command += ["--model.image-size", "48"]
    command += ["--data.train", str(image_folders["train"]), "--data.id", str(image_folders["id"])]
    command += ["--data.ood", str(image_folders["ood"]), "--data.backend", "torch"]
    command += ["--data.threads", "0", "--optim.epochs", "1", "--optim.batch-size", "12", "--optim.lr", "1e-3"]
    run, out = tmp_path / "run", tmp_path / "out"
    assert train([*command, "--device", "cpu", "--out", str(run)]) == 0
    assert main(["--run", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert "SiglipVisionModel.from_pretrained" in capsys.readouterr().out
    after = transformers.SiglipVisionModel.from_pretrained(out).eval()
    assert not torch.equal(after.state_dict()["head.probe"], before.state_dict()["head.probe"])
    model = build_model(ModelConfig(weights=run / "model.safetensors", name=f"hf:{tmp_path / 'siglip'}",
                                    head_kind="linear"), 3, seed=1).eval()  # fmt: skip
    assert model.backbone.config.image_size == after.config.image_size == 48
    images, normalised = pixels(model.backbone.config)
    features = after(pixel_values=normalised).pooler_output
    assert_same(model.features(images), features)
    assert_head_beside(model, out, features)
