"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 1.0  # seconds within which a signal is the same one, come twice: from the scheduler, and from a launcher


class StopRequest:
    """Within the block, remembers the first SIGTERM, SIGUSR1 or SIGINT; a second one ends the process at once.

    Nothing is raised: a KeyboardInterrupt may come up anywhere, such as in a destructor, where Python drops it and the
    run goes on.

    Attributes:
        received: The signal, if there was one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            self._before = {number: signal.signal(number, self._handle) for number in ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # in a loader's worker process, before `outlast`
        if self.received is None:
            self.received, self._time = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._time > ECHO:
            # As the system does without us, in whatever the process is. What it was writing is not in place yet.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def outlast(_: int = 0) -> None:
    """Let a loader's worker process outlast signals that a scheduler sends to all of a run.

    The run needs it for the step that it is in, and then ends it. It is to end without a run, too: 30 seconds after a
    SIGTERM.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
