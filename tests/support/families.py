"""Small models of other libraries with random weights: every family that the compact transformer takes, and any other.

Each is saved as its library saves it, so that it is loaded by name. The models use none of the package's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIDE, PATCHES = 32, 16
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.45, 0.5)


@dataclass(frozen=True)
class Family:
    """A family in one library.

    Attributes:
        title: What it is called in the table.
        library: hf, timm or open_clip.
        kind: Class, function or timm's model within open_clip.
        options: What it is made with, beside the small sizes.
        grows: How Hugging Face's is told to resample its positions.
    """

    title: str
    library: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    grows: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.title} ({self.library}: {self.kind})"

    def save(self, folder: Path) -> tuple[str, nn.Module]:
        """The name that it is loaded by, and the library's own module."""
        return save(self.library, self.kind, folder, **self.options)

    def features(self, model: Any) -> Callable[[Tensor], Tensor]:
        """What the library computes of normalised pixels."""
        if self.library == "open_clip":
            return model.visual
        if self.library == "timm":
            head = isinstance(model.head, nn.Linear) and "_clip_" not in self.kind and "_pe_" not in self.kind
            return lambda x: model.forward_head(model.forward_features(x), pre_logits=head)

        def features(x: Tensor) -> Tensor:
            options = dict(self.grows) if x.shape[-1] != SIDE else {}
            if self.kind == "ViTMAEModel":  # which patches come first is drawn, else
                count = (x.shape[-1] // 8) ** 2
                options["noise"] = torch.arange(count).expand(len(x), -1)
            out = model(pixel_values=x, **options)
            if self.kind == "IJepaModel":
                return out.last_hidden_state.mean(dim=1)
            if self.kind.startswith("ViT"):
                return out.last_hidden_state[:, 0]
            return out.image_embeds if self.kind.endswith("Projection") else out.pooler_output

        return features


def randomise(model: nn.Module) -> nn.Module:
    """Random everything: the libraries start biases at zero and norms at one, which would hide a mix-up."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if "scale" in name or "gamma" in name else 0.08))
    return model.eval()


def module(library: str, kind: str, **options: Any) -> nn.Module:
    """A small model as its library makes it, with the library's own random weights."""
    return _MAKE[library](kind, options)[0]


def save(library: str, kind: str, folder: Path, **options: Any) -> tuple[str, nn.Module]:
    """A `module` with everything random, in ``folder`` as its library saves it; the name that it is loaded by first."""
    model, config = _MAKE[library](kind, options)
    randomise(model)
    head = getattr(getattr(getattr(model, "visual", None), "trunk", model), "head", None)
    if isinstance(head, nn.Linear) and "eva" not in kind:  # a projection, whose bias there is none of
        nn.init.zeros_(head.bias)
    pixels = {"mean": MEAN, "std": STD}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if library == "hf":
        model.save_pretrained(folder)
        _save_preprocessor(folder)
        return f"hf:{folder}", model
    if library == "timm":
        sides = getattr(getattr(model, "patch_embed", None), "img_size", (128, 128))  # convolutions take any
        config |= {"architecture": kind, "num_classes": model.num_classes}
        config |= {"pretrained_cfg": pixels | {"input_size": [3, *sides]}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors")
    else:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
        save_file(state, folder / "open_clip_model.safetensors")
    return f"{library}:local-dir:{folder}", model


def pixels(side: int = SIDE, count: int = 3, mean: Any = MEAN, std: Any = STD) -> tuple[Tensor, Tensor]:
    """For ours, and normalised for theirs."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return images, (images - mean) / std


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    most = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-5 * most)


def _hugging_face(kind: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import transformers

    made = getattr(transformers, kind)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
    extra = {"add_pooling_layer": False} if kind in ("ViTModel", "DeiTModel", "IJepaModel") else {}
    return made(made.config_class(**{**sizes, **options}), **extra), {}


def _timm(kind: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import timm

    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0}
    args = options if kind.startswith(("swin", "davit", "resnet", "fastvit")) else {**sizes, **options}
    return timm.create_model(kind, **args), {"model_args": args}


def _open_clip(kind: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Its own vision transformer, or one of timm's, whose sizes are in their names (see `small_trunks`)."""
    import open_clip

    options = dict(options)
    known = options.pop("text_of", None)  # the library's name of a model with this text tower: its shape, made smaller
    shape = dict(open_clip.get_model_config(known)["text_cfg"] if known else {})
    shape.pop("hf_tokenizer_name", None)  # it would be downloaded
    text = shape | {
        "context_length": options.pop("context_length", shape.get("context_length", 77)),
        "vocab_size": 49408,
        "width": 32,
    }
    text |= {"heads": 2, "layers": 1}
    if kind == "VisionTransformer":
        vision = {"image_size": SIDE, "layers": 2, "width": 128, "head_width": 32, "patch_size": 8, **options}
        cfg = {"quick_gelu": vision.pop("quick_gelu", False), "embed_dim": vision.pop("embed_dim", 48)}
        cfg |= {"vision_cfg": vision, "text_cfg": text}
        return open_clip.CLIP(**cfg), cfg
    vision = {"image_size": SIDE, "timm_model_name": kind, "timm_pool": "map", "timm_proj": "none", **options}
    cfg = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    return open_clip.CustomTextCLIP(64, vision, text), cfg


_MAKE = {"hf": _hugging_face, "timm": _timm, "open_clip": _open_clip}


def small_trunks(monkeypatch) -> None:
    """timm's models within open_clip, of small sizes."""
    import timm

    create = timm.create_model
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}

    def create_model(name: str, **options: Any) -> nn.Module:
        return create(name, **{**options, **(small | ({"attn_pool_num_heads": 2} if "_pe_" in name else {}))})

    monkeypatch.setattr(timm, "create_model", create_model)


# Hugging Face's vision towers of models that have a text tower, too.
WITH_TEXT = {
    "CLIPVisionModelWithProjection": "CLIP",
    "MetaClip2VisionModelWithProjection": "MetaClip2",
    "SiglipVisionModel": "Siglip",
}


def with_text(kind: str, folder: Path, **options: Any) -> tuple[str, Any, Any]:
    """Both towers of Hugging Face's CLIP, MetaClip2 or Siglip in ``folder``: its name, the model and its tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<pad>",
        "<unk>",
        "<end>",
        "a",
        "photo",
        "of",
        "the",
        "cat",
        "dog",
        "bus",
        "great",
        "tit",
        "zebra",
        "at",
        "night",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    whole.save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": 9}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8, **options}
    text |= {"hidden_size": vision["hidden_size"], "projection_size": vision["hidden_size"]} if kind == "Siglip" else {}
    width = {} if kind == "Siglip" else {"projection_dim": vision.pop("projection_dim", 48)}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **width)
    model: Any = randomise(getattr(transformers, f"{kind}Model")(config))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    _save_preprocessor(folder)
    whole.model_max_length = 9
    return f"hf:{folder}", model, whole


def text_logits(model: Any, tokenizer: Any, prompts: list[str], images: Tensor) -> Tensor:
    """The logits of a model of `with_text`, of normalised images; without SigLIP's bias, the same for all prompts."""
    siglip = model.config.model_type == "siglip"  # trained on the padding as well: without a mask
    tokens = tokenizer(prompts, padding="max_length" if siglip else True, return_tensors="pt")
    given = {name: tokens[name] for name in ("input_ids", *([] if siglip else ["attention_mask"]))}
    with torch.no_grad():
        return model(pixel_values=images, **given).logits_per_image - getattr(model, "logit_bias", 0)


def _save_preprocessor(folder: Path) -> None:
    crop = {"height": SIDE, "width": SIDE}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": crop}
    pixels = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | pixels))


GROWS = {"interpolate_pos_encoding": True}
SWIGLU = {"use_swiglu_ffn": True, "mlp_ratio": 3}
GATED = {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 96}
EVA_CLIP = {"num_classes": 48, "global_pool": "token"}
FAMILIES = [
    Family("CLIP", "hf", "CLIPVisionModelWithProjection", {"projection_dim": 48, "intermediate_size": 160}, GROWS),
    Family("CLIP", "hf", "CLIPVisionModel", {"hidden_act": "gelu"}, GROWS),
    Family("CLIP", "timm", "vit_base_patch16_clip_quickgelu_224", {"num_classes": 48}),
    Family("CLIP", "open_clip", "VisionTransformer", {"quick_gelu": True}),
    Family("DFN, MetaCLIP", "timm", "vit_base_patch16_clip_224", {"num_classes": 48}),
    Family("DFN, MetaCLIP", "open_clip", "VisionTransformer", {"mlp_ratio": 2.5}),
    Family("MetaCLIP 2", "hf", "MetaClip2VisionModelWithProjection", {"projection_dim": 48}, GROWS),
    Family("CLIP with LayerScale, without ln_pre", "open_clip", "VisionTransformer",
           {"ls_init_value": 0.3, "no_ln_pre": True}),
    Family("SigLIP, SigLIP 2", "hf", "SiglipVisionModel", {"intermediate_size": 100}, GROWS),
    Family("SigLIP, SigLIP 2", "timm", "vit_base_patch16_siglip_224"),
    Family("SigLIP, SigLIP 2", "open_clip", "vit_base_patch32_siglip_256", {"text_of": "ViT-B-32-SigLIP2-256"}),
    Family("SigLIP, SigLIP 2", "open_clip", "vit_base_patch16_siglip_224", {"text_of": "ViT-B-16-SigLIP"}),
    Family("SigLIP so400m, heads of 72", "hf", "SiglipVisionModel",
           {"hidden_size": 144, "num_attention_heads": 2, "intermediate_size": 538}, GROWS),
    Family("SigLIP so400m, heads of 72", "timm", "vit_so400m_patch14_siglip_378", {"embed_dim": 144, "num_heads": 2}),
    Family("ViT, AugReg, DeiT III", "hf", "ViTModel", {"intermediate_size": 256}, GROWS),
    Family("ViT, AugReg, DeiT III", "timm", "vit_base_patch16_224", {"num_classes": 7}),
    Family("ViT, AugReg, DeiT III", "timm", "deit3_small_patch16_224"),
    Family("ViT without q/k/v bias", "timm", "vit_base_patch16_224", {"qkv_bias": False}),
    Family("ViT with QK-norm", "timm", "vit_base_patch16_224", {"qk_norm": True}),
    Family("ViT of a mean (MAE fine-tuned)", "timm", "vit_base_patch16_224", {"global_pool": "avg"}),
    Family("ViT of a mean, norm first", "timm", "vit_base_patch16_siglip_gap_224"),
    Family("MAE", "hf", "ViTMAEModel", {"mask_ratio": 0.0}, GROWS),
    Family("I-JEPA", "hf", "IJepaModel", {"intermediate_size": 100}, GROWS),
    Family("DINOv2", "hf", "Dinov2Model"),
    Family("DINOv2", "timm", "vit_small_patch14_dinov2"),
    Family("DINOv2 with registers", "hf", "Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    Family("DINOv2 with registers", "timm", "vit_small_patch14_reg4_dinov2"),
    Family("DINOv2 giant (SwiGLU)", "hf", "Dinov2WithRegistersModel", {"num_register_tokens": 3, **SWIGLU}),
    Family("DINOv2 giant (SwiGLU)", "timm", "vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 4.5}),
    Family("DINOv3", "hf", "DINOv3ViTModel", {"num_register_tokens": 3, "intermediate_size": 100}),
    Family("DINOv3", "timm", "vit_small_patch16_dinov3", {"global_pool": "token"}),
    Family("DINOv3", "timm", "vit_small_patch16_dinov3_qkvb"),
    Family("DINOv3 H+, 7B (SwiGLU)", "hf", "DINOv3ViTModel", {"num_register_tokens": 3, "query_bias": False,
           "value_bias": False, **GATED}),
    Family("DINOv3 H+, 7B (SwiGLU)", "timm", "vit_huge_plus_patch16_dinov3", {"global_pool": "token"}),
    Family("EVA-02", "timm", "eva02_tiny_patch14_224"),
    Family("EVA-02", "timm", "eva02_base_patch14_224"),
    Family("EVA-02-CLIP", "timm", "eva02_base_patch16_clip_224", EVA_CLIP),
    Family("EVA-02-CLIP", "open_clip", "eva02_base_patch16_clip_224",
           {"timm_pool": "token", "timm_proj": None, "text_of": "EVA02-B-16"}),
    Family("Perception Encoder", "timm", "vit_pe_core_base_patch16_224", {"num_classes": 48, "attn_pool_num_heads": 2}),
    Family("Perception Encoder", "open_clip", "vit_pe_core_base_patch16_224",
           {"timm_proj": None, "text_of": "PE-Core-B-16"}),
    Family("RoPE-ViT", "timm", "vit_small_patch16_rope_224"),
]  # fmt: skip
