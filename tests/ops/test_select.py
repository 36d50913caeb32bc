import pytest
import torch

import maskcf_fast as mf


def naive_mask(cam, threshold, top_k, region):
    """METHOD in a loop over Python floats, without any of the package's code."""
    rows = []
    for row in cam.tolist():
        if threshold is not None:
            top = max(row)
            scores = (torch.tensor(row) / (torch.tensor(top) + 1e-8)).tolist()
            picked = [s > threshold for s in scores]
            rows.append(picked if region == "object" else [not p for p in picked])
        else:
            sign = -1 if region == "object" else 1
            order = sorted(range(len(row)), key=lambda i: (sign * row[i], i))
            rows.append([i in order[:top_k] for i in range(len(row))])
    return torch.tensor(rows)


@pytest.mark.parametrize("region", ["object", "context"])
@pytest.mark.parametrize("cut", [{"threshold": 0.3}, {"threshold": 0.0}, {"top_k": 0}, {"top_k": 5}, {"top_k": 49}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_definition(region, cut, dtype):
    cam = torch.rand(6, 49, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = naive_mask(cam.float(), cut.get("threshold"), cut.get("top_k"), region)
    assert torch.equal(mf.select_patches(cam, **cut, region=region), expected)


def test_threshold_is_strict():
    cam = torch.tensor([[1.0, 0.5, 0.25]])  # scores 1, 0.5, 0.25: 1 + 1e-8 is 1 in float32
    assert mf.select_patches(cam, threshold=0.5).tolist() == [[True, False, False]]
    assert mf.select_patches(cam, threshold=0.5, region="context").tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_index(dtype):
    cam = torch.ones(3, 4096, dtype=dtype)
    for region in ("object", "context"):
        mask = mf.select_patches(cam, top_k=1000, region=region)
        assert mask[:, :1000].all()
        assert not mask[:, 1000:].any()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_a_row_that_says_nothing(value):
    """Zeros, and rows with a non-finite entry, select nothing (object) or everything (context)."""
    cam = torch.rand(3, 16)
    cam[1] = 0
    cam[1, 7] = value
    clean = mf.select_patches(cam[[0, 2]], threshold=0.3)
    mask = mf.select_patches(cam, threshold=0.3)
    assert not mask[1].any()
    assert torch.equal(mask[[0, 2]], clean)
    assert mf.select_patches(cam, threshold=0.3, region="context")[1].all()
    assert mf.select_patches(cam, top_k=3)[1].tolist() == [True] * 3 + [False] * 13


def test_nan_is_an_error_in_debug_mode(monkeypatch):
    cam = torch.rand(3, 16)
    cam[2, 5] = float("nan")
    monkeypatch.setenv("MASKCF_DEBUG", "1")
    with pytest.raises(ValueError, match=r"cam holds NaN or infinity in row 2 \(1 of 3 rows\)"):
        mf.select_patches(cam, threshold=0.3)
