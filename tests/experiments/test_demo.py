"""The demo in its shortened form, and the arithmetic of its table."""

import io
import json
import sys

import pytest

from maskcf_fast.core.errors import report_errors
from maskcf_fast.demo import main
from maskcf_fast.experiments import demo
from maskcf_fast.experiments.demo import Row, markdown_table, on_curve

ROWS = [
    Row("zero-shot", None, 0, 60.0, 62.0),
    Row("FT", None, 0, 90.0, 42.0, 200.0),
    Row("fd", 1.0, 0, 80.0, 58.0, 100.0),
    Row("object-single", 1.0, 0, 75.0, 60.5, 50.0),
    Row("zero-shot", None, 1, 60.0, 62.0),
    Row("FT", None, 1, 92.0, 44.0, 200.0),
    Row("fd", 1.0, 1, 82.0, 60.0, 100.0),
    Row("object-single", 1.0, 1, 71.0, 61.5, 50.0),
]


def test_curve_through_feature_distillation():
    assert on_curve(ROWS, ROWS[3]) == pytest.approx(59.0)  # three quarters of the way from 62 to 58
    assert on_curve(ROWS, Row("x", 1.0, 0, 85.0, 0.0)) == pytest.approx(50.0)
    assert on_curve(ROWS, Row("x", 1.0, 0, 99.0, 0.0)) == pytest.approx(42.0)


def test_table():
    lines = markdown_table(ROWS).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == ["zero-shot", "FT", "fd", "object-single"]
    row = cells["object-single"]
    assert row[0] == "1"
    assert row[1] == "73.0 ± 2.8"
    assert row[2] == "61.0 ± 0.7"
    assert row[3] == "-1.0 ± 0.7"
    assert row[4] == f"{100 * 13 / 31:.0f} %"
    assert row[5] == f"{100 * 18 / 19:.0f} %"
    assert row[6] == "+1.0 ± 0.7"  # 60.5 - 59.0 and 61.5 - 61.0
    assert row[7] == "50"


def test_quick_demo_and_its_reuse(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKCF_CACHE", str(tmp_path / "cache"))
    line = ["--quick", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert main(line) == 0
    assert "images/s)" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    methods = {row["method"] for row in results["rows"]}
    assert methods == {"zero-shot", "FT", "WiSE-FT", "fd", "object-single", "context-single", "random-single"}
    ends = {row["weight"]: row["id"] for row in results["rows"] if row["method"] == "WiSE-FT"}
    by_method = {row["method"]: row["id"] for row in results["rows"]}
    assert (ends[0.0], ends[1.0]) == (by_method["zero-shot"], by_method["FT"])
    for picture in ("tradeoff.png", "counterfactuals.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")

    assert main(line) == 0
    out = capsys.readouterr().out
    assert "images/s)" not in out
    assert out.count("(reused)") == 5 + 2 * 5  # runs, and WiSE-FT on both test sets
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_bad_arguments(capsys, tmp_path):
    (tmp_path / "results.json").write_text('{"version": 1, "command": "table", "measurements": {}}')
    for arguments, words in (
        (["--seeds"], "at least one seed"),
        (["--seeds", "0", "0"], "--seeds needs at least one seed, and none twice"),
        (["--seeds", "-1"], f"--seeds must be from 0 to {2**31 - 1}, got -1"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--out", str(tmp_path)], "results.json holds the results of table, not of demo: choose another --out"),
        (["--out", str(tmp_path / "results.json" / "x")], "(Not a directory): choose another --out"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err


def test_output_in_an_encoding_without_alpha(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert report_errors(lambda: print("α ± 1", flush=True) or 0) == 0
    assert written.getvalue() == b"? \xb1 1\n"


def test_training_without_arguments_is_the_demo(monkeypatch, capsys):
    from maskcf_fast.train import main as train

    monkeypatch.setattr("maskcf_fast.demo.main", lambda arguments: 7 if arguments == [] else 0)
    assert train([]) == 7
    out = capsys.readouterr().out
    assert "running the embedded demo" in out
    assert "--data.train DIR" in out


def test_picture_of_the_demo(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(demo, "plot_tradeoff", lambda path, curves, title: drawn.append(curves))
    made = demo.Demo.__new__(demo.Demo)
    made.config = demo.DemoConfig(out=tmp_path)
    monkeypatch.setattr(made, "_plot_counterfactuals", lambda: None)
    made._plot(ROWS)
    assert drawn[0]["object-single"] == [("1", [75.0, 71.0], [60.5, 61.5])]
