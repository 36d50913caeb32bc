"""The report at a tiny size: its figures are counted here another way, and what fails is shown as failed."""

import copy
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskcf_fast.methods import MaskStrategy
from maskcf_fast.models import preset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks
report_, page, step, workload, flops, breakdown, scaling, correctness, compare, measure_, fed_step, memory = (
    importlib.import_module(f"benchmarks.{name}")
    for name in (
        "report",
        "report_page",
        "step",
        "workload",
        "flops",
        "breakdown",
        "scaling",
        "correctness",
        "compare",
        "measure",
        "fed_step",
        "memory",
    )
)
CPU = torch.device("cpu")
VARIANTS = (
    workload.Variant("object-single", "paper"),
    workload.Variant("object-single"),
    workload.Variant("random-single"),
    workload.Variant("object-single", run="graphed"),
    workload.Variant("FT"),
)
CONFIG = report_.Config(
    device="cpu",
    minutes=1,
    sections=("step", "breakdown", "scaling"),
    runs=("eager",),
    groups=(step.Group("tiny", 4, VARIANTS),),
    series=("tiny", 4, {"batch": (2, 4), "tokens": (32, 64), "depth": (2, 4)}),
    arch="tiny",
    batch=4,
)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        matrix_rate = step.matrix_rate
        patch.setattr(step, "matrix_rate", lambda device: matrix_rate(device, size=128, seconds=0.01))
        yield report_.measure(CONFIG)


def cells(report):
    return {tuple(cell[field] for field in workload.Variant._fields): cell for cell in report["step"]["cells"]}


def test_all_sections_are_there_and_survive_json(report, tmp_path):
    report_.write(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert {"environment", "correctness", "step", "breakdown", "scaling", "targets"} <= written.keys()
    assert {path.name for path in tmp_path.glob("*.png")} == {"step.png", "breakdown.png", "scaling.png"}
    text = (tmp_path / "report.md").read_text()
    assert "## Loader\n\nNot measured: not asked for." in text
    assert "it is for a GPU, and the device is cpu" in text
    assert "\ntiny, 4 images, object-single, fp32, where not varied" in text
    assert text == page.to_markdown(written, ["step.png", "breakdown.png", "scaling.png"])


def test_a_report_cut_short_keeps_its_sections(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_.correctness, "measure", lambda *_, **__: [])
    monkeypatch.setattr(report_.breakdown, "measure", lambda *_, **__: {"not_measured": "no time"})
    monkeypatch.setattr(report_.scaling, "measure", interrupted)
    for name in ("report.json", "step.png", "mine.png"):
        (tmp_path / name).write_text("an earlier one")
    command = ["--out", str(tmp_path), "--device", "cpu", "--sections", "breakdown,scaling"]
    assert report_.main(command) == 130
    written = json.loads((tmp_path / "partial.json").read_text())
    assert written["breakdown"] == {"not_measured": "no time"}
    assert "scaling" not in written
    assert (tmp_path / "report.json").read_text() == "an earlier one"
    monkeypatch.setattr(report_.scaling, "measure", lambda *_: {"not_measured": "no time either"})
    assert report_.main(command) == 0
    assert "Not measured: no time either." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "partial.json").exists()
    assert [path.name for path in tmp_path.glob("*.png")] == ["mine.png"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each process")
def test_two_processes_are_measured(report):
    ranks = report["scaling"]["ranks"]
    one, two = (point["images_s"] for point in ranks["points"])
    assert ranks["efficiency"] == pytest.approx(two / one / 2)
    assert one > 0


def test_every_check_passes_and_all_strategies_are_checked(report):
    checks = report["correctness"]
    assert {row["status"] for row in checks} == {"ok"}
    assert {row["method"] for row in checks if "method" in row} == {*workload.STRATEGIES, "FT", "FD"}


def test_figures_agree_with_each_other(report):
    measured = cells(report)
    fast, paper = measured[VARIANTS[1]], measured[VARIANTS[0]]
    assert fast["images_s"] * fast["ms"] == pytest.approx(4000)
    assert fast["utilisation"] * report["step"]["matrix_rate"]["fp32"] * fast["ms"] / 1e3 == pytest.approx(
        fast["flops"]
    )
    assert fast["times_as_fast"].keys() == {"paper", "paper fp32", "random"}
    assert paper["flops"] > 1.15 * fast["flops"]
    assert "ms" not in measured[VARIANTS[3]]
    assert "GPU" in measured[VARIANTS[3]]["not_measured"]


@pytest.mark.parametrize("method", ["object-single", "context-multi", "random-single"])
@pytest.mark.parametrize("config", [preset("tiny"), replace(preset("ViT-B/32"), depth=2, width=192, heads=3)])
def test_flops_of_every_phase_are_those_of_the_theory(config, method):
    flops.complete_flop_counter()
    work = workload.Workload(config, 2, CPU)
    counted = breakdown.count(work, work.method(workload.Variant(method)))
    assert counted == breakdown.theory(config, 2, method)


def test_flops_of_the_whole_step_are_the_sum_of_its_phases(report):
    phases = report["breakdown"]["phases"]
    assert sum(phase["flops"] for phase in phases) == cells(report)[VARIANTS[1]]["flops"]
    assert [phase["flops"] for phase in phases] == [phase["theory"] for phase in phases]


@pytest.mark.parametrize("method", ["object-single", "object-none", "random-none", "context-multi"])
def test_phases_are_the_step(method):
    work = workload.Workload(preset("tiny"), 4, CPU)
    variant = workload.Variant(method)
    draw = work.draw(MaskStrategy.from_name(method))
    _, expected = correctness.gradients(work, work.backward(variant), draw)
    for name in breakdown.phases(work, work.method(variant), draw):
        if name == "masked backward":
            break
    for p, grad in zip(work.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_a_wrong_step_is_failed_and_has_no_speed_up(report, monkeypatch):
    original = workload.CounterfactualDistiller.backward

    def wrong(self, images, labels, **options):
        out = original(self, images, labels, **options)
        self.student.head.bias.grad.mul_(1.001)
        return out

    monkeypatch.setattr(workload.CounterfactualDistiller, "backward", wrong)
    checks = correctness.measure(CPU, runs=("eager",))
    assert correctness.failure(checks, workload.Variant("object-single")).startswith("FAILED: gradient")
    assert correctness.failure(checks, workload.Variant("object-single", "one graph")) is None
    assert correctness.failure(checks, workload.Variant("object-single", run="compiled")) == "not checked"
    groups = (step.Group("tiny", 4, VARIANTS[:2]),)
    monkeypatch.setattr(step, "matrix_rate", lambda device: {"fp32": 1e12, "bf16": 1e12})
    found = step.measure(CPU, 5, groups, lambda variant: correctness.failure(checks, variant))
    paper, fast = found["cells"]
    assert paper["check"] == "ok"
    assert "times_as_fast" not in fast
    failed = report | {"step": found, "correctness": checks}
    assert "FAILED: gradient" in page.to_markdown(failed | {"targets": page.targets(failed)})
    assert page.targets(failed)[0]["state"] == "not measured"
    assert "FAILED" in page.readme_section(failed)


def test_a_failed_op_fails_what_uses_the_ops():
    checks = [{"what": "refill", "op": "refill_patches", "status": "FAILED: off"}]
    assert correctness.failure(checks, workload.Variant("FT")).startswith("FAILED")
    assert correctness.failure(checks, workload.Variant("object-single", "paper")) is None


def test_a_group_that_runs_out_of_memory_is_halved(monkeypatch):
    backward = workload.Workload.backward

    def limited(self, variant):
        if variant.order == "paper" and self.batch > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return backward(self, variant)

    monkeypatch.setattr(step, "matrix_rate", lambda device: {"fp32": 1e12, "bf16": 1e12})
    monkeypatch.setattr(workload.Workload, "backward", limited)
    found = step.measure(CPU, 20, (step.Group("tiny", 8, VARIANTS[:2]),))["cells"]
    assert [(cell["batch"], "ms" in cell) for cell in found] == [(2, True), (2, True)]


def test_graphs_that_leave_no_memory_are_given_up(monkeypatch):
    seen = []

    def interleaved(names, *_, **__):
        seen.append(set(names))
        if len(seen) == 1:
            raise RuntimeError("CUDA out of memory")
        return {name: [1.0, 1.0, 1.0] for name in names}

    monkeypatch.setattr(step.m, "interleaved", interleaved)
    monkeypatch.setattr(workload, "why_no_graph", lambda *_: None)
    monkeypatch.setattr(workload.Workload, "_graphed", lambda self, method: lambda: None)
    monkeypatch.setattr(workload.Workload, "_compile", lambda self, method: workload.POINTWISE)
    cells = step.measure_group(step.Group("tiny", 2, VARIANTS[:4]), CPU, float("inf"), {"fp32": 1e12}, lambda _: None)
    assert [cell["run"] for cell in cells if "ms" in cell] == ["eager"] * 3
    assert [cell["not_measured"] for cell in cells if "ms" not in cell] == ["CUDA out of memory"]
    assert seen[0] - seen[1] == {str(VARIANTS[3])}


def test_a_slow_loader_slows_the_step_down():
    work = workload.Workload(preset("tiny"), 2, CPU)

    class Loader:
        def __len__(self):
            return 100

        def __iter__(self):
            while True:
                time.sleep(0.2)
                yield torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2)

    found = fed_step._measure(Loader(), work, 0)
    assert found["steps"] == 3
    assert found["fed_ms"] > 200
    assert found["fed_ms"] / found["synthetic_ms"] == pytest.approx(found["slowdown"] + 1, rel=0.5)


def test_memory_is_the_least_of_its_repeats(monkeypatch):
    peaks = iter([9e6, 8e6, 5e6, 7e6, 2e6, 4e6])
    steps = []
    monkeypatch.setattr(memory.m, "peak_memory", lambda call, device: steps.append(call()) or int(next(peaks)))
    rows = memory.measure(preset("tiny"), 2, "fp32", "cpu")
    assert [(row["order"], row["peak_bytes"]) for row in rows] == [
        ("paper", 8_000_000), ("one graph", 5_000_000), ("two passes", 2_000_000)
    ]  # fmt: skip
    assert len(steps) == 6
    assert memory.to_markdown(rows).splitlines()[-1].split("|")[2:4] == ["  2 ", "                 0.25 "]


def test_what_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(step, "matrix_rate", lambda device: {"fp32": 1e11, "bf16": 1e11})
    groups = (step.Group("ViT-B/32", 64, VARIANTS[:2]), step.Group("tiny", 4, VARIANTS[:2]))
    found = step.measure(CPU, 20, groups)["cells"]
    assert [cell.get("not_measured", "")[:11] for cell in found] == ["needs about", "needs about", "", ""]


def test_compare_fails_on_a_regression_beyond_the_noise_only(report, tmp_path, monkeypatch):
    def changed(factor, spread):
        other = copy.deepcopy(report)
        cell = cells(other)[VARIANTS[1]]
        cell["ms"] *= factor
        for c in other["step"]["cells"]:
            c["iqr_ms"] = spread * c.get("ms", 0)
        return other

    old = changed(1, 0.01)
    assert not compare.compare(changed(1.04, 0.01), old)[1]
    assert not compare.compare(changed(1.2, 0.2), old)[1]
    assert not compare.compare(changed(0.5, 0.01), old)[1]
    lines, regressed = compare.compare(changed(1.2, 0.01), old)
    assert regressed
    assert [line for line in lines if "REGRESSION" in line and "1.200" in line]

    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    command = ["--out", str(tmp_path), "--device", "cpu", "--compare", str(path)]
    for factor, status in ((1.02, 0), (1.2, 1)):
        new = changed(factor, 0.01)
        monkeypatch.setattr(report_, "measure", lambda config, progress, keep, new=new: keep(new) or new)
        assert report_.main(command) == status

    for wrong, message in (
        (old | {"environment": old["environment"] | {"device": "another"}}, "another"),
        (old | {"environment": old["environment"] | {"threads": 99}}, "of threads 99"),
        ({"cells": []}, "is none of benchmarks.report"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.compare(report, wrong)


def test_compare_fails_on_a_section_that_broke(report):
    new = copy.deepcopy(report) | {"step": {"not_measured": "OutOfMemoryError"}}
    lines, regressed = compare.compare(new, report)
    assert regressed
    assert "step: OutOfMemoryError  REGRESSION" in lines
    with pytest.raises(ValueError, match=r"none of benchmarks\.report"):
        compare.compare(report, [1])


def test_compare_fails_on_what_no_longer_works(report):
    def broken(change):
        other = copy.deepcopy(report)
        change(other)
        return other

    def crash(other):
        cell = cells(other)[VARIANTS[1]]
        del cell["ms"]
        cell["not_measured"] = "RuntimeError: out of memory"

    def out_of_time(other):
        cell = cells(other)[VARIANTS[1]]
        del cell["ms"]
        cell["not_measured"] = "the time was over"

    assert compare.compare(broken(crash), report)[1]
    assert not compare.compare(broken(out_of_time), report)[1]
    assert compare.compare(broken(lambda other: cells(other)[VARIANTS[1]].update(ms=float("nan"))), report)[1]
    assert compare.compare(broken(lambda other: other["correctness"][0].update(status="FAILED: off")), report)[1]
    assert not compare.compare(broken(lambda other: None), report)[1]

    def rename(other):
        for cell in other["step"]["cells"]:
            cell["arch"] = "other"
        other["ops"], other["breakdown"] = {}, {}

    with pytest.raises(ValueError, match="no cell in common"):
        compare.compare(broken(rename), report)


def test_the_fitted_exponent():
    assert scaling.fit([(2, 12), (4, 48), (8, 192)]) == pytest.approx(2)
    assert scaling.fit([(2, 12)]) is None


def test_the_last_value_decides_a_target(report):
    best = page._target("", [("a", 1.3), ("b", 1.1)], 1.2)
    assert best["state"] == "missed"
    assert page._target("", [("a", 1.3)], 1.2)["state"] == "met"
    assert page._target("", [("a", 0.2)], 0.33, most=True)["state"] == "met"
    assert page._target("", [], 1)["state"] == "not measured"


def test_the_readme_is_rewritten_between_its_markers(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report_.MARKERS[0]}\nold\n{report_.MARKERS[1]}\n\n## Next\n")
    report_.write_readme(report, readme)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{report_.MARKERS[0]}\n")
    assert text.endswith(f"{report_.MARKERS[1]}\n\n## Next\n")
    assert page.readme_section(report) in text
    assert "old" not in text.splitlines()
    readme.write_text("# No markers\n")
    with pytest.raises(ValueError, match="performance"):
        report_.write_readme(report, readme)


def test_the_readme_shows_a_committed_report():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert report_.MARKERS[0] in text
    shown = text.partition(report_.MARKERS[0] + "\n")[2].partition(report_.MARKERS[1])[0]
    committed = sorted((ROOT / "benchmarks" / "results").glob("*/report.json"))
    assert shown in [page.readme_section(json.loads(path.read_text())) for path in committed]


@pytest.mark.parametrize(("given", "message"), [({"sections": ("steps",)}, "steps"), ({"minutes": 0}, "minutes")])
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        report_.Config(**given)
