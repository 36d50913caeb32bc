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


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_every_kernel(order, library, tmp_path):
    """In any order of threads and blocks; and no kernel is left out."""
    log = tmp_path / "log"
    done = ops_tests.run(
        sys.executable, library, emulated.SELECT, "tests/ops/test_generated.py",
        MASKCF_EMULATOR_ORDER=order, MASKCF_EMULATOR_LOG=str(log),
    )  # fmt: skip
    ops_tests.assert_passed(done, 400)
    ran = {int(address, 16) for address in log.read_text().split()}
    kernels = emulated.kernels(library)
    assert len(kernels) > 80
    assert not [name for address, name in kernels.items() if address not in ran]
