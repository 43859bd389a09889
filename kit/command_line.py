"""What every script does alike: --help is its docstring, a table is Markdown, an error is one line,
and the exit code says how it ended: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n.
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

# Ctrl-C, kill, a closed terminal; schedulers before a time limit; `ulimit -t`.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
            signal.SIGXCPU)  # fmt: skip
# These take less memory, where a script has them.
SMALLER = ("--batch-size", "--batch-sizes", "--width", "--limit-test")
parsers: list[argparse.ArgumentParser] = []  # the last is that of the script that runs


class UserError(RuntimeError):
    """What a user can mend. The message says in one line what is wrong and what to do."""


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
    """Until `stack` is closed, STOPPING call handler(signum, frame); but nohup ignores SIGHUP."""
    if threading.current_thread() is not threading.main_thread():
        return  # no handlers can be set

    def handle(signum, frame):
        for descriptor in (1, 2):
            with suppress(OSError, ValueError):  # it is closed
                if not select.select([], [descriptor], [], 0)[1]:  # a print waits for a full pipe
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        handler(signum, frame)

    for signum in STOPPING:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            stack.callback(signal.signal, signum, signal.signal(signum, handle))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, on GPU or CPU: not every library has an exception for it."""
    text = str(error).lower().replace("_", " ")
    words = ("out of memory", "allocate memory", "alloc failed", "allocation failed",
             "storage size calculation overflowed")  # fmt: skip
    return isinstance(error, MemoryError) or any(each in text for each in words)


def table(rows: list[list]) -> str:
    """In Markdown, one line per row, the first the header; aligned, for the terminal too."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


NAMES = "names have letters, digits and . _ + -, and begin with none of . -"


def is_name(text) -> bool:
    """Whether models, recipes and data sets may be called that: they name folders and figures."""
    if type(text) is not str or text[:1] in ("", ".", "-"):
        return False
    return all(c in "._+-" or unicodedata.category(c)[0] in "LMN" for c in text)


def in_one_line(error: Exception) -> str:
    words = " ".join(str(error).split())[:200] + ", out of memory" * is_out_of_memory(error)
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


@contextmanager
def noted(what: str) -> Iterator[None]:
    """A picture that fails costs a note, not a result."""
    try:
        yield
    except Exception as error:
        print(f"note: {what}: {in_one_line(error)}", file=sys.stderr)


def exit_code(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorates a script's main(argv=None): what a user can mend ends it with one line and a 1."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        sys.stderr = sys.stderr or io.StringIO()  # there is none after 2>&-
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal may know no more than ASCII
        try:
            code = main(argv) or 0
            print(end="", flush=True)  # sys.stdout is None where it was closed
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
        print(f"error: {' '.join(message.split())}", file=sys.stderr)  # a line, whatever is in it
        return 1

    return guarded
