"""What a command makes of an error: a message, or a bug's traceback."""

import importlib

import pytest

from maskcf_fast.core.errors import UserError, report_errors


@pytest.mark.parametrize(
    "error", [UserError("no such class"), OSError("disk full"), ImportError("libx.so.1 is missing", name="torchvision")]
)
def test_what_a_user_can_mend_is_one_message(capsys, error):
    def fail():
        raise error

    assert report_errors(fail) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_keeps_its_traceback():
    for bug in (
        lambda: importlib.import_module("maskcf_fast.no_such_module"),
        lambda: exec("from maskcf_fast.core import no_such_name"),
        lambda: {}["x"],
    ):
        with pytest.raises((ImportError, KeyError)):
            report_errors(bug)
