"""What every command shares: two-line errors, exit codes, quiet libraries, JSON output."""

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from trt_kd.errors import TrtKdError

_UsageError: Any = typer.BadParameter.__base__  # click's, or that of a typer which holds its own
P = ParamSpec("P")
R = TypeVar("R")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]

EXIT_CODES = """Exit codes: 0 done (gate: pass); 1 a defect, or gate: fail; 2 something to correct,
said in two lines; 3 gate: undecided; 130 interrupted, run again to resume."""


class Settings:
    """Choices of the whole command line."""

    debug = False


class Commands(TyperGroup):
    """The commands; a command line that cannot be read is told in two lines like every mistake."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """See the base class."""
        alone, extra["standalone_mode"] = extra.get("standalone_mode", True), False
        if not alone:
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **extra)
        except _UsageError as error:
            context, message = error.ctx, error.format_message()
            if context is None or message == context.get_help():  # nothing was asked for
                error.show()
            else:
                message = message.partition("\n")[0].rstrip(".")
                print(f"error: {message[:1].lower()}{message[1:]}", file=sys.stderr)
                print(f"  hint: {context.command_path} --help", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Print a fixable error as two lines with exit code 2 instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        prepare_logging()
        try:
            return command(*args, **kwargs)
        except TrtKdError as error:
            if Settings.debug:
                raise
            print(f"{_who()}error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            raise typer.Exit(130) from error

    return wrapped


def _who() -> str:
    """Name of this process where a launcher started several; process 0 speaks for all."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def prepare_logging() -> None:
    """Our own progress on standard error; other libraries' chatter only with ``--debug``."""
    ours = logging.getLogger("trt_kd")
    normal = logging.WARNING if _who() else logging.INFO
    ours.setLevel(logging.DEBUG if Settings.debug else normal)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
        ours.propagate = False
    if not Settings.debug:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if not sys.stderr.isatty():
            quiet["TQDM_DISABLE"] = "1"
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, for a program to read."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: list[list[str]]) -> str:
    """Align ``rows`` (the first is the heading) in columns: names left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in {"", "?", "<"}


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86400:,.0f} days"


def size(count: float | None) -> str:
    """Bytes as a person would say them."""
    if count is None:
        return "?"
    if count < 1e6:
        return "<1 MB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
