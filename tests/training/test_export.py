"""Exported checkpoints, loaded by the libraries themselves, compute the same."""

import json
import re
import resource
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import MEAN, STD, Family, assert_same, pixels
from safetensors.torch import load_file

from maskcf_fast.export import main
from maskcf_fast.models import (
    HEADS,
    ImageClassifier,
    Rotary,
    VisionTransformer,
    VisionTransformerConfig,
    load_source,
    preset,
)
from maskcf_fast.training.build import build_model
from maskcf_fast.training.export import export_model
from maskcf_fast.training.settings import ModelConfig
from maskcf_fast.training.trainer import Trainer

CLASSES = ["ant", "bee", "cat"]
CLIP = VisionTransformerConfig(32, 8, 128, 3, 4, 48, mean=MEAN, std=STD)
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


def assert_head_beside(model, folder, images, features):
    """The features and the head that lies beside them give the logits, with the head's own formula."""
    state = load_file(folder / "head.safetensors")
    if type(model.head) is HEADS["cosine"]:
        features = F.normalize(features, dim=-1)
    assert_same(model(images), features @ state["weight"].T + state["bias"])


def hugging_face(out, exported, config):
    transformers = pytest.importorskip("transformers")
    name, folder = re.fullmatch(r'transformers\.(\w+)\.from_pretrained\("(.*)"\)', exported.load).groups()
    assert folder == str(out)
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("unexpected_keys", "mismatched_keys"))
    assert all(key.startswith("pooler.") for key in report["missing_keys"])
    assert list(transformers.AutoImageProcessor.from_pretrained(folder).image_mean) == list(config.mean)
    if exported.head_inside:
        assert theirs.config.id2label == dict(enumerate(CLASSES))
        return lambda x: theirs.eval()(pixel_values=x).logits
    assert load_source(f"hf:{folder}")[0] == config
    return Family("", "hf", name).features(theirs.eval())


def timm(out, exported, config):
    timm = pytest.importorskip("timm")
    settings = json.loads((out / "config.json").read_text())
    args = settings["model_args"] | {"num_classes": settings["num_classes"]}
    by_path = timm.create_model(settings["architecture"], checkpoint_path=out / "model.safetensors", **args).eval()
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert list(by_folder.pretrained_cfg["mean"]) == list(config.mean)
    images = pixels()[1]
    assert torch.equal(by_path(images), by_folder(images))
    assert exported.head_inside or load_source(f"timm:local-dir:{out}")[0] == config
    return by_folder


def open_clip(out, exported, config):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8}
    if config != CLIP:
        vision |= {"mlp_ratio": 201.5 / 128, "no_ln_pre": True, "ls_init_value": 1.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(48, vision, text, quick_gelu=config == CLIP).visual
    visual.load_state_dict(load_file(out / "model.safetensors"))
    return visual.eval()


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("read", "config"),
    [
        (hugging_face, CLIP),
        (hugging_face, replace(CLIP, mlp_width=200, eps=1e-3, activation="gelu")),
        (hugging_face, replace(CLIP, output_dim=None)),
        (hugging_face, VIT),
        (hugging_face, DINOV2),
        (hugging_face, SIGLIP),
        (hugging_face, replace(SIGLIP, activation="gelu", mlp_width=None, eps=1e-5)),
        (open_clip, CLIP),
        (open_clip, replace(CLIP, activation="gelu", mlp_width=201, pre_norm=False, layer_scale=True)),
        (timm, CLIP),
        (timm, replace(CLIP, activation="gelu", mlp_width=201)),
        (timm, replace(CLIP, output_dim=None)),
        (timm, VIT),
        (timm, DINOV2),
        (timm, replace(VIT, activation="quick_gelu")),
        (timm, SIGLIP),
        (timm, replace(SIGLIP, activation="gelu", mlp_width=None)),
    ],
)
def test_libraries_load_what_is_exported(tmp_path, read, config, kind):
    """The features, and the head: beside them, or inside where the library's own is linear on the same feature."""
    model, out = classifier(config, kind), tmp_path / "out"
    exported = export_model(model, CLASSES, "hf" if read is hugging_face else read.__name__, out)
    assert exported.head_inside == (kind == "linear" and (read is timm or (read is hugging_face and config == VIT)))
    assert exported.head_inside != (out / "head.safetensors").exists()
    images, normalised = pixels(count=2)
    output = read(out, exported, config)(normalised)
    if exported.head_inside:
        assert_same(model(images), output)
    else:
        assert_same(model.features(images), output)
        assert_head_beside(model, out, images, output)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (preset("ViT-B/32"), "ViT-B-32-quickgelu"),
        (preset("ViT-B/16"), "ViT-B-16-quickgelu"),
        (preset("ViT-L/14"), "ViT-L-14-quickgelu"),
        (preset("SigLIP-B/16", activation="gelu"), "ViT-B-16-SigLIP"),
        (preset("SigLIP-B/16"), None),  # open_clip's have the exact GELU
    ],
)
def test_which_open_clip_models_the_presets_are(config, known):
    pytest.importorskip("open_clip")
    from maskcf_fast.models.libraries.open_clip import known_name

    assert known_name(config) == known_name(config.resized(448)) == known  # the latter with force_image_size


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
        ("open_clip", replace(SIGLIP, mlp_width=200), "open_clip has no SigLIP with.*mlp_width=200"),
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
    tiny = model.backbone.config
    images, normalised = pixels(tiny.image_size, mean=tiny.mean, std=tiny.std)
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
    config = model.backbone.config
    images, normalised = pixels(config.image_size, mean=config.mean, std=config.std)
    features = after(pixel_values=normalised).pooler_output
    assert_same(model.features(images), features)
    assert_head_beside(model, out, images, features)
