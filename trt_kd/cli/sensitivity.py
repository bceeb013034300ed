"""What every layer costs in a low-bit format, each one quantized alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trt_kd.cli.console import duration, print_json, size, table
from trt_kd.cli.staging import JsonOption, Settings, Source, run_stage, validated
from trt_kd.errors import ConfigError

if TYPE_CHECKING:
    from trt_kd.stages.sensitivity import SensitivityConfig


def sensitivity(
    settings: Settings = None,
    *,
    source: Source,
    out: Annotated[Path | None, typer.Option(help="Folder of the new artifact.")] = None,
    formats: Annotated[
        str, typer.Option(help="Formats without options, such as fp8,int8.", show_default=False)
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost; measure nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cost by layer. Example: trt-kd sensitivity --source t --out sens --formats fp8,int8.

    With options: trt-kd sensitivity --source t --out s 'formats=[{kind: int4_awq, block_size: 64}]'
    """
    from trt_kd.stages.sensitivity import SensitivityConfig

    given = [*(settings or []), *([f"formats=[{formats}]"] if formats else [])]
    if dry_run:
        if out is not None:
            raise ConfigError("--dry-run writes nothing", hint="leave out --out")
        _print_cost(validated(SensitivityConfig, given, None, "sensitivity"), source, as_json)
        return
    if out is None:
        raise ConfigError("where to?", hint="give --out FOLDER, or --dry-run to look first")
    made = run_stage("sensitivity", given, None, out, {"source": source})
    if as_json:
        print_json(made.manifest.model_dump(mode="json"))
        return
    _print_table(out)


def _print_table(out: Path) -> None:
    import json

    from trt_kd.reporting.sensitivity_figure import sensitivity_rows
    from trt_kd.stages.sensitivity import FIGURE, FILE

    costs = json.loads((out / FILE).read_text(encoding="utf-8"))["formats"]
    print("KL to the original in nats per token, one layer quantized at a time\n")
    print(table(sensitivity_rows(costs)))
    print(f"\nfigure: {out / FIGURE}")


def _print_cost(config: "SensitivityConfig", source: Path, as_json: bool) -> None:
    """Say what the work would take, from ``config.json`` alone."""
    from trt_kd.pipeline.estimate import BASE_MEMORY_BYTES, forward_s

    shape = config.check(source)
    cost = {
        "cells": len(config.cells(shape)),
        "tokens": config.tokens(shape),
        "time_s": forward_s(shape, config.tokens(shape)),
        "memory_bytes": BASE_MEMORY_BYTES + config.memory_bytes(shape),
    }
    if as_json:
        print_json({"schema_version": 1, **cost})
        return
    print(f"{cost['cells']} measurements, {cost['tokens']:,} tokens through the model")
    print(f"about {duration(cost['time_s'])} here and {size(cost['memory_bytes'])} of memory")
