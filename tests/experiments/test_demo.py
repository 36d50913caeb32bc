"""The demo in its shortened form, and the arithmetic of its table."""

import io
import json
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from maskcf_fast.core.errors import report_errors
from maskcf_fast.demo import main
from maskcf_fast.experiments.demo import CEILING, ROWS, markdown, on_curve
from maskcf_fast.experiments.demo_data import TINTS
from maskcf_fast.experiments.table import TableRow
from maskcf_fast.visualization.plots import COLOURS

ACCURACIES = {
    "zero-shot": [(60.0, 62.0), (60.0, 62.0)],
    "ft": [(90.0, 42.0), (92.0, 44.0)],
    "fd 1": [(80.0, 58.0), (82.0, 60.0)],
    "object-single 1": [(75.0, 60.5), (71.0, 61.5)],
    CEILING: [(85.0, 85.0), (86.0, 86.0)],
}
FOUND = [
    TableRow(name, seed, {"id": pair[0], "ood": pair[1]})
    for name, pairs in ACCURACIES.items()
    for seed, pair in enumerate(pairs)
]


@pytest.mark.parametrize(("at", "expected"), [(75, 59), (85, 50), (99, 42), (5, 62)])
def test_line_through_feature_distillation(at, expected):
    """At 75: three quarters of the way from 62 to 58."""
    assert on_curve(FOUND, TableRow("x", 0, {"id": at})) == pytest.approx(expected)


def test_table():
    lines = markdown(FOUND).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == list(ACCURACIES)
    assert cells["zero-shot"] == ["60.0 ± 0.0", "62.0 ± 0.0", "", "", ""]
    # 60.5 - 59.0 and 61.5 - 61.0
    assert cells["object-single 1"] == ["73.0 ± 2.8", "61.0 ± 0.7", "+13.0", "-1.0", "+1.0 ± 0.7"]
    assert {name: row[4] for name, row in cells.items() if "object" not in name} == dict.fromkeys(
        ("zero-shot", "ft", "fd 1", CEILING), ""
    )


def test_quick_demo_and_its_reuse(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKCF_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    line = ["--quick", "--out", str(out), "--threads", "1", "--seeds", "0"]
    assert main(line) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "demo"
    methods = [row["method"] for row in results["rows"]]
    assert methods == [row.replace(":", " ").replace("wise-ft", "wise-ft α 0.5") for row in ROWS] + [CEILING]
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(methods) <= 10
    _check_picture(out / "demo.png")

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(written) == 1 + 6  # pre-trained, and fine-tuned
    assert main(line) == 0
    assert "(reused)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "results.json").read_text()) == results
    (no_cue,) = [path for path in out.rglob("config.yaml") if "no-cue" in path.parent.name]
    assert "/no_cue" in no_cue.read_text()


def _check_picture(path):
    """The tint of every class above, masks in orange below, and the accuracies beside them."""
    pixels = np.rint(imread(path)[..., :3] * 255).astype(int)
    height, width = len(pixels) // 2, pixels.shape[1] // 2
    above, below, chart = pixels[:height, :width], pixels[height:, :width], pixels[:, width:]
    for tint in TINTS:
        brightness = above @ tint / (tint @ tint)
        near = np.abs(above - brightness[..., None] * tint).sum(axis=2) < 30
        assert (near & (brightness > 50) & (brightness < 230)).sum() > 50
    assert (np.abs(below - (230, 97, 1)).sum(axis=2) < 150).mean() > 0.005
    for colour in COLOURS[:3]:
        assert (np.abs(chart - np.rint(np.multiply(to_rgb(colour), 255))).sum(axis=2) < 10).sum() > 20


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
