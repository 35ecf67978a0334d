"""What the scripts have in common: flags from dataclasses, and a user's mistake that ends in one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UserErrors(ValueError):
    """Several mistakes at once; the message lists them, one a line."""


@contextlib.contextmanager
def exit_on_user_error(*, each_process: bool = False) -> Iterator[None]:
    """A user's mistake (ValueError, OSError) ends the program with one line, several with a list (`UserErrors`).

    `each_process`: the mistake may be one process's alone, so that each process prints its own.
    """
    try:
        yield
    except UserErrors as mistakes:
        exit_with_error(str(mistakes))
    except (ValueError, OSError) as mistake:
        exit_with_error(" ".join(str(mistake).split()), each_process=each_process)


def exit_with_error(message: str, *, each_process: bool = False) -> NoReturn:
    """End with exit code 1; one process prints the message for all of them unless each has its own."""
    sys.exit(f"error: {message}" if each_process or os.environ.get("RANK", "0") == "0" else 1)


def parse_flags(parse: Callable[[], T]) -> T:
    """Run tyro's parser, and turn the framed message with which it exits into a ValueError of one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse()
    except SystemExit as end:
        if not end.code:  # --help
            raise
    words = re.sub("[─│╭╮╰╯]", " ", stderr.getvalue()).split()
    raise ValueError(re.sub(r"^Value error Error parsing \w+: ", "", " ".join(words)))
