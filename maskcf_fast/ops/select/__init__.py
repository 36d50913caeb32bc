"""Which patches of each image to mask, from its attention-relevance map."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import (
    FLOATS,
    check_batch,
    check_int,
    check_number,
    check_tensor,
    debug_enabled,
    shown,
    value_checks,
)
from ..dispatch import define, implementation
from . import reference

define(reference.select_patches)

REGIONS = ("object", "context")


def select_patches(
    cam: Tensor,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    region: str = "object",
    impl: str = "auto",
) -> Tensor:
    """Choose the patches to mask from a relevance map.

    By threshold, with ``score = cam / (maximum of the row + 1e-8)``, the object mask is ``score > threshold``
    (strictly) and the context mask its complement. By top-k, the object mask is the ``top_k`` highest patches
    and the context mask the ``top_k`` lowest; ties go to the lower patch index.

    Scores are computed in float32 (float64 for a float64 map). A row of zeros selects nothing (object) or
    everything (context) by threshold, and the first ``top_k`` patches by top-k. A row with a NaN or an
    infinity counts as a row of zeros; with ``MASKCF_DEBUG=1`` it is an error instead.

    Source: Xiao et al., "Masked Images Are Counterfactual Samples for Robust Fine-tuning", CVPR 2023.

    Args:
        cam: Relevance per patch, ``[N, L]``, float32, float16, bfloat16 or float64, expected non-negative.
        threshold: Cut on the normalised score. Exactly one of ``threshold`` and ``top_k`` is given.
        top_k: Number of patches to select in every image, 0 to L.
        region: ``"object"`` (the relevant patches) or ``"context"`` (the others).
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        The mask ``[N, L]``, bool, True where the patch is selected.

    Raises:
        TypeError: ``cam`` is no floating-point tensor, or ``top_k`` no integer.
        ValueError: Wrong shape, empty batch, both or neither of ``threshold`` and ``top_k``, a value out of
            range, an unknown region or implementation, or (debug) a non-finite map.
    """
    check_cam(cam)
    selection = check_selection(cam.shape[1], threshold, top_k, region)
    run = implementation(reference.select_patches, impl, cam.device, dtype=cam.dtype)
    return run(widened(cam), *selection)


def widened(cam: Tensor) -> Tensor:
    """The map in the dtype of its scores, cut off from the graph."""
    return cam.detach() if cam.dtype == torch.float64 else cam.detach().float()


def check_cam(cam: Tensor) -> None:
    """Raise unless ``cam`` is a non-empty float ``[N, L]`` (and, in debug mode, finite)."""
    check_tensor("cam", cam, ["N", "L"], dtypes=FLOATS)
    check_batch("cam", cam)
    if debug_enabled() and value_checks(cam):
        bad = (~cam.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"cam holds NaN or infinity in row {bad[0]} ({len(bad)} of {len(cam)} rows)")


def check_selection(
    num_patches: int, threshold: float | None, top_k: int | None, region: str
) -> tuple[float | None, int | None, bool]:
    """Threshold, top-k and whether the region is the context, as the contract takes them.

    Raises unless exactly one of ``threshold`` and ``top_k`` is given, in range, with a known region.
    """
    if region not in REGIONS:
        raise ValueError(f"region must be 'object' or 'context', got {shown(region)}")
    if (threshold is None) == (top_k is None):
        given = f"threshold={shown(threshold)}, top_k={shown(top_k)}"
        raise ValueError(f"exactly one of threshold and top_k must be given, got {given}")
    if top_k is not None:
        check_int("top_k", top_k, 0, num_patches, "L")
    return None if threshold is None else check_number("threshold", threshold), top_k, region == "context"
