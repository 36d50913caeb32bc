"""A few of the faults of `breaking`, one of each kind that needs one process."""

import random

import breaking
import pytest


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return breaking.Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "fault",
    [breaking.killed_at_a_point, breaking.asked_to_end, breaking.bit_flipped, breaking.disk_full, breaking.two_at_once],
    ids=lambda fault: fault.__name__,
)
def test_the_same_run_in_the_end(bench, fault):
    fault(bench, random.Random(0))
