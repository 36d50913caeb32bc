"""What of the student is trained, and how fast: all of it, its last blocks, adapters; slower towards the pixels."""

from __future__ import annotations

import torch
from torch import nn

from ..methods import Method
from ..models import ImageClassifier
from ..models.adapters import add_adapters
from .settings import OptimConfig


def choose_trained(config: OptimConfig, student: ImageClassifier, seed: int) -> None:
    """Leave alone what shall rest, and give the blocks their adapters, in place.

    With ``last_blocks``, the head and all that comes after the blocks is trained as well; with adapters, these and the
    head alone.
    """
    if not config.lora_rank and config.last_blocks is None:
        return
    backbone = student.transformer
    last = list(backbone.blocks)[-(config.last_blocks or len(backbone.blocks)) :]
    after = [module for module in (backbone.ln_post, backbone.pool) if module is not None]
    backbone.requires_grad_(False)
    if config.lora_rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_adapters(last, config.lora_layers, config.lora_rank, config.lora_alpha or config.lora_rank)
        return
    for module in (*last, *after):
        module.requires_grad_()
    for parameter in (backbone.projection, backbone.projection_bias):
        if parameter is not None:
            parameter.requires_grad_()


def parameter_groups(config: OptimConfig, method: Method) -> list[dict[str, object]]:
    """The trained parameters and their learning rates: one group, or one per layer, the last first.

    The rate falls by ``layer_decay`` from what comes after the blocks to the last block, and so on to the embedding.

    Source: Clark et al., "ELECTRA", ICLR 2020; for vision transformers Bao et al., "BEiT", ICLR 2022.
    """
    depth = method.student.backbone.config.depth
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            below = 0 if config.layer_decay == 1 else depth + 1 - _layer(name, depth)
            groups.setdefault(below, []).append(parameter)
    return [{"params": groups[below], "lr": config.lr * config.layer_decay**below} for below in sorted(groups)]


FIRST = {"patch_weight", "patch_bias", "class_embedding", "registers", "position_embedding", "ln_pre"}


def _layer(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, and ``depth + 1`` for what follows."""
    owner, part, *rest = [*name.split(".")[1:], ""]
    if owner == "backbone" and part == "blocks":
        return 1 + int(rest[0])
    return 0 if owner == "backbone" and part in FIRST else depth + 1
