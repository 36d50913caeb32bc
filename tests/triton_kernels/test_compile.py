"""Every launch of realistic size compiles for every target: no spills, and copies 16 bytes wide."""

import importlib

import pytest

pytest.importorskip("triton")
compile_report = importlib.import_module("benchmarks.compile_report")


@pytest.mark.parametrize("target", list(compile_report.TARGETS))
@pytest.mark.parametrize(
    "op", ["select", "refill p", "refill multi", "refill fused", "patchify", "gather", "relevance"]
)
def test_no_spills_and_wide_accesses(op, target):
    rows = list(compile_report.report([target], op))
    assert rows
    spilled = [row for row in rows if row[3].spills]
    assert not spilled, spilled
    for name, kernel, _, found in rows:
        if kernel in ("maskcf_refill", "maskcf_gather"):
            # 14 bytes are no place for a 16-byte unit: it could straddle three patches.
            wanted = 8 if "p14" in name and "uint8 nchw" in name else 16
            assert found.store == wanted, (name, found)
            if "fused" not in name:  # there the map, too, is read 16 bytes at a time
                assert found.load == wanted, (name, found)
        if kernel == "maskcf_gather_backward" and target != "gfx942":
            assert found.load == found.store == 16, (name, found)
        if kernel == "maskcf_relevance" and target != "gfx942":
            assert found.load == 16, (name, found)
