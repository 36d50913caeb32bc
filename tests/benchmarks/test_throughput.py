"""The report at a tiny size: its figures are counted here another way, and what fails is shown as failed."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    breakdown,
    check,
    compare,
    flops,
    loader,
    memory,
    page,
    rehearsal,
    report,
    scaling,
    step,
    workload,
)
from maskcf_fast.models import preset
from maskcf_fast.training import speed

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MAIN = workload.Variant("object-single")
VARIANTS = (MAIN.paper(), MAIN, workload.Variant("random-single"), MAIN._replace(run="graphed"), workload.Variant("FT"))
CONFIG = report.Config("cpu", 1, ("step", "breakdown", "scaling"), None, (step.Group("tiny", 4, VARIANTS),),
                       rehearsal.SERIES, "tiny", 4)  # fmt: skip
RATE = {"fp32": 1e12, "bf16": 1e12}


@pytest.fixture(scope="module")
def measured():
    return report.measure(CONFIG)


def cells(of):
    return {tuple(cell[field] for field in workload.Variant._fields): cell for cell in of["step"]["cells"]}


def group(*variants, end=float("inf")):
    return step.measure_group(step.Group("tiny", 4, variants), CPU, end, RATE)


def test_all_sections_are_there_and_survive_json(measured):
    written = json.loads(json.dumps(measured))
    assert {"environment", "step", "breakdown", "scaling", "targets"} <= written.keys()
    text = page.to_markdown(written)
    assert text == page.to_markdown(measured)
    assert "## Loader\n\nNot measured: not asked for." in text
    assert "it is for a GPU, and the device is cpu" in text
    assert "\ntiny, 2 images, object-single, fp32, where not varied" in text


def test_a_report_cut_short_keeps_what_it_has(monkeypatch, tmp_path):
    """Each section, and each group of steps within its section."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.scaling, "measure", interrupted)
    monkeypatch.setattr(step, "plan", lambda kind: [step.Group("tiny", 2, VARIANTS[4:])] * 2)
    (tmp_path / "report.json").write_text("an earlier one")
    command = ["--out", str(tmp_path), "--device", "cpu", "--sections", "step,scaling"]
    assert report.main(command) == 130
    assert "ms" in json.loads((tmp_path / "partial.json").read_text())["step"]["cells"][1]
    assert (tmp_path / "report.json").read_text() == "an earlier one"
    groups = iter([[{"ms": 1}], None])

    def measure_group(*_):
        return next(groups) or interrupted()

    kept = []
    monkeypatch.setattr(step, "measure_group", measure_group)
    with pytest.raises(KeyboardInterrupt):
        step.measure(CPU, 9, keep=lambda found: kept.append(len(found["cells"])))
    assert kept == [1]
    monkeypatch.setattr(report.scaling, "measure", lambda *_: {"not_measured": "no time either"})
    assert report.main([*command[:-1], "scaling"]) == 0
    assert "Not measured: no time either." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "partial.json").exists()


def test_figures_agree_with_each_other(measured):
    found = cells(measured)
    fast, paper = found[MAIN], found[MAIN.paper()]
    assert {cell["check"] for cell in found.values() if "ms" in cell} == {"ok"}
    assert fast["images_s"] * fast["ms"] == pytest.approx(4000)
    rate = measured["step"]["matrix_rate"]["fp32"]
    assert fast["utilisation"] * rate * fast["ms"] / 1e3 == pytest.approx(fast["flops"])
    assert fast["times_as_fast"].keys() == {"paper", "paper fp32", "random"}
    assert paper["flops"] > 1.15 * fast["flops"]
    assert fast["forwards"] == pytest.approx(fast["flops"] / 4 / flops.forward_flops(preset("tiny")))


@pytest.mark.parametrize("method", ["object-single", "context-multi", "random-single"])
@pytest.mark.parametrize("config", [preset("tiny"), replace(preset("ViT-B/32"), depth=2, width=192, heads=3)])
def test_flops_of_every_phase_are_those_of_the_theory(config, method):
    flops.complete_flop_counter()
    counted = breakdown.count(workload.Workload(config, 2, CPU), workload.Variant(method))
    assert counted == breakdown.theory(config, 2, method)


def test_the_phases_make_up_the_step(measured):
    phases = measured["breakdown"]["phases"]
    assert sum(phase["flops"] for phase in phases) == cells(measured)[MAIN]["flops"]
    assert all(phase["ms"] > 0 for phase in phases)
    assert sum(phase["ms"] for phase in phases) < 3 * measured["breakdown"]["whole_ms"]


@pytest.mark.parametrize("op", ["maskcf_triton", "maskcf"])
def test_both_relevance_kernels_have_a_flop_formula(op):
    flops.complete_flop_counter()
    formula = flops.flop_registry[getattr(torch.ops, op).attention_relevance]
    q, k, row = (torch.empty(shape, device="meta") for shape in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 7)))
    products = 2 * (2 * 2 * 3 * 5 * 7 * 8)  # q kT, and dO vT
    assert formula(q, k, k, q, row, 1.0, out_val=row) == products


def test_a_wrong_step_is_failed_and_has_no_speed_up(measured, monkeypatch):
    original = workload.CounterfactualDistiller.backward

    def wrong(self, images, labels, **options):
        out = original(self, images, labels, **options)
        self.student.head.bias.grad.mul_(1.001)
        return out

    monkeypatch.setattr(workload.CounterfactualDistiller, "backward", wrong)
    paper, fast, graph = group(*VARIANTS[:2], MAIN._replace(order="one graph"))
    assert (paper["check"], graph["check"]) == ("ok", "ok")
    assert fast["check"].startswith("FAILED: gradient")
    assert "times_as_fast" not in fast
    failed = measured | {"step": {"matrix_rate": RATE, "cells": [paper, fast]}}
    assert "FAILED: gradient" in page.to_markdown(failed | {"targets": page.targets(failed)})
    assert page.targets(failed)[0]["state"] == "not measured"
    assert "FAILED" in page.readme_section(failed)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_every_method_is_the_papers_function_in_every_precision(device):
    methods = (*workload.STRATEGIES, "FT", "FD")
    variants = [workload.Variant(name, precision=precision) for name in methods for precision in ("fp32", "bf16")]
    found = check.against_paper(preset("tiny"), torch.device(device), variants)
    assert {str(variant): status for variant, status in found.items() if status != "ok"} == {}


@pytest.fixture
def stand_in(monkeypatch):
    """Graphs and a compiler, as a rehearsal has them."""
    monkeypatch.setattr(speed, "Graphed", rehearsal.StandIn)
    monkeypatch.setattr(speed, "why_no_graph", lambda *_: None)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["object-single", "random-single"])
def test_a_graph_is_held_against_its_kernels(stand_in, monkeypatch, precision, method):
    """A gradient off by 1 % is found, and one patch that is selected differently fails nothing."""
    work = workload.Workload(preset("tiny"), 4, CPU)
    variant = workload.Variant(method, run="graphed", precision=precision)
    assert check.graph_against_kernels(work, variant, work.backward(variant)) == "ok"
    right = rehearsal.StandIn.__call__
    work.backward(variant)  # the kernels are there

    def scaled(self):
        out = right(self)
        for p in work.parameters:
            p.grad.mul_(1.01)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.StandIn, "__call__", scaled)
        status = check.graph_against_kernels(work, variant, work.backward(variant))
        assert status.startswith("FAILED: gradient is off by 1.0e-02, 1e-06")
    select = workload.MaskStrategy.mask
    calls = []

    def flipped(self, cam, draw):
        mask = select(self, cam, draw).clone()
        calls.append(mask)
        if len(calls) % 2:  # now and then the score at the threshold falls on the other side
            at = (cam / cam.amax(dim=1, keepdim=True) - self.threshold).abs().argmin()
            mask.view(-1)[at] ^= True
        return mask

    if method == "object-single":
        monkeypatch.setattr(workload.MaskStrategy, "mask", flipped)
        monkeypatch.setattr(check, "EDGE", dict.fromkeys(check.EDGE, 0.2))
        assert check.graph_against_kernels(work, variant, work.backward(variant)) == "ok"


def test_compiled_is_held_against_eager_on_a_given_mask(stand_in, monkeypatch):
    work = workload.Workload(preset("tiny"), 4, CPU)
    paper = MAIN.paper(run="compiled", precision="bf16")
    for variant in (MAIN._replace(run="compiled", precision="bf16"), MAIN._replace(run="compiled"), paper):
        assert check.against_eager(work, variant) == "ok"
    masks = []
    original = workload.CounterfactualDistiller.backward

    def watched(self, *args, mask=None, **options):
        masks.append(mask)
        return original(self, *args, mask=mask, **options)

    monkeypatch.setattr(workload.CounterfactualDistiller, "backward", watched)
    check.against_eager(work, MAIN._replace(run="compiled"))
    assert masks[0] is None
    assert masks[1] is not None


def test_what_is_timed_is_checked_first_in_its_precision(stand_in, monkeypatch):
    seen = []
    for name in ("against_eager", "graph_against_kernels"):
        monkeypatch.setattr(check, name, lambda work, variant, *_: seen.append(variant) or "ok")
    monkeypatch.setattr(
        check, "against_paper", lambda config, device, variants: seen.extend(variants) or dict.fromkeys(variants, "ok")
    )
    low = MAIN._replace(precision="bf16")
    variants = (low.paper(), low, low._replace(run="graphed"), low.paper(run="compiled"))

    def interleaved(calls, *_, **__):
        assert set(seen) == set(variants)
        return {name: [0.5] for name in calls}

    monkeypatch.setattr(step.m, "interleaved", interleaved)
    assert ["ms" in cell for cell in group(*variants)] == [True] * 4


def test_a_gpus_plan_has_the_headline_first_and_every_baseline():
    compared, alone, *_ = step.plan("cuda")
    low = MAIN._replace(precision="bf16")
    assert compared.variants[:3] == (low.paper(), low, low._replace(run="graphed"))
    baselines = {variant.precision for variant in compared.variants if variant.order == "paper"}
    assert baselines == {"bf16", "tf32", "fp32"}
    assert low.paper(run="compiled") in compared.variants
    assert (alone.arch, alone.batch) == ("ViT-B/16", 256)
    assert ("ViT-L/14", 128, alone.variants) in [(g.arch, g.batch, g.variants) for g in step.plan("cuda")]
    methods = {variant.method for g in step.plan("cuda") for variant in g.variants}
    assert methods == {*workload.STRATEGIES, "FT", "FD"}


@pytest.mark.parametrize(
    ("free", "graphs", "batch"),
    [(83e9, 0, 128), (82e9, 0, 64), (83e9, 1, 64), (1.6e9, 0, 2), (0.9e9, 0, None), (None, 2, 128)],
)
def test_images_are_planned_by_what_memory_is_free(monkeypatch, free, graphs, batch):
    """0.55 GB an image for the paper's order, 0.2 for the step, as much again in each graph; 0.85 of what is free."""
    monkeypatch.setattr(step.m, "free_memory", lambda device: free)
    peaks = iter([2 * 0.55e9, 2 * 0.2e9])
    monkeypatch.setattr(step.m, "peak_memory", lambda call, device: next(peaks))
    wanted = step.Group("tiny", 128, (*VARIANTS[:2], *[MAIN._replace(run="graphed")] * graphs))
    found, reason = step.fit(wanted, CPU, float("inf"))
    assert (found.batch if reason is None else None) == batch
    assert reason is None or "GB of memory" in reason


def test_one_that_runs_out_of_memory_costs_the_others_nothing(monkeypatch):
    backward, steps = workload.Workload.backward, []

    def limited(self, variant):
        call = backward(self, variant)

        def run(**given):
            steps.append(variant)
            if self.batch == 4 and steps.count(variant) > 12 and variant == VARIANTS[2]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
            return call(**given)

        return run

    monkeypatch.setattr(workload.Workload, "backward", limited)
    monkeypatch.setattr(step, "ROUNDS", (8, 8))
    found = group(*VARIANTS[:3])
    assert [cell["rounds"] for cell in found][:2] == [8, 8]
    assert 0 < found[2]["rounds"] < 8
    assert found[1]["times_as_fast"].keys() >= {"paper", "random"}


def test_what_does_not_fit_the_time_is_named():
    found = group(*VARIANTS[:2], end=time.perf_counter() + 0.02)
    assert [cell["not_measured"][:11] for cell in found] == ["needs about"] * 2
    found = group(*VARIANTS[:2], end=0)
    assert [cell["not_measured"] for cell in found] == ["the time was over"] * 2


def test_a_slow_loader_slows_the_step_down():
    work = workload.Workload(preset("tiny"), 2, CPU)

    class Slow:
        def __len__(self):
            return 100

        def __iter__(self):
            while True:
                time.sleep(0.2)
                yield torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2)

    found = loader.fed_step(Slow(), work, 0)
    assert found["steps"] == 3
    assert found["fed_ms"] > 200
    assert found["fed_ms"] / found["synthetic_ms"] == pytest.approx(found["slowdown"] + 1, rel=0.5)


def test_memory_is_the_least_of_its_repeats(monkeypatch):
    peaks = iter([9e6, 8e6, 5e6, 7e6, 2e6, 4e6])
    monkeypatch.setattr(memory.m, "peak_memory", lambda call, device: call() or int(next(peaks)))
    rows = memory.measure(preset("tiny"), 2, "fp32", "cpu")
    least = [("paper", 8_000_000), ("one graph", 5_000_000), ("two passes", 2_000_000)]
    assert [(row["order"], row["peak_bytes"]) for row in rows] == least
    assert memory.to_markdown(rows).splitlines()[-1].split("|")[2:4] == ["  2 ", "                 0.25 "]


def changed(of, change):
    other = copy.deepcopy(of)
    change(cells(other)[MAIN])
    return other


def test_compare_fails_on_a_regression_beyond_the_noise_only(measured, tmp_path, monkeypatch):
    def timed(factor, spread):
        other = changed(measured, lambda cell: cell.update(ms=cell["ms"] * factor))
        for cell in other["step"]["cells"]:
            cell["iqr_ms"] = spread * cell.get("ms", 0)
        return other

    old = timed(1, 0.01)
    assert not any(compare.compare(timed(*new), old)[1] for new in ((1.04, 0.01), (1.2, 0.2), (0.5, 0.01)))
    lines, regressed = compare.compare(timed(1.2, 0.01), old)
    assert regressed
    assert [line for line in lines if "REGRESSION" in line and "1.200" in line]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    for factor, status in ((1.02, 0), (1.2, 1)):
        new = timed(factor, 0.01)
        monkeypatch.setattr(report, "measure", lambda config, progress, keep, new=new: keep(new) or new)
        assert report.main(["--out", str(tmp_path), "--device", "cpu", "--compare", str(path)]) == status
    for wrong, message in (
        (old | {"environment": old["environment"] | {"device": "another"}}, "another"),
        (old | {"environment": old["environment"] | {"threads": 99}}, "of threads 99"),
        ({"cells": []}, r"is none of benchmarks\.report"),
        ([1], r"is none of benchmarks\.report"),
        (old | {"step": {"cells": [c | {"arch": "other"} for c in old["step"]["cells"]]}, "breakdown": {}}, "common"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.compare(measured, wrong)


def test_compare_fails_on_what_no_longer_works(measured):
    def crash(reason):
        return lambda cell: (cell.pop("ms"), cell.update(not_measured=reason))

    for change, regressed in (
        (crash("RuntimeError: out of memory"), True),
        (crash("the time was over"), False),
        (lambda cell: cell.update(ms=float("nan")), True),
        (lambda cell: cell.update(check="FAILED: off"), True),
        (lambda cell: None, False),
    ):
        assert compare.compare(changed(measured, change), measured)[1] == regressed
    lines, regressed = compare.compare(measured | {"breakdown": {"not_measured": "OutOfMemoryError"}}, measured)
    assert regressed
    assert "breakdown: OutOfMemoryError  REGRESSION" in lines


def test_the_fitted_exponent():
    assert scaling.fit([(2, 12), (4, 48), (8, 192)]) == pytest.approx(2)
    assert scaling.fit([(2, 12)]) is None


def test_the_page_of_figures_is_rewritten_between_its_markers(measured, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\n\n## Next\n")
    report.write_readme(measured, readme)
    text = readme.read_text()
    assert text == f"# Title\n\n{report.MARKERS[0]}\n{page.readme_section(measured)}{report.MARKERS[1]}\n\n## Next\n"
    readme.write_text("# No markers\n")
    with pytest.raises(ValueError, match="performance"):
        report.write_readme(measured, readme)


def test_committed_reports_are_shown_and_readable():
    text = report.page_with_figures().read_text()
    shown = text.partition(report.MARKERS[0] + "\n")[2].partition(report.MARKERS[1])[0]
    committed = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*/report.json")]
    assert shown in [page.readme_section(old) for old in committed]
    for old in committed:
        assert compare.compare(old, old)[1] is False
        assert page.to_markdown(old).count("\n| ViT-") > 20


@pytest.mark.parametrize(("given", "message"), [({"sections": ("steps",)}, "steps"), ({"minutes": 0}, "minutes")])
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        report.Config(**given)
