"""Time artifacts: against each other, or each for itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trt_kd.cli.console import print_json, table
from trt_kd.cli.staging import Config, JsonOption, Settings, roles_of, run_stage
from trt_kd.errors import ConfigError

if TYPE_CHECKING:
    from trt_kd.reporting.speed import Timed


def benchmark(
    settings: Settings = None,
    *,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="ROLE=FOLDER, once for each artifact.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two artifacts: print how B compares with A."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new artifact.")] = None,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Time artifacts in turns. Example: trt-kd benchmark --input a=e1 --input b=e2 --out b.

    How much faster: trt-kd benchmark --compare e1 e2 'batch_sizes=[1, 8]' repeats=10
    """
    import json

    from trt_kd.reporting.speed import timed

    if (inputs is None) == (compare is None):
        raise ConfigError("what is measured?", hint="give either --input or --compare A B")
    if compare is not None:
        _compare(compare, settings, config, out, as_json)
        return
    if out is None:
        raise ConfigError("where to?", hint="give --out FOLDER")
    made = run_stage("benchmark", settings, config, out, roles_of(inputs or []))
    if as_json:
        print_json(made.manifest.model_dump(mode="json"))
        return
    content = json.loads((made.path / "benchmark.json").read_text(encoding="utf-8"))
    _print_records(timed(content))
    print(f"\nbenchmark {made.key[:12]} in {out}")
    for figure in sorted(made.path.glob("*.svg")):
        print(f"figure: {out / figure.name}")


def _compare(
    pair: tuple[Path, Path],
    settings: list[str] | None,
    config: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure both in turns and print the ratios; without ``out`` nothing else is kept."""
    import json
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from trt_kd.reporting.comparison import compare

    with TemporaryDirectory() as scratch:
        target = out or Path(scratch) / "benchmark"
        made = run_stage("benchmark", settings, config, target, dict(zip("AB", pair, strict=True)))
        found = compare(made, "A", "B")
        if as_json:
            content = json.loads((made.path / "benchmark.json").read_text(encoding="utf-8"))
            compared = {name: str(path) for name, path in zip("AB", pair, strict=True)}
            ratios = [asdict(each) for each in found]
            print_json({"compared": compared, "ratios_b_to_a": ratios, "benchmark": content})
            return
    rows = [["batch", "in + out", "metric", "B / A", "95 % interval", "rounds", ""]]
    for each in found:
        known = each.ratio is not None
        interval = f"{each.low:.3f} to {each.high:.3f}" if known else "-"
        note = each.reason or ("" if each.steady else "not steady: no verdict")
        ratio = f"{each.ratio:.3f}" if known else "-"
        lengths = f"{each.input_tokens} + {each.output_tokens}"
        rows.append(
            [str(each.batch_size), lengths, each.metric, ratio, interval, str(each.pairs), note]
        )
    print(table(rows))


def _print_records(found: "Timed") -> None:
    """A row for every workload, and for every load with what of it met the limits."""
    from trt_kd.reporting.formatting import MISSING, fixed, significant
    from trt_kd.reporting.readings import load_text

    rows = [["variant", "batch", "in + out", "TTFT p50 ms", "ITL p50 ms", "tok/s", "of floor", ""]]
    for name, records in found.speed.items():
        for one in records:
            if one.under_load:
                continue
            floor = one.decode_floor_ms
            share = f"{fixed(100 * floor / one.itl_ms.p50, 0)} %" if floor and one.itl_ms else ""
            rows.append([
                name, str(one.batch_size), f"{one.input_tokens} + {one.output_tokens}",
                significant(one.ttft_ms.p50),
                significant(one.itl_ms.p50) if one.itl_ms else MISSING,
                significant(one.output_tokens_per_s), share,
                "" if one.steady is not False else "not steady",
            ])  # fmt: skip
    if len(rows) > 1:
        print(table(rows))
    rows = [["variant", "load", "TTFT p50 ms", "TPOT p50 ms", "tok/s", "requests/s", "goodput/s"]]
    for name, loads in found.load.items():
        for each in loads:
            rates = (each.requests_per_s, each.goodput_requests_per_s)
            rows.append([
                name, load_text(each), significant(each.ttft_ms.p50),
                significant(each.tpot_ms.p50), significant(each.output_tokens_per_s),
                *(MISSING if rate is None else significant(rate) for rate in rates),
            ])  # fmt: skip
    if len(rows) > 1:
        print(table(rows))
    for sentence in found.failures:
        print(sentence)
