"""The CUDA kernels and their launches, run on a CPU by emulator.h, in the tests of the ops.

They compile for half a minute, so they run when asked: ``MASKCF_TEST_BUILD=1``. ``mutate.py`` shows that what they
would miss is little.
"""

from __future__ import annotations

import os
import sys

import emulated
import ops_tests
import pytest

pytestmark = pytest.mark.skipif(not os.environ.get("MASKCF_TEST_BUILD"), reason="MASKCF_TEST_BUILD is not set")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def kernels_run(library, log, select, *more, at_least=1, **environment):
    """What those tests launched, which all pass."""
    done = ops_tests.run(sys.executable, library, select, *more, MASKCF_EMULATOR_LOG=str(log), **environment)
    ops_tests.assert_passed(done, at_least)
    kernels = emulated.kernels(library)
    return {kernels[int(address, 16)] for address in log.read_text().split()}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_every_kernel(order, library, tmp_path):
    """In any order of threads and blocks; and no kernel is left out."""
    ran = kernels_run(
        library, tmp_path / "log", emulated.SELECT, "tests/ops/test_generated.py", at_least=400,
        MASKCF_EMULATOR_ORDER=order,
    )  # fmt: skip
    assert len(ran) > 90
    assert set(emulated.kernels(library).values()) == ran


def test_patches_of_14_pixels_move_16_bytes_at_a_time(library, tmp_path):
    select = "cuda and eager and (test_refill and tiles_p14 or test_patchify and p14_bfloat16)"
    ran = kernels_run(library, tmp_path / "log", select, at_least=4)
    assert ran == {"refill_kernel<uint4, true, GivenMask>", "patchify_kernel<BFloat16, unsigned char, 8>"}
