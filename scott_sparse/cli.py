"""What the scripts have in common: flags from dataclasses, and mistakes that end in one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable

from scott_sparse.data.dataset import UnreadableImages


@contextlib.contextmanager
def plain_errors(*, each: bool = False):
    """A user's mistake (ValueError, OSError) ends the program with one line, unreadable images with a list of them.

    `each`: it may be one process's alone, so that each says its own.
    """
    try:
        yield
    except UnreadableImages as mistake:
        stop(str(mistake))
    except (ValueError, OSError) as mistake:
        stop(" ".join(str(mistake).split()), each=each)


def stop(mistake: str, *, each: bool = False) -> None:
    """End, with one process's word for all of them unless each has its own."""
    sys.exit(f"error: {mistake}" if each or os.environ.get("RANK", "0") == "0" else 1)


def quietly(parse_arguments: Callable):
    """Run tyro's parser, and turn the framed message with which it exits into a ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_arguments()
    except SystemExit as end:
        if not end.code:  # --help
            raise
    words = re.sub("[─│╭╮╰╯]", " ", said.getvalue()).split()
    raise ValueError(re.sub(r"^Value error Error parsing \w+: ", "", " ".join(words)))
