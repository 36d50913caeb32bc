"""The relevance of small models of other libraries from attention maps that are written out.

The maps come from each library's own eager attention where it has one, else from a scaled-dot-product attention
with the softmax written out, put in torch's place. None of it uses the package's code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from families import PATCHES, SIDE, module
from torch import Tensor, nn

CLASSES, LAYERS = 5, 3
VISION = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip


def timm_model(name: str, **options: Any) -> nn.Module:
    return module("timm", name, **{"depth": LAYERS, "num_classes": CLASSES, **options})


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(SIDE, 8, LAYERS, 2, 32, 64, num_classes=CLASSES)


def hf_model(name: str, **options: Any) -> nn.Module:
    return module("hf", name, **VISION, num_labels=CLASSES, **options)


def hf_dual_model(name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(vision_config=VISION, num_labels=CLASSES))


class TextScores(nn.Module):
    """Images against fixed texts, through the whole dual encoder: logits [N, texts]."""

    def __init__(self, model: nn.Module, texts: int) -> None:
        super().__init__()
        self.model = model
        ids = torch.randint(3, 90, (texts, 7), generator=torch.Generator().manual_seed(3))
        ids[:, -1] = 99  # the end token, as the largest
        self.ids = ids


class OpenClipScores(TextScores):
    def forward(self, images: Tensor) -> Tensor:
        image, text = self.model(images, self.ids)[:2]
        return 10 * image @ text.T


class HuggingFaceScores(TextScores):
    def forward(self, images: Tensor) -> Any:
        return self.model(input_ids=self.ids, pixel_values=images).logits_per_image


def open_clip_model(**changes: Any) -> nn.Module:
    sizes = {"layers": LAYERS, "width": 64, "embed_dim": CLASSES, "context_length": 7}
    return module("open_clip", "VisionTransformer", **sizes, **changes)


def hf_clip() -> nn.Module:
    import transformers

    text = {name: VISION[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    text |= {"num_hidden_layers": 2, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 99, "pad_token_id": 0}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    maps: str  # where the oracle's maps come from: timm, hf or sdpa
    prefix: int = 1
    start: str = "class"  # or distilled, patches, tokens, class+patches, attention


MODELS = {
    "timm-vit": Model(lambda: timm_model("vit_tiny_patch16_224"), "timm"),
    "timm-deit-distilled": Model(lambda: timm_model("deit_tiny_distilled_patch16_224"), "timm", 2, "distilled"),
    "timm-dinov2-registers": Model(lambda: timm_model("vit_small_patch14_reg4_dinov2"), "timm", 5),
    "timm-average": Model(lambda: timm_model("vit_tiny_patch16_224", global_pool="avg"), "timm", 1, "patches"),
    "timm-siglip-gap": Model(lambda: timm_model("vit_base_patch16_siglip_gap_224"), "timm", 0, "tokens"),
    "timm-siglip-map": Model(lambda: timm_model("vit_base_patch16_siglip_224"), "sdpa", 0, "attention"),
    "timm-eva02-rope": Model(lambda: timm_model("eva02_tiny_patch14_224"), "timm", 1, "patches"),
    "torchvision-vit": Model(torchvision_vit, "sdpa"),
    "open_clip-visual": Model(lambda: open_clip_model().visual, "sdpa"),
    "open_clip-scores": Model(lambda: OpenClipScores(open_clip_model(), CLASSES), "sdpa"),
    "open_clip-scores-as-many-texts-as-images": Model(lambda: OpenClipScores(open_clip_model(), 3), "sdpa"),
    "hf-vit": Model(lambda: hf_model("ViTForImageClassification"), "hf"),
    "hf-deit": Model(lambda: hf_model("DeiTForImageClassification"), "hf", 2),
    "hf-deit-teacher": Model(lambda: hf_model("DeiTForImageClassificationWithTeacher"), "hf", 2, "distilled"),
    "hf-dinov2": Model(lambda: hf_model("Dinov2ForImageClassification"), "hf", 1, "class+patches"),
    "hf-dinov2-registers": Model(
        lambda: hf_model("Dinov2WithRegistersForImageClassification", num_register_tokens=4), "hf", 5, "class+patches"
    ),
    "hf-siglip": Model(lambda: hf_dual_model("SiglipForImageClassification"), "hf", 0, "tokens"),
    "hf-clip-classifier": Model(lambda: hf_dual_model("CLIPForImageClassification"), "hf", 1, "patches"),
    "hf-clip-scores": Model(lambda: HuggingFaceScores(hf_clip(), CLASSES), "sdpa"),
}


def make(
    name: str, *, train: bool = False, requires_grad: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model, with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = MODELS[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).train(train).requires_grad_(requires_grad)


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, SIDE, SIDE, generator=generator), torch.randint(3, (n,), generator=generator)


def expected(name: str, model: nn.Module, images: Tensor, labels: Tensor, start_layer: int = 0) -> Tensor:
    """The relevance [N, L] with every map and every R [N, T, T] in memory."""
    spec = MODELS[name]
    model = copy.deepcopy(model).requires_grad_(True)
    logits, maps = {"timm": timm_maps, "hf": hf_maps, "sdpa": sdpa_maps}[spec.maps](model, images)
    maps = [p for p in maps if p.shape[0] == len(images) and p.shape[-1] == PATCHES + spec.prefix]
    assert len(maps) == LAYERS + (spec.start == "attention")
    score = logits[range(len(labels)), labels].sum()
    grads = torch.autograd.grad(score, maps)
    relevances = [(p * g).clamp(min=0).mean(dim=1) for p, g in zip(maps, grads, strict=True)]  # [N, T, T] each

    t = PATCHES + spec.prefix
    start = torch.zeros(1, t, dtype=images.dtype)
    if spec.start in ("class", "class+patches"):
        start[0, 0] += 1
    if spec.start == "distilled":
        start[0, :2] = 0.5
    if spec.start in ("patches", "class+patches"):
        start[0, spec.prefix :] = 1 / PATCHES
    if spec.start == "tokens":
        start[0, :] = 1 / t
    rows = start.expand(len(images), 1, t)
    if spec.start == "attention":
        rows = relevances.pop()  # [N, 1, T]
    r = torch.eye(t, dtype=images.dtype).expand(len(images), t, t)
    for a in relevances[start_layer:]:
        r = r + a @ r
    return (rows @ r - start).squeeze(1)[:, spec.prefix :]


def timm_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    maps: list[Tensor] = []
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
            part.attn_drop.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    return model(images), maps


def hf_maps(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.set_attn_implementation("eager")
    out = model(images, output_attentions=True)
    return out.logits, list(out.attentions)


def sdpa_maps(model: Callable[[Tensor], Any], images: Tensor, hidden: Tensor | None = None) -> tuple[Any, list[Tensor]]:
    """What the model returns, and its maps; the ``hidden`` patches, bool [N, L], are seen by no token."""
    maps: list[Tensor] = []

    def written_out(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits + attn_mask if attn_mask.dtype != torch.bool else logits.masked_fill(~attn_mask, -torch.inf)
        if is_causal:
            logits = logits + torch.full(logits.shape[-2:], -torch.inf).triu(1)
        if hidden is not None:
            logits = logits.masked_fill(F.pad(hidden, (k.shape[2] - PATCHES, 0))[:, None, None, :], -torch.inf)
        maps.append(torch.softmax(logits, dim=-1))
        return maps[-1] @ v

    with mock.patch.object(F, "scaled_dot_product_attention", written_out):
        return model(images), maps


def assert_same(cam: Tensor, truth: Tensor) -> None:
    assert cam.shape == truth.shape
    assert truth.abs().max() > 1e-4  # far from the rounding of the constants that were subtracted
    assert (cam - truth).abs().max() <= 1e-5 * truth.abs().max()
