"""The report at a tiny size: its figures are counted here another way, and what fails is shown as failed."""

import copy
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import breakdown, compare, loader, memory, page, pages, rehearsal, report, step, workload
from maskcf_fast.core.errors import UserError
from maskcf_fast.models import preset
from maskcf_fast.training import cost

CPU = torch.device("cpu")
FORWARDS = (("paper", 9.0), ("two passes", 7.5))
MAIN = workload.Variant("object-single")
VARIANTS = (MAIN.paper(), MAIN, workload.Variant("random-single"), MAIN._replace(run="graphed"), workload.Variant("FT"))


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "groups", lambda: (step.Group("tiny", 4, VARIANTS),))
        return report.measure(CPU, 10, ("step", "breakdown", "scaling"), tiny=True)


def cells(of):
    return {tuple(cell[field] for field in workload.Variant._fields): cell for cell in of["step"]["cells"]}


def group(*variants, end=float("inf")):
    return step.measure_group(step.Group("tiny", 4, variants), CPU, end)


def test_all_sections_are_there_and_survive_json(measured):
    text = page.to_markdown(json.loads(json.dumps(measured)))
    assert text == page.to_markdown(measured)
    assert "## Loader\n\nNot measured: not asked for." in text
    assert "it is for a GPU, and the device is cpu" in text
    assert "\ntiny, 2 images, object-single, fp32, where not varied" in text
    points = [point for series in ("batch", "tokens", "depth") for point in measured["scaling"][series]["points"]]
    assert len(points) == 6
    assert all("not_measured" in point or 0 < point["step_bytes"] < point["paper_bytes"] for point in points)


def test_a_report_cut_short_keeps_what_it_has(monkeypatch, tmp_path):
    """Each section, and each group of steps within its section."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    groups = iter([[step.Group("tiny", 4, ()).cell(MAIN, not_measured="no time")], None])
    monkeypatch.setattr(report, "check", lambda device: "1 passed")
    monkeypatch.setattr(report.step, "measure_group", lambda *_: next(groups) or interrupted())
    (tmp_path / "report.json").write_text("an earlier one")
    command = ["--out", str(tmp_path), "--device", "cpu", "--sections"]
    assert report.main([*command, "step,scaling"]) == 130
    assert len(json.loads((tmp_path / "partial.json").read_text())["step"]["cells"]) == 1
    assert (tmp_path / "report.json").read_text() == "an earlier one"
    monkeypatch.setattr(report.step, "scaling", lambda *_: {"not_measured": "no time either"})
    assert report.main([*command, "scaling"]) == 0
    assert "Not measured: no time either." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "partial.json").exists()


def test_nothing_is_timed_whose_tests_fail(monkeypatch, tmp_path, capsys):
    (tmp_path / "test_wrong.py").write_text("def test_step_cpu():\n    assert 1 == 2\n")
    monkeypatch.setattr(report, "TESTS", str(tmp_path / "test_wrong.py"))
    monkeypatch.setattr(report, "measure", lambda *_: pytest.fail("was timed"))
    assert report.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "assert 1 == 2" in capsys.readouterr().err
    (tmp_path / "test_wrong.py").write_text("def test_step_cpu():\n    pass\n")
    assert report.check(CPU).startswith("1 passed")


def test_figures_agree_with_each_other(measured):
    found = cells(measured)
    fast, paper = found[MAIN], found[MAIN.paper()]
    assert fast["images_s"] * fast["ms"] == pytest.approx(4000)
    rate = measured["step"]["matrix_rate"]["fp32"]
    assert fast["utilisation"] * rate * fast["ms"] / 1e3 == pytest.approx(fast["flops"])
    assert fast["times_as_fast"].keys() == {"paper", "paper fp32", "random"}
    assert paper["flops"] > 1.15 * fast["flops"]
    assert fast["forwards"] == pytest.approx(fast["flops"] / 4 / cost.forward_flops(preset("tiny")))


def theory(config, batch, method):
    """FLOPs of each phase for a refill strategy: matrix products alone, an addition and a multiplication each.

    Backward, a linear layer takes two products for one (one where only data gradients are formed), fused attention
    five for two, since it computes the map again. The last block computes the class token alone.
    """
    t, w, layers, d = 1 + config.num_patches, config.width, config.depth, config.feature_dim
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    linear, attention = 24 * t * w * w, 4 * t * t * w  # of a block
    last_linear, last_attention = 4 * t * w * w + 20 * w * w, 4 * t * w  # keys and values of all, the rest of one
    out = 0 if config.output_dim is None else 2 * w * d
    head = 2 * d * workload.CLASSES
    encode = (layers - 1) * (linear + attention) + last_linear + last_attention + out
    backward = (layers - 1) * (2 * linear + 5 * attention // 2) + 2 * (last_linear + out) + 5 * last_attention // 2
    # Data gradients from the logits down to the first layer's attention output; two products per layer for the row.
    through = (layers - 1) * (linear + 5 * attention // 2) + last_linear + 5 * last_attention // 2 + out + head
    cam = through - 6 * t * w * w - 5 * attention // 2 + (layers - 1) * attention + last_attention
    per_image = {
        "embed": embed,
        "clean forward": encode + head,
        "map": 0 if method.startswith("random") else cam,
        "task backward": backward + 2 * head,
        "teacher": embed + encode,
        "masked forward": encode,
        "masked backward": backward + embed,
    }
    return {name: batch * per_image.get(name, 0) for name in breakdown.PHASES}


@pytest.mark.parametrize("method", ["object-single", "context-multi", "random-single"])
@pytest.mark.parametrize("config", [preset("tiny"), replace(preset("ViT-B/32"), depth=2, width=192, heads=3)])
def test_flops_of_every_phase_are_those_of_the_theory(config, method):
    cost.complete_flop_counter()
    work = workload.Workload(config, 2, CPU)
    run = work.step(work.backward(workload.Variant(method)))
    with FlopCounterMode(display=False) as counter, breakdown.watched(work, counter.get_total_flops) as counted:
        run()
    assert counted == theory(config, 2, method)
    assert sum(counted.values()) == counter.get_total_flops() > 0


def test_the_phases_make_up_the_step(measured):
    phases = measured["breakdown"]["phases"]
    assert sum(phase["flops"] for phase in phases) == cells(measured)[MAIN]["flops"]
    assert all(phase["ms"] > 0 for phase in phases)
    assert sum(phase["ms"] for phase in phases) < 3 * measured["breakdown"]["whole_ms"]


@pytest.mark.parametrize("op", ["maskcf_triton", "maskcf"])
def test_both_relevance_kernels_have_a_flop_formula(op):
    cost.complete_flop_counter()
    formula = cost.flop_registry[getattr(torch.ops, op).attention_relevance]
    q, k, row = (torch.empty(shape, device="meta") for shape in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 7)))
    products = 2 * (2 * 2 * 3 * 5 * 7 * 8)  # q kT, and dO vT
    assert formula(q, k, k, q, row, 1.0, out_val=row) == products


def test_a_gpus_plan_has_the_headline_first_and_every_baseline():
    compared, alone, *_ = step.plan("cuda")
    low = MAIN._replace(precision="bf16")
    assert compared.variants[:3] == (low.paper(), low, low._replace(run="graphed"))
    baselines = {variant.precision for variant in compared.variants if variant.order == "paper"}
    assert baselines == {"bf16", "tf32", "fp32"}
    assert low.paper(run="compiled") in compared.variants
    assert (alone.arch, alone.batch) == ("ViT-B/16", 256)
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

        def run():
            steps.append(variant)
            if self.batch == 4 and steps.count(variant) > 8 and variant == VARIANTS[2]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
            call()

        return run

    monkeypatch.setattr(workload.Workload, "backward", limited)
    monkeypatch.setattr(step, "ROUNDS", (8, 8))
    found = group(*VARIANTS[:3])
    assert [cell["rounds"] for cell in found][:2] == [8, 8]
    assert 0 < found[2]["rounds"] < 8
    assert found[1]["times_as_fast"].keys() >= {"paper", "random"}


@pytest.mark.parametrize(("left", "reason"), [(0.02, "needs about"), (-1, "the time was over")])
def test_what_does_not_fit_the_time_is_named(left, reason):
    found = group(*VARIANTS[:2], end=time.perf_counter() + left)
    assert [cell["not_measured"].startswith(reason) for cell in found] == [True, True]


def test_a_slow_loader_slows_the_step_down():
    class Slow:
        def __len__(self):
            return 100

        def __iter__(self):
            while True:
                time.sleep(0.2)
                yield torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2)

    found = loader.fed_step(Slow(), workload.Workload(preset("tiny"), 2, CPU), 0)
    assert found["steps"] == 3
    assert found["fed_ms"] > 200
    assert found["fed_ms"] / found["synthetic_ms"] == pytest.approx(found["slowdown"] + 1, rel=0.5)


def test_memory_is_the_least_of_its_repeats(monkeypatch):
    peaks = iter([9e6, 8e6, 5e6, 7e6, 2e6, 4e6, 3e6, 1e6])
    monkeypatch.setattr(workload.m, "peak_memory", lambda call, device: call() or int(next(peaks)))
    found = memory.measure(CPU, "tiny", 2, "fp32")
    assert [step["peak_bytes"] for step in found["steps"]] == [8_000_000, 5_000_000, 2_000_000, 1_000_000]
    assert [step["name"].split(", ")[1] for step in found["steps"]] == ["paper's order", "one graph", "fp32", "fp32"]
    assert found["steps"][3]["name"].endswith("GELU recomputed")
    assert list(memory.shares(found).values()) == [1, 0.625, 0.25, 0.125]
    assert "| object-single, fp32                  |  2 |                 0.25 |" in page.memory_lines(found)
    assert memory.shares(found | {"steps": [step | {"peak_bytes": None} for step in found["steps"]]}) == {}


def changed(of, change):
    other = copy.deepcopy(of)
    change(cells(other)[MAIN])
    return other


def test_compare_fails_on_a_regression_beyond_the_noise_only(measured, tmp_path, monkeypatch):
    def timed(factor, spread):
        other = changed(measured, lambda cell: cell.update(ms=cell["ms"] * factor))
        for cell in other["step"]["cells"]:
            cell["iqr_ms"] = spread * cell.get("ms", 0)
            cell.setdefault("ms", 1.0)
        return other

    old = timed(1, 0.01)
    assert not any(compare.compare(timed(*new), old)[1] for new in ((1.04, 0.01), (1.2, 0.2), (0.5, 0.01)))
    lines, regressed = compare.compare(timed(1.2, 0.01), old)
    assert regressed
    assert [line for line in lines if "REGRESSION" in line and "1.200" in line]
    for wrong, message in (
        (old | {"environment": old["environment"] | {"device": "another"}}, "another"),
        (old | {"environment": old["environment"] | {"threads": 99}}, "of threads 99"),
        ({"cells": []}, r"is none of benchmarks\.report"),
        ([1], r"is none of benchmarks\.report"),
        (old | {"step": {"cells": [c | {"arch": "other"} for c in old["step"]["cells"]]}, "breakdown": {}}, "common"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.compare(measured, wrong)


@pytest.mark.parametrize(
    ("change", "regressed"),
    [
        (lambda cell: (cell.pop("iqr_ms"), cell.update(not_measured="RuntimeError: out of memory")), True),
        (lambda cell: (cell.pop("iqr_ms"), cell.update(not_measured="the time was over")), False),
        (lambda cell: cell.update(ms=float("nan")), True),
        (lambda cell: cell.update(check="FAILED: off"), True),
        (lambda cell: None, False),
    ],
)
def test_compare_fails_on_what_no_longer_works(measured, change, regressed):
    assert compare.compare(changed(measured, change), measured)[1] == regressed
    lines, regressed = compare.compare(measured | {"breakdown": {"not_measured": "OutOfMemoryError"}}, measured)
    assert regressed
    assert "breakdown: OutOfMemoryError  REGRESSION" in lines


def test_the_command_compares_and_names_bad_settings(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "check", lambda device: "1 passed")
    monkeypatch.setattr(report, "measure", lambda *_: copy.deepcopy(measured))
    old = tmp_path / "old.json"
    for factor, status in ((1.0, 0), (0.5, 1)):
        before = copy.deepcopy(measured)
        before["breakdown"]["phases"][1] |= {"ms": factor * measured["breakdown"]["phases"][1]["ms"], "iqr_ms": 0}
        measured["breakdown"]["phases"][1]["iqr_ms"] = 0
        old.write_text(json.dumps(before))
        assert report.main(["--out", str(tmp_path), "--device", "cpu", "--compare", str(old)]) == status
    for wrong, message in (("--sections steps", "steps"), ("--minutes 0", "minutes"), ("--images none", "none")):
        assert report.main([*wrong.split(), "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def test_the_fitted_exponent():
    assert step.exponent([(2, 12), (4, 48), (8, 192)]) == pytest.approx(2)
    assert step.exponent([(2, 12)]) is None


def test_the_pages_show_the_committed_figures():
    """As `python -m benchmarks.pages` writes them."""
    reports, ops = pages.committed()
    for path in pages.PAGES:
        assert pages.filled(path.read_text(), reports, ops) == path.read_text(), path.name


def test_no_block_stays_as_it_is_when_its_results_change():
    reports, ops = pages.committed()
    shown = {name: block(reports, ops) for name, block in pages.BLOCKS.items()}

    def larger(results):
        if isinstance(results, dict):
            return {key: larger(value) for key, value in results.items()}
        if isinstance(results, list):
            return [larger(value) for value in results]
        whole = isinstance(results, int)  # images, threads
        return (
            results * 1.5 if isinstance(results, float) else results + 2_000_000 if whole and results > 2e6 else results
        )

    for name, block in pages.BLOCKS.items():
        assert block([larger(report) for report in reports], larger(ops)) != shown[name]
    with pytest.raises(UserError, match="'stepp', which are none of step, memory"):
        pages.filled("<!-- figures: stepp -->\n<!-- /figures -->", reports, ops)


def test_pages_name_the_section_that_a_results_file_lacks_and_its_command(tmp_path, monkeypatch):
    shutil.copytree(pages.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    path = tmp_path / pages.MACHINES[0] / "report.json"
    whole = json.loads(path.read_text())
    text = "".join(page.read_text() for page in pages.PAGES)
    for name in ("environment", "step", "memory", "operations"):
        for spoiled in ({k: v for k, v in whole.items() if k != name}, whole | {name: {"not_measured": "no time"}}):
            path.write_text(json.dumps(spoiled))
            with pytest.raises(UserError) as told:
                pages.filled(text, *pages.committed())
            assert f"{path} lacks the section '{name}'" in str(told.value)
            assert f"`python -m benchmarks.report --out {path.parent}`" in str(told.value)
    path.write_text(json.dumps(whole | {"step": {"cells": []}}))
    with pytest.raises(UserError, match=r"'readme-step': the results lack .'two passes', 'fp32'"):
        pages.filled(text, *pages.committed())


def test_how_fast_a_step_of_products_alone_would_be():
    cells = [{"arch": "a", "batch": 1, "method": "m", "order": o, "forwards": f} for o, f in FORWARDS]
    kinds = [{"name": "products", "ms": 80.0, "least_ms": 60.0}, {"name": "rest", "ms": 20.0, "least_ms": 1.0}]
    found = {"arch": "a", "batch": 1, "method": "m", "kinds": kinds}
    text = " ".join(pages.limit({"step": {"cells": cells}}, found))
    assert "80% of it, at 75% of the machine's rate" in text
    assert "1.20 times as many" in text
    assert f"{(80 * 1.2 + 20) / 80:.2f} ×" in text


def test_committed_reports_are_readable():
    committed = [json.loads(path.read_text()) for path in pages.RESULTS.glob("*/report.json")]
    assert committed
    for old in committed:
        assert compare.compare(old, old)[1] is False
        measured = [cell for cell in old["step"]["cells"] if "ms" in cell]
        assert page.to_markdown(old).count("\n| ViT-") >= len(measured) > 2
