"""The table: its runs, their reuse, and what it prints; its test sets are in evaluation/test_table_sets.py."""

import json
import os
import subprocess
import sys

import pytest

from maskcf_fast.table import METHODS, TRAINED, TableRow, main, markdown
from maskcf_fast.training.config import find_yaml


def test_markdown():
    rows = [
        TableRow("ft", 0, {"id": 80.0, "v2": 60.0, "a": 20.0}),
        TableRow("ft", 1, {"id": 82.0, "v2": 64.0, "a": 20.0}),
        TableRow("soup", None, {"id": 83.0, "v2": 62.0, "a": 30.0}),
    ]
    assert markdown(rows, "id").splitlines() == [
        "| method | id (ID) | v2 | a | OOD average |",
        "|---|--:|--:|--:|--:|",
        "| ft | 81.0 ± 1.4 | 62.0 ± 2.8 | 20.0 ± 0.0 | 41.0 ± 1.4 |",
        "| soup | 83.0 | 62.0 | 30.0 | 46.0 |",
    ]
    assert markdown(rows, "v2").splitlines()[::4] == [
        "| method | v2 (ID) | id | a | OOD average |",
    ]
    assert rows[0].shifted("v2") == 50.0


@pytest.fixture
def line(image_folders, weights, tmp_path):
    f = image_folders
    return [
        *("--data.train", str(f["train"]), "--data.id", str(f["id"]), "--data.ood", str(f["ood"])),
        *("--data.backend", "torch", "--data.threads", "0", "--model.arch", "tiny", "--model.weights", str(weights)),
        *("--optim.epochs", "1", "--optim.batch-size", "12", "--device", "cpu", "--out", str(tmp_path / "table")),
    ]


def test_runs_are_reused_and_derived_rows_agree(line, tmp_path):
    chosen = ["--methods", "zero-shot", "lp-ft", "ft", "wise-ft", "ensemble", "soup", "--alphas", "0", "1"]
    assert main([*line, *chosen, "--seeds", "0"]) == 0
    out = tmp_path / "table"
    results = json.loads((out / "table.json").read_text())
    found = {row["method"]: row["accuracy"] for row in results["rows"]}
    assert found["wise-ft α 0"] == found["zero-shot"]
    assert found["wise-ft α 1"] == found["soup"] == found["ft"]
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert {path.parent.name for path in written} == {"lp-seed0", "ft-seed0", "lp-ft-seed0"}
    assert main([*line, *chosen, "--seeds", "0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "table.json").read_text()) == results
    assert results["id"] == "id"
    logged = [json.loads(line) for line in (out / "ft-seed0" / "metrics.jsonl").read_text().splitlines()]
    by_step = [{name: line[f"accuracy/{name}"] for name in ("id", "ood")} for line in logged if "accuracy/id" in line]
    assert (found["zero-shot"], found["ft"]) == (by_step[0], by_step[-1])  # as the trainer measured them


def test_several_processes(line, tmp_path):
    """They train and measure together; one process measures the same on the runs that they leave."""
    chosen = ["--methods", "lp-ft", "ft", "wise-ft", "soup", "--seeds", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "--", "maskcf_fast.table", *line, *chosen]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| method | id (ID) | ood | OOD average |") == 1
    out = tmp_path / "table"
    together = json.loads((out / "table.json").read_text())
    (out / "results.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert main([*line, *chosen]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "table.json").read_text()) == together


def test_other_settings_are_refused(line, capsys):
    chosen = ["--methods", "ft", "--seeds", "0"]
    assert main([*line, *chosen]) == 0
    assert main([*line, *chosen, "--optim.lr", "0.5"]) == 1
    assert "--optim.lr (was 3e-05, is 0.5)" in capsys.readouterr().err


def test_mistakes(line, capsys):
    for arguments, message in (
        (["--methods", "objct-single"], "did you mean 'object-single'?"),
        (["--seeds", "1", "1"], "--seeds needs at least one, and none twice"),
        (["--alphas", "1.5"], "[0, 1], got 1.5"),
        (["--quick"], "add --demo"),
    ):
        assert main([*line, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_every_trained_method_has_a_preset():
    assert len(METHODS) == len(TRAINED) + 4
    for method in set(TRAINED) - {"lp-ft"}:
        assert find_yaml(method).stem == method
