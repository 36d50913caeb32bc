"""gather_tokens, drop_tokens, patchify and sample_donors."""

import pytest
import torch
import torch.nn.functional as F

import maskcf_fast as mf

PREFIXES = [0, 1, 5]


def make(n=4, num_patches=9, dim=5, fill="single", dtype=torch.float64, prefix=1):
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(n, prefix + num_patches, dim, generator=g, dtype=dtype)
    mask = torch.rand(n, num_patches, generator=g) < 0.5
    return tokens, mask, mf.sample_donors(n, num_patches if fill == "multi" else None, generator=g)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_drop_keeps_the_order_and_pads(prefix):
    tokens, mask, _ = make(prefix=prefix)
    packed, visible = mf.drop_tokens(tokens, mask, prefix=prefix)
    kept = [torch.cat([tokens[n, :prefix], tokens[n, prefix:][~mask[n]]]) for n in range(4)]
    assert packed.shape[1] == max(map(len, kept))
    for n in range(4):
        assert torch.equal(packed[n, : len(kept[n])], kept[n])
        assert visible[n].tolist() == [True] * len(kept[n]) + [False] * (packed.shape[1] - len(kept[n]))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_drop_of_equal_counts_needs_no_key_mask(prefix):
    tokens, _, _ = make(prefix=prefix)
    mask = mf.select_patches(torch.rand(4, 9), top_k=6)
    packed, visible = mf.drop_tokens(tokens, mask, dropped=6, prefix=prefix)
    assert visible is None
    assert torch.equal(packed[:, :prefix], tokens[:, :prefix])
    assert torch.equal(packed[:, prefix:], tokens[:, prefix:][~mask].view(4, 3, -1))
    assert mf.drop_tokens(tokens, torch.ones_like(mask), prefix=prefix)[0].shape == (4, prefix, 5)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_packed_tokens_are_the_kept_ones_in_order(prefix):
    tokens, mask, _ = make(prefix=prefix)
    mask[1], mask[2], mask[3] = True, False, prefix == 0  # with no prefix, nothing is left of two images
    rows, packing = mf.pack_tokens(tokens, mask, prefix=prefix)
    kept = [torch.cat([tokens[n, :prefix], tokens[n, prefix:][~mask[n]]]) for n in range(4)]
    assert len({len(k) for k in kept}) > 2
    assert torch.equal(rows, torch.cat(kept))
    padded = packing.pad(rows)
    assert packing.visible.sum(dim=1).tolist() == list(map(len, kept))
    for n in range(4):
        assert torch.equal(padded[n, : len(kept[n])], kept[n])
        assert len(kept[n]) == 0 or (padded[n, len(kept[n]) :] == kept[n][0]).all()
    assert torch.equal(packing.pack(padded), rows)
    whole = mf.pack_tokens(tokens, torch.zeros_like(mask), prefix=prefix)[0]
    assert torch.equal(whole, tokens.flatten(0, 1))
    nothing, packing = mf.pack_tokens(tokens, torch.ones_like(mask), prefix=prefix)
    assert torch.equal(nothing, tokens[:, :prefix].flatten(0, 1))
    assert torch.equal(packing.pad(nothing), tokens[:, :prefix])


@pytest.mark.parametrize("patch", [4, 8, 14])
def test_patchify_and_a_matrix_product_are_the_convolution(patch):
    images = torch.randint(0, 256, (3, 2 * patch, 3 * patch, 3), dtype=torch.uint8)
    weight = torch.randn(7, 3, patch, patch)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    rows = mf.patchify(images, patch, mean=mean, std=std)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = F.conv2d(normal.double(), weight.double(), stride=patch).flatten(2).mT
    torch.testing.assert_close(rows.double() @ weight.double().flatten(1).T, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(rows, mf.patchify(pixels, patch, mean=mean, std=std))


def test_single_fill_draws_a_permutation():
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([mf.sample_donors(6, generator=g) for _ in range(300)])
    assert torch.equal(draws.sort(dim=1).values, torch.arange(6).expand(300, 6))
    assert (draws == torch.arange(6)).any()  # an image may draw itself
    assert mf.sample_donors(1).tolist() == [0]
    assert {tuple(row) for row in draws.tolist()}.__len__() > 200


def test_multi_fill_draws_uniformly_from_the_others():
    g = torch.Generator().manual_seed(0)
    donors = mf.sample_donors(4, 30_000, generator=g)
    for n in range(4):
        counts = donors[n].bincount(minlength=4)
        assert counts[n] == 0
        others = counts[torch.arange(4) != n]
        assert ((others - 10_000).abs() < 400).all()  # 5 standard deviations
