"""Floor 6: the parts of a command line that need no JAX, so that `--help` answers at once.

A study is a frozen dataclass of options and a function of it:

    if __name__ == "__main__":
        sys.exit(cli.main(study, Config))

Whatever imports JAX is imported inside `study`. An error that a user can mend is one line on the standard error, and exit code 2.
"""

import contextlib
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["data_directory", "main", "parse"]

Config = TypeVar("Config")

_DEBUG = "JAXOPT_LAB_DEBUG"
_DATA = "JAXOPT_LAB_DATA"


def parse(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Reads options into a frozen dataclass: one `--name-with-dashes` a field, its docstring the help.

    Args:
      config_class: a dataclass; its docstring heads the help.
      argv: the arguments after the program's name; None takes the program's own. A `--debug` among them belongs to `main`.

    Raises:
      SystemExit: after the help (code 0), or after one line about an argument that does not fit (code 2).

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Options:
    ...     steps: int = 10
    >>> parse(Options, ["--steps", "20"])
    Options(steps=20)
    """
    import tyro

    given = [argument for argument in (sys.argv[1:] if argv is None else argv) if argument != "--debug"]
    about = f"{inspect.getdoc(config_class) or ''}\n\nWith --debug, or {_DEBUG}=1, an error shows where it was raised."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, args=given, description=about)
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def main(study: Callable[[Config], Any], config_class: type[Config], argv: Sequence[str] | None = None) -> int:
    """Parses the options, runs the study, and turns the errors that a user can mend into one line.

    Those are the `ValueError` and `TypeError` that this package or the study itself raises, and every `OSError` (a missing file, a
    full disk). Any other exception is a fault of the program and keeps its traceback; `--debug` or `JAXOPT_LAB_DEBUG=1` shows that
    of any.

    Args:
      study: takes the options; what it returns is not used.
      config_class: as in `parse`.
      argv: as in `parse`.

    Returns:
      The exit code: 0; 2 after an error of one line; 130 after Ctrl-C.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Options:
    ...     steps: int = 10
    >>> main(lambda options: print("training for", options.steps), Options, [])
    training for 10
    0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    config = parse(config_class, arguments)
    debug = "--debug" in arguments or os.environ.get(_DEBUG, "0") not in ("", "0")
    try:
        study(config)
    except (ValueError, TypeError, OSError) as error:
        if not isinstance(error, OSError) and not _ours(error.__traceback__, study):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def data_directory(given: Path | None) -> Path | None:
    """The directory of the user's data sets: the option if it was given, else `JAXOPT_LAB_DATA` in the environment, else None.

    >>> data_directory(Path("mnist"))
    PosixPath('mnist')
    """
    if given is not None:
        return given
    named = os.environ.get(_DATA)
    return Path(named) if named else None


def _ours(trace: TracebackType | None, study: Callable[..., Any]) -> bool:
    """Whether an exception was raised by this package or by the file of the study: by the last frame of its traceback."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0] or module == study.__module__


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _one_line(said: str) -> str:
    """The message that tyro draws in a frame, or above rules where there is no UTF-8: its first paragraph, and the option meant."""
    paragraphs: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines():
        body = line.strip().strip("│").strip()
        # The title stands in the frame's upper edge, or above a rule.
        if not body or body.startswith(("╭", "╰")):
            continue
        if set(body) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(body)
    if "╭" not in said:
        paragraphs = paragraphs[1:] or paragraphs
    message = " ".join(paragraphs[0]).rstrip(".") or "the arguments do not fit"
    meant = next((p[1] for p in paragraphs[1:] if len(p) > 1 and p[0].startswith("Perhaps you meant")), None)
    return message + (f"; perhaps you meant {meant}" if meant else "") + "; --help lists the options"
