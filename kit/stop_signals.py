"""Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP): finish the step, save, then leave.

Before the first step there is nothing to save: leave at once. nohup's SIGHUP stays ignored.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from kit import parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """One of SIGNALS arrived; `signal` says which."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)


@contextlib.contextmanager
def watch_signals():
    """Within the block SIGNALS are remembered; calling the yielded function raises Stopped if there
    was one. (Raised in the handler itself, the exception would come out of any line at all, and
    some, such as weak-reference callbacks, swallow it.)
    """
    arrived = []

    def leave_if_stopped():
        if parallel.any_of(bool(arrived)):
            raise Stopped(arrived[0] if arrived else signal.SIGTERM)

    with handled_by(lambda signum, frame: arrived.append(signum)):
        yield leave_if_stopped


def leaving_at_once(tidy_up: Callable[[], None]):
    """Within the block SIGNALS end the process after a call of `tidy_up`."""

    def leave(signum, frame):
        tidy_up()
        os._exit(128 + signum)  # not sys.exit: it raises an exception, which may be swallowed

    return handled_by(leave)


@contextlib.contextmanager
def handled_by(handler):
    """Within the block, SIGNALS call handler(signum, frame)."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        for signum in SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
