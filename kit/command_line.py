"""Conventions of all scripts: --help is the docstring, tables are Markdown, an error is one line.
Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n.
"""

import argparse
import functools
import io
import os
import select
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

# Ctrl-C, kill, a closed terminal; a scheduler's warning before a time limit; `ulimit -t`.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
            signal.SIGXCPU)  # fmt: skip
# Lowering these saves memory, if a script has them.
SMALLER = ("--batch-size", "--batch-sizes", "--width", "--limit-test")
parsers: list[argparse.ArgumentParser] = []  # the last one is the running script's


class UserError(RuntimeError):
    """Users can fix it: the one-line message says what is wrong and what to do."""


class Stopped(Exception):
    """A signal arrived, and everything is saved."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers.append(parser)
    return parser


def handle_signals(handler: Callable, stack: ExitStack) -> None:
    """Until `stack` is closed, STOPPING call `handler`; SIGHUP stays ignored under nohup."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can set handlers

    def handle(signum, frame):
        for descriptor in (1, 2):
            with suppress(OSError, ValueError):  # it is closed
                if not select.select([], [descriptor], [], 0)[1]:  # a full pipe: print would block
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        handler(signum, frame)

    for signum in STOPPING:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            stack.callback(signal.signal, signum, signal.signal(signum, handle))


def is_out_of_memory(error: Exception) -> bool:
    """Whether GPU or CPU ran out of memory: not every library has an exception for it."""
    text = str(error).lower().replace("_", " ")
    words = ("out of memory", "allocate memory", "alloc failed", "allocation failed",
             "storage size calculation overflowed")  # fmt: skip
    return isinstance(error, MemoryError) or any(each in text for each in words)


def table(rows: list[list]) -> str:
    """A Markdown table, aligned for the terminal. The first row is the header."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


NAMES = "names have letters, digits and . _ + -, and begin with none of . -"


def is_name(text) -> bool:
    """Whether it is a valid name for models, recipes, data sets, and so folders and figures."""
    if type(text) is not str or text[:1] in ("", ".", "-"):
        return False
    return all(c in "._+-" or unicodedata.category(c)[0] in "LMN" for c in text)


def in_one_line(error: Exception) -> str:
    words = " ".join(str(error).split())[:200] + ", out of memory" * is_out_of_memory(error)
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Exceptions become notes: a picture is optional."""
    try:
        yield
    except Exception as error:
        print(f"note: {what}: {in_one_line(error)}", file=sys.stderr)


def exit_code(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorates a script's main(argv=None): expected errors end it with one line and a 1."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        sys.stderr = sys.stderr or io.StringIO()  # None after 2>&-
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # for ASCII terminals
        try:
            code = main(argv) or 0
            print(end="", flush=True)  # not sys.stdout.flush(): it may be None
            return code
        except Stopped as stopped:
            return 128 + stopped.signal
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (UserError, OSError) as error:
            message = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            flags = [f for f in SMALLER if parsers and f in parsers[-1]._option_string_actions]
            message = f"out of memory: try a smaller {' or '.join(flags[:2]) or 'model'}"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)  # one line, always
        return 1

    return guarded
