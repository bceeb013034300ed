"""How much faster one exported variant decodes than another, measured interleaved in one run.

    python benchmarks/quickstart_speed.py BASELINE CANDIDATE [--repeats 5] [--out DIRECTORY]

BASELINE and CANDIDATE are directories of artifacts: exports or checkpoints. Prints a table, then
one line of JSON. The speed-up is a t-interval of log ratios over runs, each run of one paired
with the run of the other beside it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from showing import shown

from trt_kd.artifacts import Artifact
from trt_kd.artifacts.environment import environment
from trt_kd.measuring.statistics import ratio_interval
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark

COLUMNS = (
    "| Batch | Variant | Backend, format | TTFT p50 (ms) | ITL p50 (ms) | Floor (ms) "
    "| Throughput (tok/s) | Speed-up (95 % interval) |\n|--:|:--|:--|--:|--:|--:|--:|--:|"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="speed-up of one artifact over another")
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the benchmark artifact is kept")
    given = parser.parse_args(arguments)
    config = BenchmarkConfig(
        batch_sizes=tuple(given.batch_sizes),
        input_tokens=given.input_tokens,
        output_tokens=given.output_tokens,
        repeats=given.repeats,
    )

    def measured(out: Path) -> dict[str, Any]:
        variants = {name: Artifact.open(getattr(given, name)) for name in ("baseline", "candidate")}
        return compare(benchmark(config, out=out, **variants))

    with tempfile.TemporaryDirectory() as scratch:
        return shown(lambda: measured(given.out or Path(scratch) / "benchmark"), table)


def compare(made: Artifact) -> dict[str, Any]:
    """Records of both variants by batch size, with the speed-up of the whole run."""
    records = json.loads((made.path / "benchmark.json").read_text(encoding="utf-8"))["variants"]
    lines = (made.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    seconds: dict[tuple[str, int], list[float]] = {}
    for sample in map(json.loads, lines):
        key = (sample["variant"], sample["batch_size"])
        seconds.setdefault(key, []).append(sum(sample["step_s"]))
    speed_ups = {}
    for record in records["baseline"]:
        size = record["batch_size"]
        runs = [seconds.get((name, size), []) for name in ("candidate", "baseline")]
        if min(map(len, runs)) >= 2:
            interval = ratio_interval(*runs)
            speed_ups[str(size)] = [interval.estimate, interval.low, interval.high]
    return {"hardware": environment(), "variants": records, "speed_up": speed_ups}


def table(result: dict[str, Any]) -> str:
    """Markdown: the baseline first, then the candidate, batch by batch."""
    hardware = result["hardware"]
    lines = [f"{hardware['processor']}, {hardware['cores']} cores", "", COLUMNS]
    for pair in zip(*result["variants"].values(), strict=True):
        for name, record in zip(result["variants"], pair, strict=True):
            cells = [str(record["batch_size"]), name, f"{record['backend']}, {record['format']}"]
            lines.append(f"| {' | '.join(cells + _numbers(name, record, result['speed_up']))} |")
    return "\n".join(lines)


def _numbers(name: str, record: dict[str, Any], speed_ups: dict[str, list[float]]) -> list[str]:
    if "error" in record:
        return ["-", "-", "-", record["error"], "-"]
    itl, floor = record["itl_ms"], record["decode_floor_ms"]
    found = speed_ups.get(str(record["batch_size"]))
    gain = "{:.2f} ({:.2f} to {:.2f})".format(*found) if found else "-"
    return [
        f"{record['ttft_ms']['p50']:.1f}",
        f"{itl['p50']:.2f}" if itl else "-",
        f"{floor:.2f}" if floor else "-",
        f"{record['output_tokens_per_s']:.1f} ± {record['spread']:.0%}",
        gain if name == "candidate" else "baseline",
    ]


if __name__ == "__main__":
    sys.exit(main())
