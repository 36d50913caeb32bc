"""Which implementation and which tiles are taken, per op, dtype and generation of GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from maskcf_fast.ops import extension, info, tuning
from maskcf_fast.ops.dispatch import resolve

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Behave as on a GPU of some compute capability, with the whole extension."""
    monkeypatch.setattr(extension, "why_not", lambda part, op: None)
    return lambda *capability: monkeypatch.setattr(tuning, "capability", lambda device: capability)


@pytest.mark.parametrize(
    ("op", "dtype", "capability", "chosen"),
    [
        ("relevance", torch.bfloat16, (9, 0), "triton"),
        ("relevance", torch.float16, (12, 0), "triton"),  # as what is known of an older generation
        ("relevance", torch.bfloat16, (8, 9), "cuda"),
        ("relevance", torch.float32, (9, 0), "cuda"),
        ("refill", torch.bfloat16, (9, 0), "cuda"),
        ("gather", None, (7, 5), "cuda"),
    ],
)
def test_auto_takes_what_is_preferred_here(gpu, op, dtype, capability, chosen):
    gpu(*capability)
    assert resolve(f"maskcf_fast.ops.{op}", "auto", GPU, dtype=dtype) == chosen


def test_info_names_what_is_taken_by_dtype(gpu):
    gpu(9, 0)
    lines = [" ".join(line.split()) for line in info.table("cuda")]
    assert {"relevance cuda yes (auto for float32)", "relevance triton yes (auto for half precision)"} <= {*lines}
    assert "refill cuda yes (auto)" in lines


def test_auto_goes_on_to_what_can_run(gpu, monkeypatch):
    gpu(8, 0)
    monkeypatch.setattr(extension, "why_not", lambda part, op: "not built")
    assert resolve("maskcf_fast.ops.relevance", "auto", GPU, dtype=torch.float32) == "triton"


def row(op, dtypes, capability, order):
    return {"op": op, "dtypes": dtypes, "capability": capability, "order": order, "why": "measured"}


def test_the_most_special_row_and_the_newest_generation_win(gpu, monkeypatch):
    rows = [
        row(None, [], [0, 0], ["cuda", "triton"]),
        row("select", [], [8, 0], ["triton", "cuda"]),
        row("select", ["float32"], [9, 0], ["cuda", "triton"]),
        row("select", ["float32"], [10, 0], ["triton"]),
    ]
    monkeypatch.setattr(tuning, "table", lambda: {"orders": rows})
    for capability, dtype, first in (
        ((7, 5), torch.float32, "cuda"),
        ((8, 0), torch.float32, "triton"),
        ((9, 0), torch.float32, "cuda"),
        ((9, 0), torch.float64, "triton"),
        ((10, 3), torch.float32, "triton"),
    ):
        gpu(*capability)
        assert tuning.order("select", dtype, GPU)[0] == first


def test_every_row_has_a_reason_and_the_file_is_as_it_is_written():
    table = tuning.table()
    assert tuning.FILE.read_text() == tuning.to_json(table)
    assert all(row["why"] for rows in table.values() for row in rows)


def test_rows_are_put_in_place_of_those_for_the_same():
    table = tuning.table()
    old = table["tiles"][0]
    newer, other = old | {"tiles": {"UNITS": 256, "num_warps": 8}}, old | {"capability": [9, 0]}
    merged = tuning.with_rows(table, "tiles", [newer, other])["tiles"]
    assert merged[0] == newer
    assert merged[-1] == other
    assert len(merged) == len(table["tiles"]) + 1


def test_another_file_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "table", tuning.table.__wrapped__)
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("MASKCF_TUNING", str(path))
    changed = tuning.FILE.read_text().replace('"BLOCK": 2048, "num_warps": 4', '"BLOCK": 1024, "num_warps": 2')
    path.write_text(changed)
    assert tuning.tiles("patchify", torch.device("cpu")) == {"BLOCK": 1024, "num_warps": 2}
    for text in ("{}", "[1]", "no JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tuning\.json is no table .* unset MASKCF_TUNING"):
            tuning.table()


def test_the_capability_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(tuning, "capability", tuning.capability.__wrapped__)
    fake = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (9, 0))
    monkeypatch.setattr(torch, "cuda", fake)
    assert tuning.capability(GPU) == (9, 0)
    assert tuning.capability(torch.device("cpu")) == (0, 0)
    assert json.dumps(tuning.tiles("gather", GPU)) == json.dumps(tuning.tiles("gather", torch.device("cpu")))
