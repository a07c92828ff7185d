"""An end to what might never end: reading from a disk that does not answer, or a loop without one."""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 2.0
"""After so many times the limit, code that no signal can interrupt is ended with its process."""
REMIND_S = 10.0
"""The exception is raised again and again, for who catches it and goes on."""


class Overdue(BaseException):
    """Raised in the block of :func:`time_limit`; no Exception, so that it gets past those who catch these."""


@contextmanager
def time_limit(seconds: float, *, end_process: bool) -> Iterator[None]:
    """Raise :class:`Overdue` in the block when it has taken too long, by the clock.

    Outside the main thread, which alone gets signals, only the end of the process is left.

    Args:
        end_process: end it where the block is still there after ``GRACE`` times the limit, in a library perhaps that
            never comes back; somebody must be there to start another.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    with open(os.devnull, "w") as nowhere:
        if end_process:
            faulthandler.dump_traceback_later(GRACE * seconds, exit=True, file=nowhere)
        before = signal.signal(signal.SIGALRM, _raise_overdue) if in_main_thread else None
        try:
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, seconds, REMIND_S)
            yield
        finally:
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
            if end_process:
                faulthandler.cancel_dump_traceback_later()


def _raise_overdue(_number: int, _frame: FrameType | None) -> None:
    raise Overdue
