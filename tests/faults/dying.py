"""``python dying.py MODULE.FUNCTION N ARGUMENTS…``: the train command, killed as it is about to call a function again.

A named point in a run's life, with ``kill -9`` at the N-th time that it comes by.
"""

import importlib
import os
import signal
import sys


def main() -> int:
    """Patch, then run the command."""
    point, count, *arguments = sys.argv[1:]
    module_name, _, name = point.rpartition(".")
    module = importlib.import_module(module_name)
    real, calls = getattr(module, name), 0

    def dying(*args, **options):
        nonlocal calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(module, name, dying)
    from maskcf_fast.train import main as train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(main())
