"""Numbers derived from counts, against other libraries and other ways to compute them."""

import json
import math

import numpy as np
import pytest

from maskcf_fast.evaluation.benchmark import read_class_map
from maskcf_fast.evaluation.metrics import Baseline, calibration_error, logit, read_baselines, wilson
from maskcf_fast.evaluation.report import table_line


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (3, 7), (500, 1000), (38150, 50000), (7500, 7500)])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_wilson_is_scipys(correct, n, level):
    stats = pytest.importorskip("scipy.stats")
    low, high = wilson(correct, n, level)
    expected = stats.binomtest(correct, n).proportion_ci(level, method="wilson")
    assert low == pytest.approx(100 * expected.low, abs=1e-9)
    assert high == pytest.approx(100 * expected.high, abs=1e-9)
    assert 0 <= low <= 100 * correct / n <= high + 1e-9 <= 100 + 1e-9


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_of_no_proportion(correct, n):
    with pytest.raises(ValueError, match=f"{correct} of {n} is no proportion"):
        wilson(correct, n)


def test_calibration_error_by_hand():
    # Ten predictions at 0.8 of which six are right, thirty at 0.5 of which eighteen are: (10·0.2 + 30·0.1) / 40.
    error = calibration_error(np.array([10, 30, 0]), np.array([6, 18, 0]), np.array([8.0, 15.0, 0.0]))
    assert error == pytest.approx(100 * 5 / 40, abs=1e-12)


def test_baseline_is_a_line_between_logits():
    rng = np.random.default_rng(0)
    x = rng.uniform(20, 90, 12)
    y = 100 / (1 + np.exp(-(0.9 * np.log(x / (100 - x)) - 0.5 + rng.normal(0, 0.1, 12))))
    slope, intercept = np.polyfit(np.log(x / (100 - x)), np.log(y / (100 - y)), 1)
    line = Baseline.fit(list(zip(x, y, strict=True)))
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept), rel=1e-9)
    expected = 100 / (1 + math.exp(-(slope * math.log(0.76 / 0.24) + intercept)))
    assert line.effective_robustness(76.0, 60.0) == pytest.approx(60 - expected, rel=1e-9)


def test_baseline_at_the_ends():
    line = Baseline(0.9, -0.5)
    assert (line.expected(0), line.expected(100)) == (0, 100)
    assert (Baseline(-1, 0).expected(0), Baseline(-1, 0).expected(100)) == (100, 0)
    assert Baseline(0, 0).expected(100) == 50
    assert (logit(0), logit(50), logit(100)) == (-math.inf, 0, math.inf)
    # Two models determine it: it passes through both.
    line = Baseline.fit([(60, 40), (80, 65)])
    assert (line.expected(60), line.expected(80)) == pytest.approx((40, 65), rel=1e-12)


def test_baselines_from_a_file(tmp_path):
    path = tmp_path / "baseline.yaml"
    path.write_text("imagenet-r: {slope: 0.9, intercept: -1.5}\nimagenet-a:\n- [60, 40]\n- [80, 65]\n")
    baselines = read_baselines(path)
    assert baselines == {"imagenet-r": Baseline(0.9, -1.5), "imagenet-a": Baseline.fit([(60, 40), (80, 65)])}
    path.write_text(json.dumps({"x": [[60, 40], [80, 65]]}))
    assert read_baselines(path)["x"] == baselines["imagenet-a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x: {slope: 1}", "x must be .*intercept"),
        ("x: [[60, 40]]", "at least two models of different ID accuracy"),
        ("x: [[60, 40], [60, 41]]", "at least two models of different ID accuracy"),
        ("x: [[60, 40], [70, 100]]", "between 0 and 100"),
        ("x: 3", "x must be"),
        ("- 3", "must hold a baseline for each"),
        ("a: [1", "neither YAML nor JSON"),
    ],
)
def test_bad_baselines(tmp_path, text, words):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_baselines(tmp_path / "b.yaml")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_baselines(tmp_path / "absent.yaml")


def test_yaml_words_are_texts(tmp_path):
    (tmp_path / "map.yaml").write_text("no: yes\n001: [1e-5, on]\n~: null\n")
    assert read_class_map(tmp_path / "map.yaml") == {"no": ("yes",), "001": ("1e-5", "on"), "~": ("null",)}
    (tmp_path / "baseline.yaml").write_text("no: {slope: 1e-1, intercept: 2}\n")
    assert read_baselines(tmp_path / "baseline.yaml") == {"no": Baseline(0.1, 2.0)}
    (tmp_path / "deep.yaml").write_text("[" * 20_000)
    with pytest.raises(ValueError, match=r"deep\.yaml is neither YAML nor JSON"):
        read_class_map(tmp_path / "deep.yaml")


def test_a_name_stays_in_its_cell():
    assert table_line(["a|b\nc\r\n", "1"]) == "| a\\|b c | 1 |"
