"""What is read back: a value of the type that was written, or a message."""

import dataclasses
import json
import os
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.schema import Range, conform, read_record
from maskcf_fast.evaluation import Measurement, Results

MEASURED = Measurement(4, 75.0, 30.1, 95.4, None, 12.5, {"cat": (2, 1), "dog": (2, 2)})
PLAIN = json.loads(json.dumps(dataclasses.asdict(MEASURED)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_a_round_through_json_gives_the_value_back():
    assert conform(PLAIN, Measurement, "here") == MEASURED


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "here: True is not int"),
        (2**70, int, "is not int"),
        (float("nan"), float, "here: nan is not float"),
        (101, Annotated[float, Range(0, 100)], r"here: 101.0 does not lie in \[0, 100\]"),
        (101, Annotated[float, Range(0, 100)] | None, r"here: 101 is not .*float, from 0 to 100\]"),
        ([1, "a"], list[int], r"here\[1\]: 'a' is not int"),
        ([1], tuple[int, int], "here: .1. is not tuple"),
        ("c", Literal["a", "b"], "here: 'c' is not"),
        ({"a": None}, dict[str, int | str], "here: a: None is not int | str"),
        ({**PLAIN, "more": 1}, Measurement, "here must have images, top1, .* it has 'images'"),
        ({**PLAIN, "top1": -1}, Measurement, r"here: top1: -1.0 does not lie"),
        ("x" * 1000, int, "…"),
    ],
)
def test_what_does_not_conform_is_named(value, hint, message):
    with pytest.raises(UserError, match=message) as info:
        conform(value, hint, "here")
    assert len(str(info.value)) < 300


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from([*PLAIN, "else"]), JSON, max_size=3), whole=JSON, nested=st.booleans())
@example(changes={"per_class": {"cat": [1]}}, whole=None, nested=True)
def test_any_results_file_is_read_or_refused_with_a_message(tmp_path, changes, whole, nested):
    file = tmp_path / "results.json"
    content = {"version": 1, "measurements": {"k": {**PLAIN, **changes}}} if nested else whole
    file.write_text(json.dumps(content))
    try:
        found = Results(file, "evaluate").find("k")
    except UserError as error:
        found, said = None, str(error)
        if str(file) not in said or "choose another --out, or remove it" not in said:
            pytest.fail(f"says not what to do: {said}")
    assert found is None or isinstance(found, Measurement)


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"\xff", b"[" * 100_000, b"3", b"mine", b"{}", b"[1]", b'{"version": 1e999}', b'{"version": 1}'),
        *(b'{"version": 7, "measurements": {}}', b'{"version": 1, "measurements": {"a": {"top1": 3}}}'),
    ],
)
def test_damaged_results_are_refused(tmp_path, damage):
    (tmp_path / "results.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"results\.json holds no results that can be continued"):
        Results(tmp_path / "results.json", "evaluate")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"[" + b" " * 100 + b"]")
    for name in ("pipe", "large"):
        with pytest.raises(UserError, match="is no regular file of at most 100 bytes"):
            read_record(tmp_path / name, Any, most=100)
