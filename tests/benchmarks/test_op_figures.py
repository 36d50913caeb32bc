"""The benchmark of the ops, at a tiny size."""

import json
from functools import partial

import pytest
import torch

from benchmarks import baselines, cases, measure, ops, tables, tune
from maskcf_fast.ops import tuning

CPU = torch.device("cpu")
TINY = {"sizes": ("tiny",), "batches": (4,), "compiled": False, "minutes": 1}
# Images of 32×32 pixels, 16 patches, 17 tokens of 4 heads, 96 wide.
BYTES = {
    ("counterfactual_refill", "threshold, float32"): 4 * (2 * 3 * 32 * 32 * 4 + 16 * 4 + 8 + 16),
    ("counterfactual_refill", "threshold, uint8"): 4 * (2 * 3 * 32 * 32 + 16 * 4 + 8 + 16),
    ("refill_patches", "multi-fill, float32"): 4 * (2 * 3 * 32 * 32 * 4 + 16 + 16 * 8),
    ("select_patches", "top-k"): 4 * 16 * (4 + 1),
    ("patchify", "from uint8"): 4 * 3 * 32 * 32 * (1 + 4),
    ("gather_tokens", "single-fill, forward and backward"): 4 * (4 * 17 * 96 * 4 + 16 + 8),
    ("attention_relevance", "one layer"): 4 * (4 * 17 * 96 * 4 + 2 * 17 * 4),
}


def measured(**settings):
    return ops.measure(CPU, **TINY | {"names": ("select_patches",)} | settings)


def test_every_case_has_a_row_whose_results_and_figures_are_right():
    results = measured(names=cases.OPS)
    rows, page = results["rows"], "\n".join(ops.sections(json.loads(json.dumps(results))))
    assert [(row["op"], row["case"]) for row in rows] == list(cases.CASES)
    for row in rows:
        variants = row["variants"]
        assert variants[row["auto"]]["check"] == variants["reference"]["check"] == variants["eager"]["check"] == "ok"
        assert ("paper" in variants) == ("refill" in row["op"])
        assert "tensors on cuda" in variants["cuda"]["unavailable"]
        assert row["moved_bytes"] == BYTES.get((row["op"], row["case"]), row["moved_bytes"])
        for found in variants.values():
            if "ms" in found:
                assert found["gb_s"] * found["ms"] * 1e6 == pytest.approx(row["moved_bytes"])
                assert found["peak_bytes"] is None or 0 <= found["peak_bytes"] < 20e6
        assert page.split(f"## `{row['op']}`: {row['case']}\n")[1].split("##")[0].count("\n| tiny") >= 3
    assert "- triton of select_patches, refill_patches, counterfactual_refill, patchify" in page


def test_what_is_wrong_is_failed_and_has_no_figures_and_what_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr(baselines, "select_threshold", lambda cam, threshold: cam >= threshold * 2)
    results = measured()
    wrong, right = (row["variants"] for row in results["rows"])
    assert wrong["eager"].keys() == {"check"}
    assert wrong["eager"]["check"].startswith("FAILED: Tensor-likes are not equal! Mismatched elements: ")
    assert "eager" not in wrong["reference"]["times_as_fast"]
    assert "eager" in right["reference"]["times_as_fast"]
    (line,) = (line for line in ops.sections(results) if "FAILED" in line)
    assert [cell.strip() for cell in line.split("|")[1:4]] == ["tiny", "4", "eager"]
    assert measured(minutes=1e-9)["rows"][0]["not_measured"] == "the time was over"
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    monkeypatch.setattr(ops, "MAPS_ON_CPU", 5 * 2 * 4 * 17 * 17 * 4)  # of two images
    (row,) = measured(names=("attention_relevance",))["rows"]
    assert (row["batch"], row["moved_bytes"]) == (2, BYTES["attention_relevance", "one layer"] // 2)
    assert "GB of memory" in row["variants"]["eager"]["unavailable"]
    with pytest.raises(ValueError, match="another image"):
        measured(batches=(1,))


@pytest.mark.parametrize(
    ("have", "allowed", "status"),
    [(1.0, 0.0, "ok"), (1 + 1e-6, 1e-5, "ok"), (1 + 1e-6, 0.0, "F"), (1 + 1e-4, 1e-5, "F"), (float("nan"), 1e-5, "F")],
)
def test_a_check_has_a_tolerance(have, allowed, status):
    case = cases.Case(partial(torch.clone), (torch.full((3,), have),), {}, (allowed,))
    assert ops.check(case, "cpu", torch.clone, (torch.ones(3),)).startswith(status)
    assert ops.check(case, "cpu", torch.Tensor.double, (torch.ones(3),)).startswith("FAILED: The values for attribute")


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({}, "met met met met"),
        ({"peak_bytes": 11, "copy_share": 0.89}, "missed met missed met"),
        ({"times_as_fast": {"paper": 4.9, "eager": 0.9}}, "met missed met missed"),
        ({"check": "FAILED: all"}, "missed missed missed missed"),
    ],
)
def test_targets(changes, states):
    good = {"ms": 1.0, "copy_share": 0.95, "times_as_fast": {"paper": 6.0, "eager": 2.0}, "peak_bytes": 10}

    def row(op, size, n, changes):
        variants = {"cuda": good | changes, "eager": {"peak_bytes": 100}}
        return {"op": op, "size": size, "batch": n, "dtype": "float32", "auto": "cuda", "variants": variants}

    two = ("counterfactual_refill", "attention_relevance")
    rows = [row(op, "ViT-L/14", 1024, changes) for op in two]
    rows += [row(op, "ViT-L/14@336", 1024, {}) for op in two]  # every size counts
    rows.append(row(two[0], "ViT-L/14", 64, {"copy_share": 0.1}))  # smaller batches do not, for the refill
    assert [t["state"] for t in ops.targets(rows, "cuda")] == states.split()
    assert {t["state"] for t in ops.targets([], "cuda")} == {"not measured"}
    assert tables.target("", [("a", 1.3), ("b", 1.1)], 1.2)["state"] == "missed"


@pytest.mark.skipif(measure.peak_memory(lambda: None, CPU) is None, reason="the system has no resettable mark")
def test_peak_memory_counts_what_was_freed_and_only_once():
    def call():
        first = torch.ones(16 << 20)  # 64 MB
        del first
        return torch.ones(12 << 20)

    # Pages of libraries that the system took back, and that come again during the call, count too: not every time.
    assert 63 << 20 < min(measure.peak_memory(call, CPU) for _ in range(4)) < 72 << 20


def test_rounds_take_turns_and_what_fails_keeps_its_times(monkeypatch):
    order, failed = [], {}
    calls = {name: partial(order.append, name) for name in "ab"}
    monkeypatch.setitem(measure.SAMPLE_SECONDS, "cpu", 0.0)
    samples = measure.interleaved(calls, CPU, seconds=0, rounds=(3, 9))
    assert "".join(order) == "ab" + 3 * "aabb"  # each is timed after a call of its own
    assert [len(times) for times in samples.values()] == [3, 3]

    def full():
        if len(order) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    samples = measure.interleaved(calls | {"c": full}, CPU, seconds=0, rounds=(3, 9), failed=failed)
    assert failed == {"c": "CUDA out of memory"}
    assert [len(times) for times in samples.values()] == [3, 3, 1]
    assert measure.ratio([2.0, 30.0, 6.0], [1.0, 3.0, 2.0, 5.0]) == 3.0  # of the ratios, not of the times
    assert measure.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"ms": 3000.0, "iqr_ms": 2000.0}


def test_command(tmp_path, capsys):
    ops.main(f"--device cpu --sizes tiny --batch 4 --ops select_patches --no-compile --out {tmp_path / 'x'}".split())
    assert len(json.loads((tmp_path / "x" / "ops.json").read_text())["rows"]) == 2
    assert capsys.readouterr().out == (tmp_path / "x" / "ops.md").read_text() + "\n"
    for wrong, message in (
        ("--batch 1", "another image"),
        ("--device cpu --choose", "GPU"),
        ("--device mps", "cpu or"),
    ):
        assert ops.main([*wrong.split(), "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def test_the_fastest_that_is_right_is_chosen(monkeypatch, tmp_path, capsys):
    """Orders and tiles by the clock, and none of what differs from the reference."""
    seconds = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(measure, "interleaved", lambda calls, *_, **__: {name: [next(seconds)] for name in calls})
    monkeypatch.setattr(tune, "CALLS", {("select", ()): (cases.select_threshold,)})
    tune.run(CPU, ("tiny",), 4, tmp_path / "a", False, True, anywhere=True)
    (row,) = (r for r in json.loads((tmp_path / "a").read_text())["orders"] if r["op"] == "select")
    assert (row["order"], row["capability"]) == (["reference", "cpu"], [0, 0])
    assert row["why"].startswith("reference 1000 ms, cpu 3000 ms: tiny, N=4, torch ")
    assert row["why"] in capsys.readouterr().out

    seen = []

    def time(makers, impl, *_):
        seen.append(tuning.tiles("gather", CPU))
        if len(seen) == 2:
            raise RuntimeError("tiny: FAILED: result 0 differs")
        return next(seconds)

    monkeypatch.setattr(tune, "milliseconds", time)
    monkeypatch.setattr(tune, "KERNELS", [kernel for kernel in tune.KERNELS if kernel[0] == "gather"])
    tune.run(CPU, ("tiny",), 4, tmp_path / "b", True, False, anywhere=True)
    assert seen == tune.KERNELS[0][3][: len(seen)]
    (row,) = (r for r in json.loads((tmp_path / "b").read_text())["tiles"] if r["kernel"] == "gather")
    assert row["tiles"] == tune.KERNELS[0][3][0]


def test_every_kernel_has_a_sweep_of_at_most_five_that_begins_with_its_present_tiles():
    table = {(row["kernel"], json.dumps(row["for"])): row["tiles"] for row in tuning.table()["tiles"]}
    assert {kernel for kernel, *_ in tune.KERNELS} == {kernel for kernel, _ in table}
    for kernel, what, _, configurations in tune.KERNELS:
        assert configurations[0] == table[kernel, json.dumps(what)]
        assert 2 <= len(configurations) <= 5


def test_what_is_recorded_names_no_folder_of_the_machine(monkeypatch):
    words = ["python", "-m", "benchmarks.x", "--runs", "/home/me/runs/out", "--out=/srv/new", "docs/page.md"]
    monkeypatch.setattr(measure.sys, "orig_argv", words)
    command = measure.environment(torch.device("cpu"))["command"]
    assert command == "python -m benchmarks.x --runs out --out=new docs/page.md"
