"""What the cases of test_implementations.py do not say: an example by hand, and checks of values."""

import pytest
import torch

import maskcf_fast as mf


def test_threshold_is_strict():
    cam = torch.tensor([[1.0, 0.5, 0.25]])  # scores 1, 0.5, 0.25: 1 + 1e-8 is 1 in float32
    assert mf.select_patches(cam, threshold=0.5).tolist() == [[True, False, False]]
    assert mf.select_patches(cam, threshold=0.5, region="context").tolist() == [[False, True, True]]


def test_nan_is_an_error_in_debug_mode(monkeypatch):
    cam = torch.rand(3, 16)
    cam[2, 5] = float("nan")
    monkeypatch.setenv("MASKCF_DEBUG", "1")
    with pytest.raises(ValueError, match=r"cam holds NaN or infinity in row 2 \(1 of 3 rows\)"):
        mf.select_patches(cam, threshold=0.3)
