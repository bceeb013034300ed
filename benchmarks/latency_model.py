"""How well times of models that were never built are predicted, on the runtime that ships.

    python benchmarks/latency_model.py [--teacher CHECKPOINT] [--unseen 20] [--work DIR]

Builds the latency table of the quickstart's teacher in ONNX Runtime GenAI int4, then exports and
times architectures around it that no table has seen, in turns with the teacher, and compares.
Without --teacher the quickstart's is imported. What is finished in the work folder is not made
again. Prints a table, then one line of JSON.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from search_quality import teacher_of
from showing import shown

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact, piece
from trt_kd.artifacts.environment import environment
from trt_kd.config import build_plugin, validate
from trt_kd.exporters import EXPORTERS
from trt_kd.latency.operators import METRICS
from trt_kd.latency.table import LatencyTable, Row, drift_corrected, read_table
from trt_kd.measuring.progress import progress
from trt_kd.stages.latency import LatencyConfig, latency
from trt_kd.stages.twins import CELLS, SOURCE, Stand, untested_export

RECIPE = Path(__file__).parents[1] / "workflows" / "quickstart.yaml"
AXES = ["ffn", "heads", "kv_heads", "depth"]
LANE = {"kind": "ort-genai", "precision": "int4"}
NAME = "measured"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="error of predicted latencies")
    parser.add_argument("--teacher", type=Path, help="checkpoint artifact; else the quickstart's")
    parser.add_argument("--work", type=Path, default=Path("runs/latency-model"))
    parser.add_argument(
        "--lane", type=yaml.safe_load, default=LANE, help="exporter, as in a recipe"
    )
    parser.add_argument("--axes", nargs="+", default=AXES, help="what is cut")
    parser.add_argument("--unseen", type=int, default=20, help="architectures to predict")
    parser.add_argument("--probes", type=int, default=14, help="architectures in the table")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    return shown(lambda: compare(given), table)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Make the table, time what it has not seen, predict it."""
    teacher = teacher_of(given)
    config = validate(
        LatencyConfig,
        {
            "axes": given.axes,
            "lanes": {NAME: given.lane},
            "batch_sizes": given.batch_sizes,
            "input_tokens": given.input_tokens,
            "output_tokens": given.output_tokens,
            "probes": given.probes,
            "repeats": given.repeats,
        },
        where="latency",
    )
    place = given.work / "table"
    made = Artifact.open(place) if place.is_dir() else latency(config, source=teacher, out=place)
    seen = read_table(made.path)
    rows = timed(config, teacher, seen, given)
    model = seen.model(NAME)
    found = [
        {
            "sizes": row.sizes,
            "metric": metric,
            "batch_size": cell.batch_size,
            "measured_ms": getattr(cell, metric)["p50"],
            "predicted_ms": model.predict(
                metric, seen.shape.with_sizes(**row.sizes), cell.batch_size
            ),
            "stated_error": model.error(metric, cell.batch_size),
        }
        for row in rows
        for cell in row.cells
        for metric in METRICS
    ]
    for one in found:
        one["error"] = one["predicted_ms"] / one["measured_ms"] - 1
    sizes = [abs(one["error"]) for one in found]
    return {
        "hardware": environment(),
        "lane": seen.lanes[NAME].lane,
        "input_tokens": given.input_tokens,
        "output_tokens": given.output_tokens,
        "probes": len(seen.lanes[NAME].rows) - 1,
        "unseen": len(rows),
        "repeats": given.repeats,
        "limits": {"median_error": 0.07, "max_error": 0.20},
        "median_error": median(sizes),
        "max_error": max(sizes),
        "fits": made.metrics["lanes"],
        "predictions": found,
    }


def timed(
    config: LatencyConfig, teacher: Artifact, seen: LatencyTable, given: argparse.Namespace
) -> list[Row]:
    """Times of architectures outside the table, on the table's scale of the machine."""
    lane = build_plugin(EXPORTERS, seen.lanes[NAME].lane)
    shapes = unseen(config, seen, given.unseen)
    folder = given.work / "exported"
    exported = Artifact.open(folder) if folder.is_dir() else untested_export(lane, teacher, folder)
    stand = Stand(lane, teacher, exported, config.axes)
    groups = []
    for start in progress(range(0, len(shapes), config.together), "timing unseen"):
        named = {
            f"unseen-{i}": shapes[i]
            for i in range(start, min(start + config.together, len(shapes)))
        }

        def make(place: Path, named: dict[str, ModelShape] = named, start: int = start) -> Any:
            return CELLS.dump_python(stand.time(named, config.benchmark(100 + start), place))

        cells = CELLS.validate_python(piece(given.work / "unseen" / f"group-{start}", make))
        rows = [
            Row(sizes=shape.changes(seen.shape), cells=cells[name]) for name, shape in named.items()
        ]
        groups.append((cells[SOURCE], rows))
    reference = seen.lanes[NAME].rows[0].cells
    return drift_corrected(groups, base=reference)[1:]


def unseen(config: LatencyConfig, seen: LatencyTable, count: int) -> list[ModelShape]:
    """Sizes inside the table's limits that it did not measure, evenly spread."""
    known = [row.sizes for row in seen.lanes[NAME].rows]
    other = config.model_copy(update={"seed": config.seed + 1, "probes": 2 * (count + len(known))})
    drawn = [one for one in other.shapes(seen.shape) if one.changes(seen.shape) not in known]
    return drawn[:count]


def table(result: dict[str, Any]) -> str:
    """Errors by metric and batch size, as Markdown."""
    machine = result["hardware"]
    head = (
        f"{machine['processor']}, {machine['cores']} cores; {result['probes']} probes, "
        f"{result['unseen']} unseen architectures; "
        f"{result['input_tokens']} + {result['output_tokens']} tokens"
    )
    lines = [
        head,
        "",
        "| Metric | Batch | Median error | Largest error | Stated error |",
        "|:--|--:|--:|--:|--:|",
    ]
    for metric in METRICS:
        for batch in sorted({one["batch_size"] for one in result["predictions"]}):
            rows = [
                one
                for one in result["predictions"]
                if one["metric"] == metric and one["batch_size"] == batch
            ]
            sizes = [abs(one["error"]) for one in rows]
            lines.append(
                f"| {metric} | {batch} | {median(sizes):.1%} | {max(sizes):.1%} "
                f"| {rows[0]['stated_error']:.1%} |"
            )
    lines.append(
        f"\nmedian {result['median_error']:.1%} (limit 7 %), "
        f"largest {result['max_error']:.1%} (limit 20 %)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
