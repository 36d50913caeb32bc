"""Inputs that every implementation of an op is tested on, and what the answers are.

Plain functions and dictionaries, so that the suites of the implementations share them. ``*_CASES`` maps a name to
a function without arguments that returns keyword arguments for the op's public function; every call draws the same
values. The truths are written from the definitions alone, in NumPy or loops: they use none of the package's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Case = Callable[[], dict[str, Any]]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PIXELS = (*FLOATS, torch.uint8)
CUTS: dict[str, dict[str, Any]] = {
    "t0.3": {"threshold": 0.3},
    "t0": {"threshold": 0.0},
    "t1": {"threshold": 1.0},
    "t-1": {"threshold": -1.0},
    "tinf": {"threshold": math.inf},
    "k0": {"top_k": 0},
    "k1": {"top_k": 1},
    "khalf": {"top_k": "half"},  # see `cut_for`
    "kall": {"top_k": "all"},
}


def cut_for(cut: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """The arguments of a cut for maps of ``num_patches`` patches."""
    size = {"half": num_patches // 2, "all": num_patches}
    return {name: size.get(value, value) if isinstance(value, str) else value for name, value in cut.items()}


def generator(seed: int = 0) -> torch.Generator:
    """Fresh, seeded randomness: a case gives the same values at every call."""
    return torch.Generator().manual_seed(seed)


# --- Relevance maps -------------------------------------------------------------------------------------------


def random_cam(n: int, num_patches: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A map as real ones look: many zeros, a few large values, some ties."""
    g = generator(seed)
    cam = torch.rand(n, num_patches, generator=g) ** 4
    cam[torch.rand(n, num_patches, generator=g) < 0.2] = 0
    return ((cam * 64).round() / 64 if seed % 2 else cam).to(dtype)


def cam_with(value: float, n: int = 3, num_patches: int = 49) -> Tensor:
    """Row 1 holds one ``value``; the rows around it are ordinary."""
    cam = random_cam(n, num_patches)
    cam[1, num_patches // 2] = value
    return cam


def _bits_apart() -> Tensor:
    """Neighbouring floats around one value: only an exact selection separates them."""
    steps = torch.randperm(257, generator=generator(3)).to(torch.int32)
    one = torch.tensor(0.3).view(torch.int32)
    return (one + steps)[None].view(torch.float32).repeat(2, 1)


CAMS: dict[str, Callable[[], Tensor]] = {
    "7x7": lambda: random_cam(5, 49),
    "14x14": lambda: random_cam(4, 196),
    "16x16_ties": lambda: random_cam(4, 256, seed=1),
    "one_image": lambda: random_cam(1, 49),
    "one_patch": lambda: random_cam(3, 1),
    "L_prime": lambda: random_cam(3, 131),
    "L_4096": lambda: random_cam(2, 4096),
    "L_4096_ties": lambda: random_cam(2, 4096, seed=1),
    "constant": lambda: torch.full((2, 49), 0.37),
    "zeros": lambda: torch.zeros(2, 49),
    "signed_zeros": lambda: torch.zeros(2, 50) * torch.tensor([1.0, -1.0]).repeat(25),
    "negative": lambda: random_cam(3, 49) - 0.5,
    "all_negative": lambda: -random_cam(3, 49) - 0.1,
    "minus_eps": lambda: torch.full((2, 49), -1e-8),  # the denominator becomes 0
    "huge": lambda: random_cam(3, 49) * 3e38,
    "tiny": lambda: random_cam(3, 49) * 1e-42,  # subnormal
    "bits_apart": _bits_apart,
    "nan": lambda: cam_with(math.nan),
    "inf": lambda: cam_with(math.inf),
    "minus_inf": lambda: cam_with(-math.inf),
    "all_nan": lambda: torch.full((2, 49), math.nan),
    "float16": lambda: random_cam(3, 49, torch.float16),
    "bfloat16": lambda: random_cam(3, 49, torch.bfloat16),
    "float64": lambda: random_cam(3, 49, torch.float64),
    "transposed": lambda: random_cam(49, 5).T,
    "strided": lambda: random_cam(4, 98)[:, ::2],
    "expanded": lambda: random_cam(1, 49).expand(4, 49),
}


def true_mask(cam: Tensor, *, threshold: float | None = None, top_k: int | None = None, region: str) -> Tensor:
    """The mask by its definition: NumPy division row by row, and Python's sort."""
    kind = np.float64 if cam.dtype == torch.float64 else np.float32
    mask = []
    for row in cam.double().numpy().astype(kind):
        values = row if np.isfinite(row).all() else np.zeros_like(row)
        if threshold is not None:
            with np.errstate(all="ignore"):
                selected = values / (values.max() + kind(1e-8)) > kind(threshold)
            mask.append(selected if region == "object" else ~selected)
        else:
            sign = -1 if region == "object" else 1
            order = sorted(range(len(values)), key=lambda i: (sign * float(values[i]), i))
            selected = np.zeros(len(values), dtype=bool)
            selected[order[:top_k]] = True
            mask.append(selected)
    return torch.from_numpy(np.stack(mask))


# --- Images, masks and donors ---------------------------------------------------------------------------------


def random_mask(n: int, num_patches: int, rate: float = 0.5, seed: int = 0) -> Tensor:
    """Bernoulli mask ``[N, L]``; a rate of 0 or 1 gives none or all."""
    return torch.rand(n, num_patches, generator=generator(seed + 10)) < rate


def random_donors(n: int, num_patches: int, fill: str, seed: int = 0) -> Tensor:
    """Donors of each kind: "single" (a permutation), "multi", "repeated" (one image gives to many), "self"."""
    g = generator(seed + 20)
    if fill == "single":
        return torch.randperm(n, generator=g)
    if fill == "multi":
        return torch.randint(0, n, (n, num_patches), generator=g)
    if fill == "repeated":
        return torch.full((n,), n - 1, dtype=torch.int64)
    assert fill == "self"
    return torch.arange(n)


def random_pixels(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern a copy must keep: NaNs with payloads and negative zeros among them."""
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator(seed + 30))
    return bits.view(dtype).squeeze(-1)


def refill_case(
    n: int = 5,
    c: int = 3,
    grid: tuple[int, int] = (4, 4),
    patch: tuple[int, int] = (6, 6),
    dtype: torch.dtype = torch.float32,
    fill: str = "single",
    rate: float = 0.5,
    channels_last: bool = False,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> Case:
    """Arguments of ``refill_patches``; ``change`` makes a view of the images."""

    def make() -> dict[str, Any]:
        images = random_pixels((n, c, grid[0] * patch[0], grid[1] * patch[1]), dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        num_patches = grid[0] * grid[1]
        donors = random_donors(n, num_patches, fill)
        return {"images": change(images), "mask": random_mask(n, num_patches, rate), "donors": donors, "grid": grid}

    return make


def _off_by(elements: int) -> Callable[[Tensor], Tensor]:
    """The same images behind ``elements`` others: no row starts where wide accesses may."""

    def change(images: Tensor) -> Tensor:
        storage = torch.zeros(images.numel() + elements, dtype=images.dtype)
        return storage[elements:].view(images.shape).copy_(images)

    return change


def _widened(images: Tensor) -> Tensor:
    """The same images as a window of wider ones, off the start of the storage by one column."""
    wide = torch.cat([images[..., :1], images, images[..., :2]], dim=3)
    return wide[..., 1:-2]


# Patches of so many bytes, so many beside each other: each access width from 1 to 16 bytes, of one patch and, where the
# patch is no multiple of it, of up to sixteen.
ACCESS_CASES: dict[str, Case] = {
    f"{size}_bytes_by_{cols}": refill_case(3, 2, (2, cols), (2, size), torch.uint8, "multi")
    for size, cols in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (3, 2), (3, 4), (3, 8), (14, 8), (1, 16))
}
REFILL_CASES: dict[str, Case] = {
    **ACCESS_CASES,
    **{
        f"{fill}-{str(dtype)[6:]}-{'nhwc' if last else 'nchw'}": refill_case(dtype=dtype, fill=fill, channels_last=last)
        for fill in ("single", "multi")
        for dtype in PIXELS
        for last in (False, True)
    },
    "p32": refill_case(2, 3, (2, 2), (32, 32)),
    # A row of patches is more than a block of threads copies, and no multiple of it.
    "groups_of_lines": refill_case(2, 3, (2, 8), (32, 32), fill="multi"),
    "p16_bfloat16": refill_case(2, 3, (3, 3), (16, 16), torch.bfloat16),
    "p14_uint8": refill_case(3, 3, (2, 3), (14, 14), torch.uint8),
    "p14_uint8_nhwc": refill_case(3, 3, (2, 3), (14, 14), torch.uint8, channels_last=True),
    "p16_float16_nhwc": refill_case(3, 3, (2, 3), (16, 16), torch.float16, channels_last=True),
    # Units of a wide access that straddle patches, and a last tile that is not full.
    **{
        f"tiles_p{patch}_{str(dtype)[6:]}": refill_case(3, 3, (7, 8), (patch, patch), dtype, "multi")
        for patch in (14, 16)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
    },
    "oblong": refill_case(grid=(2, 7), patch=(3, 5), fill="multi"),
    "one_patch": refill_case(grid=(1, 1), patch=(4, 4)),
    "one_pixel_patches": refill_case(2, 1, (5, 7), (1, 1), torch.uint8, "multi"),
    "one_channel": refill_case(c=1),
    "one_channel_nhwc": refill_case(c=1, channels_last=True),
    "five_channels_nhwc": refill_case(c=5, channels_last=True, dtype=torch.uint8),
    "one_image": refill_case(n=1),
    # The stride of a dimension of one says nothing, and may be anything.
    "one_column_nhwc": refill_case(
        grid=(2, 1), patch=(3, 1), channels_last=True, change=lambda x: x.as_strided(x.shape, (18, 1, 3, 7))
    ),
    "mask_none": refill_case(rate=0.0),
    "mask_all": refill_case(rate=1.0),
    "mask_all_multi": refill_case(rate=1.0, fill="multi"),
    "self": refill_case(fill="self", rate=1.0),
    "repeated": refill_case(fill="repeated"),
    "window": refill_case(change=_widened),
    "window_uint8": refill_case(dtype=torch.uint8, change=_widened),
    **{f"off_by_{i}": refill_case(2, 3, (2, 2), (16, 16), torch.uint8, change=_off_by(i)) for i in (1, 2, 3, 8)},
    "off_by_1_bfloat16": refill_case(2, 3, (2, 2), (16, 16), torch.bfloat16, change=_off_by(1)),
    "sliced_batch": refill_case(change=lambda x: torch.cat([x, x])[::2][:5]),
    "transposed": refill_case(change=lambda x: x.transpose(2, 3)),
    "expanded": refill_case(change=lambda x: x[:1].expand(5, -1, -1, -1)),
    "grey_expanded": refill_case(change=lambda x: x[:, :1].expand(-1, 3, -1, -1)),
    "L_4096": refill_case(2, 1, (64, 64), (2, 2), torch.uint8, "multi"),
}


def true_refill(images: Tensor, mask: Tensor, donors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch by patch, in a loop."""
    out = images.clone()
    h, w = images.shape[2] // grid[0], images.shape[3] // grid[1]
    for n, p in mask.nonzero().tolist():
        donor = donors[n] if donors.ndim == 1 else donors[n, p]
        y, x = p // grid[1] * h, p % grid[1] * w
        out[n, :, y : y + h, x : x + w] = images[donor, :, y : y + h, x : x + w]
    return out


def patchify_case(
    n: int = 3,
    grid: tuple[int, int] = (2, 3),
    patch: int = 4,
    source: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    c: int = 3,
    fill: str | None = None,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> Case:
    """Arguments of ``patchify``, without refill unless ``fill`` says which donors."""

    def make() -> dict[str, Any]:
        h, w, num_patches = grid[0] * patch, grid[1] * patch, grid[0] * grid[1]
        bytes_ = torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8, generator=generator(7))
        floats = torch.rand(n, c, h, w, generator=generator(8), dtype=torch.float64)
        arguments: dict[str, Any] = {
            "images": change(bytes_ if source == torch.uint8 else floats.to(source)),
            "patch_size": patch,
            "mean": tuple(0.48145466 - 0.02 * i for i in range(c)),
            "std": tuple(0.26862954 + 0.01 * i for i in range(c)),
            "dtype": dtype,
        }
        if fill is not None:
            arguments |= {"mask": random_mask(n, num_patches), "donors": random_donors(n, num_patches, fill)}
        return arguments

    return make


PATCHIFY_CASES: dict[str, Case] = {
    **{
        f"{str(source)[6:]}-to-{str(dtype)[6:]}": patchify_case(source=source, dtype=dtype)
        for source in PIXELS
        for dtype in FLOATS
    },
    # Rows of 27 values: no wide access but across patches, and none at all in images of three patches.
    **{
        f"{str(source)[6:]}-to-{str(dtype)[6:]}-of_27_in_{grid[0] * grid[1]}": patchify_case(
            2, grid, 3, source, dtype, fill="multi"
        )
        for source in PIXELS
        for dtype in FLOATS
        for grid in ((1, 3), (4, 4))
    },
    **{f"p{patch}": patchify_case(patch=patch) for patch in (1, 3, 7, 8, 14, 16, 32)},
    "groups_of_patches": patchify_case(1, (8, 16), 5, fill="self"),  # more than one block, and no whole accesses each
    "p14_bfloat16": patchify_case(2, (4, 6), 14, dtype=torch.bfloat16, fill="multi"),
    "every_byte": patchify_case(2, (8, 8), 4, dtype=torch.float16),
    "single": patchify_case(5, (3, 3), fill="single"),
    "multi": patchify_case(5, (3, 3), fill="multi"),
    "single_float": patchify_case(5, (3, 3), 8, torch.float32, fill="single"),
    "multi_bfloat16": patchify_case(5, (3, 3), 16, torch.uint8, torch.bfloat16, fill="multi"),
    "repeated": patchify_case(4, fill="repeated"),
    "one_channel": patchify_case(c=1),
    "four_channels": patchify_case(c=4, fill="multi"),
    "one_image": patchify_case(n=1, fill="single"),
    "window": patchify_case(change=lambda x: torch.cat([x, x], dim=2)[:, :, 5:17], fill="single"),
    "from_nchw": patchify_case(change=lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)),
    "channels_last_float": patchify_case(
        source=torch.float32, change=lambda x: x.contiguous(memory_format=torch.channels_last)
    ),
    "expanded": patchify_case(change=lambda x: x[:1].expand(3, -1, -1, -1)),
}


def true_patchify(
    images: Tensor,
    patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    mask: Tensor | None = None,
    donors: Tensor | None = None,
) -> Tensor:
    """Refill, then NumPy arithmetic on whole channels, then patch after patch."""
    kind = np.float64 if images.dtype == torch.float64 else np.float32
    planes = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    p, (n, c, h, w) = patch_size, planes.shape
    if mask is not None and donors is not None:
        planes = true_refill(planes, mask, donors, (h // p, w // p))
    pixels = planes.double().numpy().astype(kind)
    if images.dtype == torch.uint8:
        pixels = pixels / kind(255)
    shape = (1, c, 1, 1)
    normal = (pixels - np.array(mean, kind).reshape(shape)) / np.array(std, kind).reshape(shape)
    rows = [
        normal[i, :, y : y + p, x : x + p].reshape(-1) for i in range(n) for y in range(0, h, p) for x in range(0, w, p)
    ]
    return torch.from_numpy(np.stack(rows)).view(n, -1, c * p * p).to(dtype)


# --- Tokens ---------------------------------------------------------------------------------------------------


def gather_case(
    n: int = 5,
    num_patches: int = 9,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    fill: str = "single",
    rate: float = 0.5,
    prefix: int = 1,
    change: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Case:
    """Arguments of ``gather_tokens``."""

    def make() -> dict[str, Any]:
        tokens = torch.randn(n, prefix + num_patches, dim, generator=generator(5)).to(dtype)
        donors = random_donors(n, num_patches, fill)
        mask = random_mask(n, num_patches, rate)
        return {"tokens": change(tokens), "mask": mask, "donors": donors, "prefix": prefix}

    return make


GATHER_CASES: dict[str, Case] = {
    **{
        f"{fill}-{str(dtype)[6:]}": gather_case(dtype=dtype, fill=fill)
        for fill in ("single", "multi", "repeated", "self")
        for dtype in FLOATS
    },
    **{
        f"prefix_{prefix}-{fill}": gather_case(prefix=prefix, fill=fill, dtype=dtype)
        for prefix, dtype in ((0, torch.float32), (5, torch.bfloat16))
        for fill in ("single", "multi", "repeated")
    },
    "prefix_0-one_patch": gather_case(num_patches=1, prefix=0),
    "mask_none": gather_case(rate=0.0),
    "mask_all": gather_case(rate=1.0),
    "mask_all_repeated": gather_case(rate=1.0, fill="repeated"),
    "mask_all_multi": gather_case(rate=1.0, fill="multi"),
    "one_image": gather_case(n=1),
    "one_patch": gather_case(num_patches=1, fill="multi"),
    "width_1": gather_case(dim=1, dtype=torch.bfloat16),
    "width_37": gather_case(dim=37, fill="multi", dtype=torch.float16),
    "width_768": gather_case(4, 49, 768),
    "many_images": gather_case(67, 5, 16, fill="multi"),
    "transposed": gather_case(change=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "strided": gather_case(change=lambda x: torch.cat([x, x], dim=2)[:, :, ::2]),
    "expanded": gather_case(change=lambda x: x[:1].expand(5, -1, -1)),
}


def true_gather(tokens: Tensor, mask: Tensor, donors: Tensor, prefix: int) -> Tensor:
    """Token by token."""
    out = tokens.clone()
    for n, p in mask.nonzero().tolist():
        out[n, prefix + p] = tokens[donors[n] if donors.ndim == 1 else donors[n, p], prefix + p]
    return out


def true_gather_grad(grad_out: Tensor, mask: Tensor, donors: Tensor, prefix: int) -> Tensor:
    """Gradient for ``tokens``, summed in float64: what a masked token passes on goes to its donor."""
    grad = grad_out.to(torch.float64, copy=True)
    for n, p in mask.nonzero().tolist():
        grad[n, prefix + p] = 0
    for n, p in mask.nonzero().tolist():
        grad[donors[n] if donors.ndim == 1 else donors[n, p], prefix + p] += grad_out[n, prefix + p].double()
    return grad


# --- Attention ------------------------------------------------------------------------------------------------


def relevance_case(
    n: int = 2,
    h: int = 3,
    t: int = 17,
    d: int = 16,
    tq: int | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    start: bool = False,
    scale: float | None = None,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    """Arguments of ``attention_relevance``; ``spread`` widens the logits, ``start`` leaves the first row out."""

    def make() -> dict[str, Any]:
        g = generator(9)
        q = torch.randn(n, h, tq or t, d, generator=g) * spread
        k, v = (torch.randn(n, h, t, d, generator=g) for _ in range(2))
        grad_out = torch.randn(n, h, tq or t, d, generator=g)
        row = torch.rand(n, t, generator=g)
        out: dict[str, Any] = {
            name: change(x.to(dtype)) for name, x in {"q": q, "k": k, "v": v, "grad_out": grad_out}.items()
        }
        return out | {"relevance": None if start else row, "scale": scale}

    return make


def _as_in_a_projection(x: Tensor) -> Tensor:
    """The layout of a packed projection: heads beside each other in the rows of a token, three times as wide."""
    n, h, t, d = x.shape
    packed = torch.zeros(n, t, 3, h, d, dtype=x.dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


RELEVANCE_CASES: dict[str, Case] = {
    **{f"{str(dtype)[6:]}": relevance_case(dtype=dtype) for dtype in FLOATS},
    **{f"one_query-{str(dtype)[6:]}": relevance_case(tq=1, dtype=dtype) for dtype in FLOATS},
    **{f"t{t}": relevance_case(1, 2, t, 32) for t in (1, 2, 31, 32, 33, 50, 65, 129, 197)},
    **{f"d{d}": relevance_case(1, 2, 21, d) for d in (1, 3, 8, 20, 64, 72, 80, 96, 128)},
    **{f"one_query-d{d}": relevance_case(1, 2, 21, d, tq=1) for d in (1, 3, 20, 64, 128)},
    "start": relevance_case(start=True),
    "one_query-start": relevance_case(start=True, tq=1),
    "peaked": relevance_case(spread=30.0),
    "peaked-bfloat16": relevance_case(spread=30.0, dtype=torch.bfloat16),
    "overflowing": relevance_case(spread=1e4),
    "scale": relevance_case(scale=0.3),
    "negative_scale": relevance_case(scale=-0.2),
    "zero_scale": relevance_case(scale=0.0),
    "one_head": relevance_case(h=1),
    "many_heads": relevance_case(1, 16, 10, 8),
    "packed": relevance_case(change=_as_in_a_projection),
    "packed-bfloat16": relevance_case(change=_as_in_a_projection, dtype=torch.bfloat16),
    "strided": relevance_case(change=lambda x: torch.cat([x, x], dim=3)[..., ::2]),
    "expanded": relevance_case(change=lambda x: x[:, :1].expand(-1, 3, -1, -1)),
}
# Too slow under an interpreter.
LARGE_RELEVANCE_CASES: dict[str, Case] = {
    "L14": relevance_case(2, 16, 257, 64),
    "L14-bfloat16": relevance_case(2, 16, 257, 64, dtype=torch.bfloat16),
    "t4097": relevance_case(1, 1, 4097, 32),
    "one_query-t4097": relevance_case(1, 2, 4097, 64, tq=1),
}


def true_relevance(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, relevance: Tensor | None, scale: float | None
) -> Tensor:
    """The row update in float64, image by image and head by head in NumPy."""
    out = []
    for n in range(q.shape[0]):
        row = np.eye(k.shape[2])[0] if relevance is None else relevance[n].double().numpy()
        total = row.copy()
        for h in range(q.shape[1]):
            qn, kn, vn, gn = (x[n, h].double().numpy() for x in (q, k, v, grad_out))
            logits = qn @ kn.T * (q.shape[3] ** -0.5 if scale is None else scale)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            total += row[: len(qn)] @ np.maximum(weights * (gn @ vn.T), 0) / q.shape[1]
        out.append(total)
    return torch.from_numpy(np.stack(out))
