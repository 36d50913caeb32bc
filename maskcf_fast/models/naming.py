"""How other libraries name and shape the tensors of a vision transformer: one table each, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import VisionTransformerConfig

State = dict[str, Tensor]

# How packed layers may be cut into others: what follows the block's or the pool's name, and the shares of the rows.
DIVISIONS = (
    ("attn.qkv", {"attn.q": 1, "attn.k": 1, "attn.v": 1}),
    ("attn.qkv", {"attn.q": 1, "attn.kv": 2}),
    ("attn.qkv", {"attn.q": 1, "attn.v": 1}),  # a bias without the keys'
    ("fc", {"gate": 1, "value": 1}),
)
TOKENS = {"class_embedding": 2, "position_embedding": 1, "registers": 1}  # [1, 1, width], [1, tokens, width]


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
        also: Further names of the library's → this package's, which are read and not written.
    """

    library: str
    names: Mapping[str, str]
    mark: str = ""
    beside: str = ""
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False
    antialias: bool = True
    ignored: str = r"$^"
    also: Mapping[str, str] = field(default_factory=dict)
    inverse: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", {**self.also, **{theirs: ours for ours, theirs in self.names.items()}})

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
        for whole, shares in DIVISIONS:
            first = next(iter(shares))
            for name in [name for name in ours if re.search(rf"\.{first}\.(weight|bias)$", name)]:
                parts = [name.replace(f".{first}.", f".{part}.") for part in shares]
                if all(part in ours for part in parts):
                    ours[name.replace(f".{first}.", f".{whole}.")] = torch.cat([ours.pop(part) for part in parts])
        for name, count in self.leading.items():
            if name in ours and ours[name].dim() > count:
                ours[name] = ours[name].flatten(0, count)
        if "projection" in ours and self.transposed:
            ours["projection"] = ours["projection"].mT.contiguous()
        return ours

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """The inverse of `to_ours`."""
        ours = dict(state)
        for name in list(ours):
            whole = re.search(r"\.(attn\.qkv|fc)\.(weight|bias)$", name)
            if whole is None or _entry(name, self.names):
                continue
            units = 2 if whole[1] == "fc" else 3 * len(ours[name]) // len(state[f"{name.rpartition('.')[0]}.weight"])
            for packed, shares in DIVISIONS:
                parts = [name.replace(f".{whole[1]}.", f".{part}.") for part in shares]
                if packed == whole[1] and sum(shares.values()) == units and all(_entry(p, self.names) for p in parts):
                    tensor = ours.pop(name)
                    sizes = [share * len(tensor) // units for share in shares.values()]
                    ours |= dict(zip(parts, tensor.split(sizes), strict=True))
                    break
        for name, count in self.leading.items():
            if name in ours:
                ours[name] = ours[name][(None,) * count]
        if "projection" in ours and self.transposed:
            ours["projection"] = ours["projection"].mT
        return {_rename(name, self.names): tensor.contiguous() for name, tensor in ours.items()}


def class_position(
    config: VisionTransformerConfig, state: Mapping[str, Tensor]
) -> tuple[VisionTransformerConfig, State]:
    """The same model with a position of the class token, which adds nothing, where only patches have one."""
    state, positions = dict(state), state.get("position_embedding")
    if positions is None or not config.class_token or config.positions == "all":
        return config, state
    state["position_embedding"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    return replace(config, positions="all"), state


def _entry(name: str, names: Mapping[str, str]) -> str:
    """The longest entry that ``name`` is or begins with, or nothing; ``#`` is for a number."""
    stem = re.sub(r"\b\d+\.", "#.", name, count=1)
    while stem and stem not in names:
        stem = stem.rpartition(".")[0]
    return stem


def _rename(name: str, names: Mapping[str, str]) -> str:
    """By its `_entry`; a name without one stays."""
    entry = _entry(name, names)
    if not entry:
        return name
    number = re.search(r"\b(\d+)\.", name)
    numbered = re.sub(r"\b\d+\.", "#.", name, count=1)
    new = names[entry] + numbered[len(entry) :]
    return new.replace("#", number[1]) if number else new


def _blocks(owner: str, names: Mapping[str, str]) -> dict[str, str]:
    """Names within a block, as those of all of a library's blocks."""
    return {f"blocks.#.{ours}": f"{owner}.#.{theirs}" for ours, theirs in names.items()}


OPEN_CLIP = Naming(
    "open_clip",
    {
        "patch_weight": "conv1.weight", "class_embedding": "class_embedding",
        "position_embedding": "positional_embedding", "ln_pre": "ln_pre", "ln_post": "ln_post", "projection": "proj",
        **_blocks("transformer.resblocks", {
            "ln_1": "ln_1", "ln_2": "ln_2", "scale_1": "ls_1.gamma", "scale_2": "ls_2.gamma",
            "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias", "attn.out": "attn.out_proj",
            "fc": "mlp.c_fc", "proj": "mlp.c_proj",
        }),
    },
)  # fmt: skip
_HF_CLIP = {
    "patch_weight": "embeddings.patch_embedding.weight", "position_embedding": "embeddings.position_embedding.weight",
    "ln_post": "post_layernorm",
    **_blocks("encoder.layers", {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.out": "self_attn.out_proj", "fc": "mlp.fc1", "proj": "mlp.fc2",
    }),
}  # fmt: skip
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
        "patch_bias": "embeddings.patch_embedding.bias", "pool.probe": "head.probe",
        "pool.attn.qkv.weight": "head.attention.in_proj_weight", "pool.attn.qkv.bias": "head.attention.in_proj_bias",
        "pool.attn.out": "head.attention.out_proj", "pool.ln": "head.layernorm", "pool.fc": "head.mlp.fc1",
        "pool.proj": "head.mlp.fc2",
    },
    mark="head.probe",
    leading={"pool.probe": 2},
    antialias=False,
    ignored=r"embeddings\.position_ids$",
)  # fmt: skip
_HF_VIT = {
    "patch_weight": "embeddings.patch_embeddings.projection.weight",
    "patch_bias": "embeddings.patch_embeddings.projection.bias",
    "class_embedding": "embeddings.cls_token", "position_embedding": "embeddings.position_embeddings",
    "ln_post": "layernorm",
    **_blocks("encoder.layer", {
        **{f"attn.{part[0]}": f"attention.attention.{part}" for part in ("query", "key", "value")},
        "attn.out": "attention.output.dense",
    }),
}  # fmt: skip
HF_VIT = Naming(  # and I-JEPA, and MAE's encoder
    "Hugging Face ViT",
    {
        **_HF_VIT,
        **_blocks("encoder.layer", {
            "ln_1": "layernorm_before", "ln_2": "layernorm_after", "fc": "intermediate.dense", "proj": "output.dense",
        }),
    },
    leading=TOKENS,
    antialias=False,
    ignored=r"pooler\.|classifier\.|embeddings\.mask_token$",
)  # fmt: skip
_DINO = {"ln_1": "norm1", "ln_2": "norm2", "scale_1": "layer_scale1.lambda1", "scale_2": "layer_scale2.lambda1"}
_GATED_DINO = _blocks("encoder.layer", {"fc": "mlp.weights_in", "proj": "mlp.weights_out"})
HF_DINOV2 = Naming(
    "Hugging Face DINOv2",
    {**_HF_VIT, **_blocks("encoder.layer", {**_DINO, "fc": "mlp.fc1", "proj": "mlp.fc2"})},
    leading=TOKENS,
    antialias=False,
    ignored=r"classifier\.|embeddings\.mask_token$",
    also={theirs: ours for ours, theirs in _GATED_DINO.items()},
)
_REGISTERS = {"registers": "embeddings.register_tokens"}
HF_DINOV2_REGISTERS = replace(
    HF_DINOV2, names={**HF_DINOV2.names, **_REGISTERS}, mark="embeddings.register_tokens", antialias=True
)
HF_DINOV3 = Naming(
    "Hugging Face DINOv3",
    {
        "patch_weight": "embeddings.patch_embeddings.weight", "patch_bias": "embeddings.patch_embeddings.bias",
        "class_embedding": "embeddings.cls_token", "ln_post": "norm", **_REGISTERS,
        **_blocks("layer", {
            **_DINO, "attn.out": "attention.o_proj", **{f"attn.{part}": f"attention.{part}_proj" for part in "qkv"},
            "fc": "mlp.up_proj", "proj": "mlp.down_proj",
        }),
    },
    leading=TOKENS,
    ignored=r"embeddings\.mask_token$",
)  # fmt: skip


def gated(naming: Naming) -> Naming:
    """Hugging Face's names where the MLPs of a DINO make gates."""
    if naming is not HF_DINOV3:
        return replace(naming, names={**naming.names, **_GATED_DINO})
    names = {name: theirs for name, theirs in naming.names.items() if name != "blocks.#.fc"}
    names |= _blocks("layer", {"gate": "mlp.gate_proj", "value": "mlp.up_proj"})
    return replace(naming, names=names, mark="layer.0.mlp.gate_proj.weight")


TIMM = Naming(
    "timm",
    {
        "patch_weight": "patch_embed.proj.weight", "patch_bias": "patch_embed.proj.bias",
        "class_embedding": "cls_token", "registers": "reg_token", "position_embedding": "pos_embed",
        "ln_pre": "norm_pre", "ln_post": "norm", "projection": "head.weight", "projection_bias": "head.bias",
        **_blocks("blocks", {
            "ln_1": "norm1", "ln_2": "norm2", "scale_1": "ls1.gamma", "scale_2": "ls2.gamma",
            "attn.qkv": "attn.qkv", "attn.out": "attn.proj", "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm",
            "attn.norm": "attn.norm", "fc": "mlp.fc1", "proj": "mlp.fc2", "mlp_norm": "mlp.norm",
        }),
        "pool.probe": "attn_pool.latent", "pool.attn.q": "attn_pool.q", "pool.attn.kv": "attn_pool.kv",
        "pool.attn.out": "attn_pool.proj", "pool.ln": "attn_pool.norm", "pool.fc": "attn_pool.mlp.fc1",
        "pool.proj": "attn_pool.mlp.fc2",
    },
    leading={**TOKENS, "pool.probe": 2},
    transposed=True,
    also={
        "fc_norm": "ln_post", "blocks.#.attn.q_bias": "blocks.#.attn.q.bias",
        "blocks.#.attn.v_bias": "blocks.#.attn.v.bias",
        **{f"blocks.#.attn.{part}_proj": f"blocks.#.attn.{part}" for part in "qkv"},
        **{f"blocks.#.gamma_{i}": f"blocks.#.scale_{i}" for i in (1, 2)},
        "blocks.#.mlp.fc1_g": "blocks.#.gate", "blocks.#.mlp.fc1_x": "blocks.#.value",
    },
)  # fmt: skip


def timm_naming(config: VisionTransformerConfig, eva: bool) -> Naming:
    """timm's names for a model's tensors; ``eva`` is for those of its `Eva` models."""
    names = dict(TIMM.names)
    if config.pool_norm:
        names["ln_post"] = "fc_norm"
    if eva:
        names |= {f"blocks.#.scale_{i}": f"blocks.#.gamma_{i}" for i in (1, 2)}
        if config.qkv_bias == "qv":
            del names["blocks.#.attn.qkv"]
            names |= {f"blocks.#.attn.{part}": f"blocks.#.attn.{part}_proj" for part in "qkv"}
        if config.gated_mlp and config.mlp_norm:
            del names["blocks.#.fc"]
            names |= {"blocks.#.gate": "blocks.#.mlp.fc1_g", "blocks.#.value": "blocks.#.mlp.fc1_x"}
    return replace(TIMM, names=names)


OWN = Naming("this package", {name: name for name in ("patch_weight", "blocks.#")})
# The first that fits a file's names is taken.
NAMINGS = (
    OWN, OPEN_CLIP, HF_CLIP, HF_SIGLIP, HF_DINOV2_REGISTERS, HF_DINOV2, HF_VIT, gated(HF_DINOV3), HF_DINOV3, TIMM
)  # fmt: skip
