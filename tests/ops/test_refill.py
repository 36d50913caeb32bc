import itertools

import pytest
import torch

import maskcf_fast as mf

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]


def naive_refill(images, mask, donors, grid):
    """Patch by patch, in a loop."""
    out = images.clone()
    rows, cols = grid
    h, w = images.shape[2] // rows, images.shape[3] // cols
    for n, r, c in itertools.product(range(len(images)), range(rows), range(cols)):
        p = r * cols + c
        if mask[n, p]:
            donor = donors[n] if donors.ndim == 1 else donors[n, p]
            at = slice(r * h, r * h + h), slice(c * w, c * w + w)
            out[n, :, at[0], at[1]] = images[donor, :, at[0], at[1]]
    return out


def make(n=5, c=3, grid=(4, 4), patch=(6, 6), dtype=torch.float32, fill="single", seed=0):
    g = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, c, grid[0] * patch[0], grid[1] * patch[1], generator=g) * 255).to(dtype)
    mask = torch.rand(n, grid[0] * grid[1], generator=g) < 0.5
    donors = mf.sample_donors(n, grid[0] * grid[1] if fill == "multi" else None, generator=g)
    return images, mask, donors


@pytest.mark.parametrize("fill", ["single", "multi"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("grid", "patch"), [((4, 4), (6, 6)), ((2, 7), (3, 5)), ((1, 1), (4, 4))])
def test_copies_are_exact(fill, dtype, layout, grid, patch):
    images, mask, donors = make(grid=grid, patch=patch, dtype=dtype, fill=fill)
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    out = mf.refill_patches(images, mask, donors, grid=grid)
    assert torch.equal(out, naive_refill(images, mask, donors, grid))
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    assert out.data_ptr() != images.data_ptr()


def test_mask_all_and_none():
    images, _, donors = make()
    everything = torch.ones(5, 16, dtype=torch.bool)
    assert torch.equal(mf.refill_patches(images, everything, donors), images[donors])
    assert torch.equal(mf.refill_patches(images, ~everything, donors), images)


def test_views_and_nan_payloads():
    """Non-contiguous input, and values that arithmetic would not preserve."""
    images, mask, donors = make()
    images[0, 0] = float("nan")
    images[1, 0] = -0.0
    view = torch.cat([images, images], dim=3)[:, :, :, :24]
    out = mf.refill_patches(view, mask, donors)
    expected = naive_refill(images, mask, donors, (4, 4))
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("cut", [{"threshold": 0.4}, {"top_k": 7}])
@pytest.mark.parametrize("region", ["object", "context"])
def test_counterfactual_refill_is_select_then_refill(cut, region):
    images, _, donors = make()
    cam = torch.rand(5, 16)
    out, mask = mf.counterfactual_refill(images, cam, donors, **cut, region=region)
    assert torch.equal(mask, mf.select_patches(cam, **cut, region=region))
    assert torch.equal(out, naive_refill(images, mask, donors, (4, 4)))


IMAGES, MASK, DONORS = make()


@pytest.mark.parametrize(
    ("images", "mask", "donors", "grid", "error", "message"),
    [
        (IMAGES, MASK, torch.tensor([0, 1, 2, 3, 5]), None, ValueError, "0 to 4, got 5"),
        (IMAGES, MASK, torch.tensor([0, 1, 2, 3, -1]), None, ValueError, "0 to 4, got -1"),
        (IMAGES, MASK, DONORS.int(), None, TypeError, "donors must have dtype int64, got int32"),
        (IMAGES, MASK, DONORS[:3], None, ValueError, r"donors must have shape \[5\], got \[3\]"),
        (IMAGES, MASK, torch.zeros(5, 9, dtype=torch.int64), None, ValueError, r"\[5, 16\], got \[5, 9\]"),
        (IMAGES, MASK.float(), DONORS, None, TypeError, "mask must have dtype bool"),
        (IMAGES, MASK[:, :15], DONORS, None, ValueError, "L=15 patches are no square grid"),
        (IMAGES, MASK, DONORS, (3, 4), ValueError, r"grid=\(3, 4\) does not hold L=16"),
        (IMAGES, torch.ones(5, 25, dtype=torch.bool), DONORS, None, ValueError, "24×24 pixels do not divide"),
        (IMAGES[0], MASK, DONORS, None, ValueError, "images must have shape"),
        (IMAGES[:0], MASK[:0], DONORS[:0], None, ValueError, "images must not be empty"),
        (IMAGES.int(), MASK, DONORS, None, TypeError, "got int32"),
    ],
)
def test_bad_arguments(images, mask, donors, grid, error, message):
    with pytest.raises(error, match=message):
        mf.refill_patches(images, mask, donors, grid=grid)
