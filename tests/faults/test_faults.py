"""A few of the faults of `breaking`, one of each kind that needs one process."""

import random

import breaking
import pytest


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return breaking.Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("fault", "trial"),
    [
        (breaking.killed_at_a_point, 5),
        (breaking.asked_to_end, 0),
        (breaking.disk_full, 0),
        (breaking.bit_flipped, 0),
        (breaking.model_flipped, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_same_run_in_the_end(bench, fault, trial):
    fault(bench, random.Random(0), trial)
