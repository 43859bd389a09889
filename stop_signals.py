"""SIGINT (Ctrl-C) and SIGTERM: finish the step, then leave."""

import contextlib
import signal
import threading

import parallel


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; `signal` says which."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)


@contextlib.contextmanager
def watch_signals():
    """Within the block SIGINT and SIGTERM are remembered; calling the yielded function raises
    Stopped if there was one. (Raised in the handler itself, the exception would come out of any
    line at all, and some, such as weak-reference callbacks, swallow it.)
    """
    arrived = []

    def leave_if_stopped():
        if parallel.any_of(bool(arrived)):
            raise Stopped(arrived[0] if arrived else signal.SIGTERM)

    before = {}
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, lambda signum, frame: arrived.append(signum))
    try:
        yield leave_if_stopped
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
