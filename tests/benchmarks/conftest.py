"""Benchmarks at a tiny size: their figures are counted here another way."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True, scope="session")
def _quick():
    """Short samples, few rounds, small products."""
    from benchmarks import breakdown, measure, ops, roofline, step

    with pytest.MonkeyPatch.context() as patch:
        for module in (breakdown, ops, roofline, step):
            patch.setattr(module, "ROUNDS", (3, 4))
        patch.setitem(measure.SAMPLE_SECONDS, "cpu", 1e-4)
        patch.setitem(step.MATRIX, "cpu", 128)
        yield
