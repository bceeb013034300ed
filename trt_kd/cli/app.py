"""The commands and their order in the help."""

from collections.abc import Callable
from inspect import getdoc
from typing import Annotated

import typer

from trt_kd import __version__
from trt_kd.cli import draft, inspecting, layers, running, sensitivity, single, timing
from trt_kd.cli.console import EXIT_CODES, Commands, Settings, reported

EPILOG = f"""Try it: trt-kd run workflows/quickstart.yaml (SmolLM2-135M on a CPU, about 10 minutes).

{EXIT_CODES}"""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EPILOG,
    help="Make a large language model smaller and faster, and prove what it cost.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"trt-kd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks and library messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    """Make a large language model smaller and faster, and prove what it cost."""
    Settings.debug = debug


RECIPE_COMMANDS: list[Callable[..., None]] = [
    running.run,
    running.plan,
    running.rehearse,
    running.gate,
]
STAGE_COMMANDS: list[Callable[..., None]] = [
    single.score,
    single.latency_table,
    single.prune,
    single.search,
    single.generate,
    single.distill,
    single.quantize,
    single.export,
    draft.pair,
    single.evaluate,
    timing.benchmark,
    single.report,
]
LOOKING_COMMANDS: list[Callable[..., None]] = [
    inspecting.show,
    layers.layers,
    draft.draft,
    sensitivity.sensitivity,
    inspecting.ls,
    inspecting.doctor,
]


def _help(command: Callable[..., None]) -> str:
    """The docstring; below its first paragraph lines stay whole, for they are to be copied."""
    first, *rest = (getdoc(command) or "").split("\n\n")
    return "\n\n".join([first, *(f"\b\n{examples}" for examples in rest)])


def _add(command: Callable[..., None], name: str | None = None) -> None:
    app.command(name, help=_help(command))(reported(command))


for command in RECIPE_COMMANDS:
    _add(command)
_add(single.import_model, "import")
for command in STAGE_COMMANDS + LOOKING_COMMANDS:
    _add(command)
