"""How other libraries name and shape the tensors of a vision transformer: one table each, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]

DIVISIONS = (("q", "k", "v"), ("q", "kv"))  # how a packed projection may be cut into layers
TOKENS = {"class_embedding": 2, "position_embedding": 1}  # [1, 1, width] and [1, tokens, width]


@dataclass(frozen=True)
class Naming:
    """One library's names and shapes.

    Attributes:
        library: What messages call it.
        names: This package's name (or the start of one) → the library's; ``#`` stands for a block's number.
        mark: A tensor that tells the architecture from others of the same names, by the library's name.
        beside: Of a file that holds more than the vision tower, the end of the tower's prefix that the projection's
            name lacks.
        leading: Tensors that have dimensions of 1 in front there, by this package's name, and how many.
        transposed: The projection is a Linear layer's ``[output, width]``.
        antialias: Whether the library smooths the position embeddings that it resamples to a smaller grid.
        ignored: Pattern of the library's names that do not belong to the feature.
    """

    library: str
    names: Mapping[str, str]
    mark: str = ""
    beside: str = ""
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False
    antialias: bool = True
    ignored: str = r"$^"
    inverse: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", {theirs: ours for ours, theirs in self.names.items()})

    def prefixes(self, state: Iterable[str]) -> list[str]:
        """What the names of such vision towers begin with, of those that ``state`` holds: whatever was put in front."""
        names = set(state)
        first, *others = (_rename(name, self.names) for name in ("patch_weight", "blocks.0.ln_1.weight"))
        others += [self.mark] if self.mark else []
        found = sorted(name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}"))
        return [prefix for prefix in found if all(prefix + other in names for other in others)]

    def tower(self, state: Mapping[str, Tensor], prefix: str) -> State:
        """The tensors under ``prefix``, without it, and a projection that lies beside them."""
        tower = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        projection = self.names.get("projection", "")
        if self.beside and prefix.endswith(self.beside):
            outside = prefix.removesuffix(self.beside) + projection
            tower |= {projection: state[outside]} if outside in state else {}
        return tower

    def to_ours(self, state: Mapping[str, Tensor]) -> State:
        """The library's tensors under this package's names and in its shapes; unknown names stay."""
        ours = {_rename(name, self.inverse): t for name, t in state.items() if not re.match(self.ignored, name)}
        for name in [name for name in ours if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
            for division in DIVISIONS:
                parts = [name.replace(".attn.q.", f".attn.{part}.") for part in division]
                if all(part in ours for part in parts):
                    ours[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([ours.pop(part) for part in parts])
        for name, count in self.leading.items():
            if name in ours and ours[name].dim() > count:
                ours[name] = ours[name].flatten(0, count)
        if "projection" in ours and self.transposed:
            ours["projection"] = ours["projection"].mT.contiguous()
        return ours

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """The inverse of `to_ours`."""
        ours = dict(state)
        for name in [name for name in ours if ".attn.qkv." in name]:
            stem = re.sub(r"\.\d+\.", ".#.", name).partition("qkv.")[0]
            for division in DIVISIONS:
                if all(stem + part in self.names for part in division):
                    whole = ours.pop(name)
                    parts = whole.split([len(part) * len(whole) // 3 for part in division])
                    ours |= {name.replace("qkv", p): t for p, t in zip(division, parts, strict=True)}
        for name, count in self.leading.items():
            if name in ours:
                ours[name] = ours[name][(None,) * count]
        if "projection" in ours and self.transposed:
            ours["projection"] = ours["projection"].mT
        return {_rename(name, self.names): tensor.contiguous() for name, tensor in ours.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    """By the longest entry that ``name`` is or begins with; a name without one stays."""
    number = re.search(r"\.(\d+)\.", name)
    stem = name.replace(number[0], ".#.", 1) if number else name
    rest = ""
    while stem not in names:
        stem, dot, last = stem.rpartition(".")
        if not dot:
            return name
        rest = f".{last}{rest}"
    new = names[stem] + rest
    return new.replace("#", number[1]) if number else new


OPEN_CLIP = Naming(
    "open_clip",
    {
        "patch_weight": "conv1.weight",
        "class_embedding": "class_embedding",
        "position_embedding": "positional_embedding",
        "ln_pre": "ln_pre",
        "ln_post": "ln_post",
        "projection": "proj",
        "blocks.#.ln_1": "transformer.resblocks.#.ln_1",
        "blocks.#.ln_2": "transformer.resblocks.#.ln_2",
        "blocks.#.attn.qkv.weight": "transformer.resblocks.#.attn.in_proj_weight",
        "blocks.#.attn.qkv.bias": "transformer.resblocks.#.attn.in_proj_bias",
        "blocks.#.attn.out": "transformer.resblocks.#.attn.out_proj",
        "blocks.#.fc": "transformer.resblocks.#.mlp.c_fc",
        "blocks.#.proj": "transformer.resblocks.#.mlp.c_proj",
        "blocks.#.scale_1": "transformer.resblocks.#.ls_1.gamma",
        "blocks.#.scale_2": "transformer.resblocks.#.ls_2.gamma",
    },
)
_HF_CLIP = {
    "patch_weight": "embeddings.patch_embedding.weight",
    "position_embedding": "embeddings.position_embedding.weight",
    "ln_post": "post_layernorm",
    "blocks.#.ln_1": "encoder.layers.#.layer_norm1",
    "blocks.#.ln_2": "encoder.layers.#.layer_norm2",
    "blocks.#.attn.q": "encoder.layers.#.self_attn.q_proj",
    "blocks.#.attn.k": "encoder.layers.#.self_attn.k_proj",
    "blocks.#.attn.v": "encoder.layers.#.self_attn.v_proj",
    "blocks.#.attn.out": "encoder.layers.#.self_attn.out_proj",
    "blocks.#.fc": "encoder.layers.#.mlp.fc1",
    "blocks.#.proj": "encoder.layers.#.mlp.fc2",
}
HF_CLIP = Naming(
    "Hugging Face CLIP",
    {
        **_HF_CLIP,
        "class_embedding": "embeddings.class_embedding",
        "ln_pre": "pre_layrnorm",
        "projection": "visual_projection.weight",
    },
    mark="embeddings.class_embedding",
    beside="vision_model.",
    transposed=True,
    antialias=False,
    ignored=r"embeddings\.position_ids$",
)
HF_SIGLIP = Naming(
    "Hugging Face SigLIP",
    {
        **_HF_CLIP,
        "patch_bias": "embeddings.patch_embedding.bias",
        "pool.probe": "head.probe",
        "pool.attn.qkv.weight": "head.attention.in_proj_weight",
        "pool.attn.qkv.bias": "head.attention.in_proj_bias",
        "pool.attn.out": "head.attention.out_proj",
        "pool.ln": "head.layernorm",
        "pool.fc": "head.mlp.fc1",
        "pool.proj": "head.mlp.fc2",
    },
    mark="head.probe",
    leading={"pool.probe": 2},
    antialias=False,
    ignored=r"embeddings\.position_ids$",
)
_HF_VIT = {
    "patch_weight": "embeddings.patch_embeddings.projection.weight",
    "patch_bias": "embeddings.patch_embeddings.projection.bias",
    "class_embedding": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "ln_post": "layernorm",
    "blocks.#.attn.q": "encoder.layer.#.attention.attention.query",
    "blocks.#.attn.k": "encoder.layer.#.attention.attention.key",
    "blocks.#.attn.v": "encoder.layer.#.attention.attention.value",
    "blocks.#.attn.out": "encoder.layer.#.attention.output.dense",
}
HF_VIT = Naming(
    "Hugging Face ViT",
    {
        **_HF_VIT,
        "blocks.#.ln_1": "encoder.layer.#.layernorm_before",
        "blocks.#.ln_2": "encoder.layer.#.layernorm_after",
        "blocks.#.fc": "encoder.layer.#.intermediate.dense",
        "blocks.#.proj": "encoder.layer.#.output.dense",
    },
    leading=TOKENS,
    antialias=False,
    ignored=r"pooler\.|classifier\.|embeddings\.mask_token$",
)
HF_DINOV2 = Naming(
    "Hugging Face DINOv2",
    {
        **_HF_VIT,
        "blocks.#.ln_1": "encoder.layer.#.norm1",
        "blocks.#.ln_2": "encoder.layer.#.norm2",
        "blocks.#.fc": "encoder.layer.#.mlp.fc1",
        "blocks.#.proj": "encoder.layer.#.mlp.fc2",
        "blocks.#.scale_1": "encoder.layer.#.layer_scale1.lambda1",
        "blocks.#.scale_2": "encoder.layer.#.layer_scale2.lambda1",
    },
    leading=TOKENS,
    antialias=False,
    ignored=r"classifier\.|embeddings\.mask_token$",
)
TIMM = Naming(
    "timm",
    {
        "patch_weight": "patch_embed.proj.weight",
        "patch_bias": "patch_embed.proj.bias",
        "class_embedding": "cls_token",
        "position_embedding": "pos_embed",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "projection": "head.weight",
        "blocks.#.ln_1": "blocks.#.norm1",
        "blocks.#.ln_2": "blocks.#.norm2",
        "blocks.#.attn.qkv": "blocks.#.attn.qkv",
        "blocks.#.attn.out": "blocks.#.attn.proj",
        "blocks.#.fc": "blocks.#.mlp.fc1",
        "blocks.#.proj": "blocks.#.mlp.fc2",
        "blocks.#.scale_1": "blocks.#.ls1.gamma",
        "blocks.#.scale_2": "blocks.#.ls2.gamma",
        "pool.probe": "attn_pool.latent",
        "pool.attn.q": "attn_pool.q",
        "pool.attn.kv": "attn_pool.kv",
        "pool.attn.out": "attn_pool.proj",
        "pool.ln": "attn_pool.norm",
        "pool.fc": "attn_pool.mlp.fc1",
        "pool.proj": "attn_pool.mlp.fc2",
    },
    leading={**TOKENS, "pool.probe": 2},
    transposed=True,
)
OWN = Naming("this package", {name: name for name in ("patch_weight", "blocks.#")})
NAMINGS = (OWN, OPEN_CLIP, HF_CLIP, HF_SIGLIP, HF_DINOV2, HF_VIT, TIMM)
