"""Command lines of the scripts: flags from dataclasses, and one line for a user's mistake.

A field that is annotated `Annotated[float, ADVANCED]` is a flag like any other, but listed by --help-advanced only.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

T = TypeVar("T")
ADVANCED = "advanced"


class UserErrors(ValueError):
    """Several mistakes at once; the message lists them, one per line."""


@contextlib.contextmanager
def exit_on_user_error(*, each_process: bool = False) -> Iterator[None]:
    """A user's mistake (ValueError, OSError) ends the program with one line, several with a list (`UserErrors`).

    `each_process`: the mistake may be that of one process alone, so that each process prints its own.
    """
    try:
        yield
    except UserErrors as mistakes:
        exit_with_error(str(mistakes), each_process=each_process)
    except (ValueError, OSError) as mistake:
        exit_with_error(" ".join(str(mistake).split()), each_process=each_process)


def exit_with_error(message: str, *, each_process: bool = False) -> NoReturn:
    """End with exit code 1; the main process prints the message for all of them, unless each prints its own."""
    sys.exit(f"error: {message}" if each_process or os.environ.get("RANK", "0") == "0" else 1)


def parse_flags(
    config: type[T],
    arguments: Sequence[str] | None = None,
    *,
    default: T | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """An instance of the dataclass `config` from command line arguments (default: those of this process), by tyro.

    --help and --help-advanced print and exit. Raises ValueError, one line, for flags and values that are wrong.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    shown, hidden = config, 0
    if "--help-advanced" in arguments:
        arguments = ["--help"]
    elif {"-h", "--help"} & set(arguments):
        shown, hidden = _without_advanced(config, default)
    options: dict[str, Any] = {} if default is None or shown is not config else {"default": default}
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(shown, prog=prog, description=description, args=arguments, config=markers, **options)
    except SystemExit as end:
        if not end.code:
            if hidden:
                print(f"--help-advanced lists {hidden} more flags, whose defaults rarely need a change.")
            raise
    message = " ".join(re.sub("╭.*╮|[─│╰╯]", " ", stderr.getvalue()).split())  # without the frame and its title
    raise ValueError(re.sub(r"^Error parsing \w+: ", "", message))


def _without_advanced(config: type, default: Any) -> tuple[type, int]:
    """A copy of a dataclass in which tyro sees no ADVANCED field, nested ones included; and how many there are."""
    import tyro

    suppress: Any = tyro.conf.Suppress
    hints, hidden, fields = get_type_hints(config, include_extras=True), 0, []
    for field in dataclasses.fields(config):
        hint, value = hints[field.name], getattr(default, field.name, field.default)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            hint, nested = _without_advanced(hint, value)
            value, hidden = hint(), hidden + nested
        elif ADVANCED in getattr(hint, "__metadata__", ()):
            hint, hidden = suppress[hint], hidden + 1
        fields.append((field.name, hint, dataclasses.field(default=value, kw_only=True)))
    source = {"__module__": config.__module__, "__qualname__": config.__qualname__, "__doc__": config.__doc__}
    bases = (config,)  # where tyro finds the help of inherited fields
    return dataclasses.make_dataclass(config.__name__, fields, bases=bases, namespace=source, frozen=True), hidden
