"""The commands and their order in the help."""

from collections.abc import Callable
from typing import Annotated

import typer

from trt_kd import __version__
from trt_kd.cli import draft, inspecting, layers, running, sensitivity, single, timing
from trt_kd.cli.console import EXIT_CODES, Settings, reported

EPILOG = f"""Try it: trt-kd run workflows/quickstart.yaml (SmolLM2-135M on a CPU, about 15 minutes).

{EXIT_CODES}"""

app = typer.Typer(
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

for command in RECIPE_COMMANDS:
    app.command()(reported(command))
app.command("import")(reported(single.import_model))
for command in STAGE_COMMANDS + LOOKING_COMMANDS:
    app.command()(reported(command))
