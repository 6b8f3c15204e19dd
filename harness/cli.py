"""The command line: types of flags, output that never stops a run, progress, one-line error messages."""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.machine import lost_rank, out_of_memory, rank

from tqdm import tqdm

SHOW_AFTER, LINE_EVERY = 2, 30  # seconds until progress is shown, and between its lines without a terminal


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add each default to its flag's help, but not None, which would explain nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,  # --help lists the flags once
        formatter_class=HelpFormatter,
    )
    parser.register("type", None, not_empty)  # for flags without a type
    parser.error = lambda message: fail(message, code=2)  # escapes control characters
    return parser


def not_empty(text: str) -> str:
    """Return the text, but refuse "", often an unset shell variable: as a path it means the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def number(kind: type, low: float, below: float = math.inf, above: bool = False):
    """Return an argparse type: an int or a float in [low, below), or in (low, below) with `above`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below or (above and value == low):
            least = f"{'above' if above else 'at least'} {low}"
            bound = f" and below {below}" if below < math.inf else ", and finite"
            raise argparse.ArgumentTypeError(f"{text} must be {least}{bound}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it in its own messages
    return parse


def check_values(parser: argparse.ArgumentParser, values: dict, source: str):
    """Raise ValueError unless the flags accept these values, which come from a file."""
    for action in parser._actions:
        if action.dest == "help":
            continue
        value, good = values.get(action.dest), False
        with contextlib.suppress(ValueError, TypeError, argparse.ArgumentTypeError):
            if value is None or isinstance(action.default, bool):
                good = action.dest in values and isinstance(value, type(action.default))
            else:
                good = (action.type or str)(str(value)) == value and value in (action.choices or [value])
        if not good:
            raise ValueError(f"{source} was not written by this project: its {action.option_strings[0]} is {value!r}")


def say(*lines: str, error: bool = False):
    """Print lines and flush. If the output is a closed pipe or a full disk, drop them: they must not stop a run.

    Control characters are escaped, so that a name cannot start a new line.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
        print("\n".join(map(printable, lines)), file=stream, flush=True)
    except (OSError, ValueError, AttributeError):
        drop_output(error)


def drop_output(error: bool):
    """Discard all further output; otherwise Python would fail on the same stream again at exit."""
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open until Python ends
    if error:
        sys.stderr = nowhere
    else:
        sys.stdout = nowhere


def progress(items: Iterable, what: str, count: int | None = None) -> Iterator:
    """Yield the items; if this takes long, rank 0 shows a progress bar or, without a terminal, lines."""
    if rank() > 0:
        yield from items
        return
    count, due = len(items) if count is None else count, time.monotonic() + SHOW_AFTER
    bar = tqdm(items, what, count, leave=False, delay=SHOW_AFTER, disable=None)
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and done < count and time.monotonic() > due:
            say(f"{what}: {done:,} of {count:,}", error=True)
            due = time.monotonic() + LINE_EVERY


@contextlib.contextmanager
def user_errors():
    """Turn a user's mistake (ValueError, OSError), NaN in a model or a lack of memory into one line and exit code 2.

    Exit code 1 if another rank has died, 130 after Ctrl-C.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error), code=2)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            fail("out of memory; use a smaller model, smaller images, or fewer at a time", code=2)
        if lost_rank(error):
            fail("another process of this run has ended", code=1)
        raise
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def fail(message: str, code: int):
    say(f"{Path(sys.argv[0]).name}: error: {message}", error=True)
    sys.exit(code)


def command(script: str, *words: str | Path, start: str = "") -> str:
    """Return the command that runs a script of the project from here, by default with this Python."""
    words = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    path = Path(__file__).parents[1] / script
    with contextlib.suppress(ValueError, OSError):  # Windows: on another drive; or the working directory is gone
        path = os.path.relpath(path)
    return f"{start or shell_words(sys.executable)} {shell_words(path, *words)}"


def shell_words(*words: str | Path) -> str:
    """Join words for a shell. A word that cannot be printed becomes $'...' with bytes escaped, for bash and zsh."""
    words = map(str, words)
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{escape_bytes(word)}'" for word in words)


def escape_bytes(word: str) -> str:
    plain = {c for c in word if c.isprintable()} - set("\\'")
    return "".join(c if c in plain else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in word)


def printable(name) -> str:
    """Escape the control characters and the invalid UTF-8 of a file name, so that it can be printed."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def abbreviate(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
