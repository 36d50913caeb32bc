"""Every implementation of every op under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

For watching one op while working on it (``-k refill --benchmark-compare``); the table is `benchmarks.ops`.
"""

from __future__ import annotations

from typing import Any

import pytest

from maskcf_fast.ops.dispatch import IMPLEMENTATIONS

from .cases import CASES, make_case
from .measure import resolve_device, synchronize
from .ops import candidates, check


@pytest.mark.parametrize("variant", [*IMPLEMENTATIONS, "paper", "eager"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_op(benchmark: Any, request: pytest.FixtureRequest, op: str, case: str, variant: str) -> None:
    device = resolve_device(request.config.getoption("--device"))
    size, n = request.config.getoption("--model"), request.config.getoption("--batch")
    made = make_case(op, case, size, n, device)
    function = candidates(made, device, compiled=False).get(variant, "the paper has no formula of its own for it")
    if isinstance(function, str):
        pytest.skip(function)
    expected = made.expected()
    assert check(made, variant, function, expected) == "ok"
    benchmark.group = f"{op}: {case}, {size}, N={n}, {device}"
    benchmark.extra_info["moved_bytes"] = made.moved(expected)

    def run() -> None:
        made.call(function)
        synchronize(device)

    benchmark(run)
