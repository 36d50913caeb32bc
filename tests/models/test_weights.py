"""Weights of other libraries' models give those libraries' outputs."""

import re

import pytest
import torch
from safetensors.torch import save_file

from maskcf_fast.models import VisionTransformer, VisionTransformerConfig, load_backbone, preset
from maskcf_fast.models.naming import HF_CLIP, HF_DINOV2, HF_SIGLIP, HF_VIT, OPEN_CLIP, TIMM

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # the others expect normalised pixels


def randomise(model):
    """Random everything: the libraries start biases at zero and norms at one, which would hide a mix-up."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def assert_same_features(ours, theirs, images):
    with torch.no_grad():
        a, b = ours(images), theirs(images)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [True, False])
def test_hugging_face_clip(tmp_path, activation, projection):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=48, hidden_act=activation,
    )  # fmt: skip
    kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    theirs = randomise(kind(config))
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer(VisionTransformerConfig(32, 8, 64, 3, 4, 48 if projection else None, activation, **UNIT))
    load_backbone(ours, tmp_path / "model.safetensors")
    output = "image_embeds" if projection else "pooler_output"
    assert_same_features(ours, lambda x: getattr(theirs(x), output), torch.randn(2, 3, 32, 32))


def test_hugging_face_full_clip_with_text_tower(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        vision_config={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
        projection_dim=48,
    )  # fmt: skip
    theirs = randomise(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    ours = load_backbone(
        VisionTransformer(VisionTransformerConfig(32, 8, 64, 2, 4, 48, **UNIT)), tmp_path / "model.safetensors"
    )

    def features(x):
        return theirs.visual_projection(theirs.vision_model(pixel_values=x).pooler_output)

    assert_same_features(ours, features, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "visual part"])
@pytest.mark.parametrize("quick", [True, False])
def test_open_clip(tmp_path, whole, quick):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 128, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    theirs = randomise(open_clip.CLIP(48, vision, text, quick_gelu=quick))
    state = (theirs if whole else theirs.visual).state_dict()
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    activation = "quick_gelu" if quick else "gelu"
    ours = VisionTransformer(VisionTransformerConfig(32, 8, 128, 2, 4, 48, activation, **UNIT))
    assert_same_features(load_backbone(ours, path), theirs.visual, torch.randn(2, 3, 32, 32))


def test_own_weights_round_trip(tmp_path):
    model, other = VisionTransformer("tiny"), VisionTransformer("tiny")
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    load_backbone(other, tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_refusals(tmp_path):
    model = VisionTransformer("tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(model.state_dict())
    state["ln_pre.weight"] = torch.zeros(3)
    del state["class_embedding"]
    with pytest.raises(ValueError, match=r"another architecture(?s:.*)missing class_embedding(?s:.*)ln_pre.weight is"):
        load_backbone(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"unknown weight layout.*got foo"):
        load_backbone(model, {"foo": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent"):
        load_backbone(model, tmp_path / "absent.safetensors")
    save_file(model.state_dict(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_backbone(model, tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (OPEN_CLIP, {"layer_scale": True}),
        (HF_CLIP, {}),
        (HF_VIT, {"output_dim": None, "pre_norm": False, "patch_bias": True}),
        (HF_DINOV2, {"output_dim": None, "pre_norm": False, "patch_bias": True, "layer_scale": True}),
        (HF_SIGLIP, {"output_dim": None, "pre_norm": False, "patch_bias": True, "pool": "attention"}),
        (TIMM, {"layer_scale": True, "patch_bias": True}),
        (TIMM, {"output_dim": None, "pre_norm": False, "patch_bias": True, "pool": "attention"}),
    ],
    ids=lambda value: getattr(value, "library", ""),
)
def test_names_and_shapes_there_and_back(layout, changes):
    """Every tensor gets one of the library's names, and comes back as it was."""
    state = randomise(VisionTransformer(preset("tiny", **changes))).state_dict()
    theirs = layout.to_theirs(state)
    known = [re.escape(name).replace(r"\#", r"\d+") + r"(\.weight|\.bias)?" for name in layout.names.values()]
    assert all(any(re.fullmatch(pattern, name) for pattern in known) for name in theirs)
    ours = layout.to_ours(theirs)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


def test_a_training_checkpoint_of_open_clip(tmp_path):
    """Pickled, with the prefix that several processes leave, beside numbers and the text tower."""
    model = randomise(VisionTransformer("tiny"))
    state = {f"module.visual.{name}": tensor for name, tensor in OPEN_CLIP.to_theirs(model.state_dict()).items()}
    torch.save({"epoch": 3, "state_dict": {**state, "module.logit_scale": torch.zeros(())}}, tmp_path / "epoch_3.pt")
    loaded = load_backbone(VisionTransformer("tiny"), tmp_path / "epoch_3.pt")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.save([1, 2], tmp_path / "epoch_3.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_backbone(model, tmp_path / "epoch_3.pt")
