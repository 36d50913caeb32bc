"""Every launch of realistic size compiles for every target: no spills, and copies 16 bytes wide."""

import importlib

import pytest

from maskcf_fast.ops import tuning

pytest.importorskip("triton")
compile_report, tune = (importlib.import_module(f"benchmarks.{name}") for name in ("compile_report", "tune"))
# A call for each kernel that `benchmarks.ops --sweep` times, and the kernel that the tiles are for.
SWEPT = {
    "select": "select threshold p16@224",
    "refill": "refill fused threshold p14@224 float32 nchw",
    "patchify": "patchify p16@224 bfloat16",
    "gather": "gather single 768 bfloat16",
    "gather backward": "gather backward single 768 bfloat16",
    "bias_gelu": "bias_gelu backward quick_gelu 3072 bfloat16",
    "residual_norm": "residual_norm 768 bfloat16",
    "residual_norm backward": "residual_norm backward 768 bfloat16",
    "relevance of one query": "relevance d64 bfloat16 one query",
    "relevance": "relevance d64 {}",
}


CALLS = (  # what the names of some calls begin with, for tests of about one length
    "select", "refill p", "refill multi", "refill fused", "patchify", "gather", "bias_gelu", "residual_norm",
    "relevance",
)  # fmt: skip


@pytest.mark.parametrize("target", list(compile_report.TARGETS))
@pytest.mark.parametrize("op", CALLS)
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
        if kernel.startswith(("maskcf_bias_gelu", "maskcf_residual_norm")) and target != "gfx942":
            assert found.load == found.store == 16, (name, found)
        if kernel == "maskcf_relevance" and target != "gfx942":
            assert found.load == 16, (name, found)


@pytest.mark.parametrize(
    ("kernel", "what", "tiles"),
    [(kernel, what, tiles) for kernel, what, _, tried in tune.KERNELS for tiles in tried[1:]],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_what_a_sweep_tries_reaches_the_kernel_and_compiles_without_spills(kernel, what, tiles, monkeypatch):
    monkeypatch.setattr(tuning, "tiles", tune.instead_of(kernel, tiles))
    call = compile_report.calls()[SWEPT[kernel].format("bfloat16" if what.get("half") else "float32")]
    with compile_report.recorded() as launches:
        call()
    bounds = {"select": {}, "gather backward": {"BLOCK": min(tiles.get("BLOCK", 0), 1024)}}  # of a token, of a row
    if kernel == "refill":  # of 14 pixels: units straddle two patches
        bounds["refill"] = tiles | {"UNITS": tiles["UNITS"] // 2}
    assert all(launch.options.items() >= bounds.get(kernel, tiles).items() for launch in launches)
    for launch in launches:
        found = compile_report.facts(launch.compile(target := compile_report.TARGETS["sm_90"]), target)
        assert found.spills == 0, found
