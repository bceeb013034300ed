"""What one optimizer step of distillation costs: here, in other trainers, and at the least.

    python benchmarks/kd_step.py [--student CHECKPOINT --teacher CHECKPOINT] [--rounds 2]

Same student, teacher, batches, precision, loss (forward KL, no temperature) and AdamW for all:

- online: this project's trainer, its teacher beside the student;
- cached: the same with the teacher's top-k log-probabilities, written before the clock starts;
- modelopt: ModelOpt's own KDTrainer, the baseline;
- trl: TRL's GKDTrainer on given text (its DistillationTrainer generates its own);
- plain: a loop by hand over whole float32 logits;
- floor: the parts that no step can do without, each measured alone, and their operations over the
  matrix peak measured beside them.

Every variant runs in a process of its own, 2 untimed steps first. A step's time begins before its
forward pass and ends after its optimizer: reading text, logs and checkpoints are not in it. Memory
is the most that the steps added to the loaded models; gradients and AdamW's moments, 12 bytes per
parameter, are in it for all. MFU is the operations that a step needs, per second, over the matrix
peak measured here and not that of a data sheet. With --rounds 2 all variants run again in reverse
order. Prints tables, then one line of JSON. Without checkpoints the pair is a random Llama with the
sizes of the quickstart and the text random ids.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from showing import shown

from trt_kd.artifacts.environment import environment, installed
from trt_kd.measuring.machine import load_average
from trt_kd.measuring.statistics import half_range, median

VARIANTS = ("online", "cached", "modelopt", "trl", "plain", "floor")
BASELINE = "modelopt"
OTHERS = {"modelopt": "modelopt", "trl": "trl", "plain": "torch"}
"""Variants that are not ours, and the package of each: one that fails does not end the rest."""
UNTIMED_STEPS = 2
LIMITS = {"online": 1.2, "cached": 1.5, "memory_ratio": 0.5}
"""Least speed over the baseline's, and most memory above the models over the baseline's."""
FLOORS = {
    "online": ("student_trunk", "student_head", "teacher_trunk", "teacher_head"),
    "cached": ("student_trunk", "student_head"),
}
"""Measured parts of each floor; the optimizer is measured too and in neither."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
COLUMNS = (
    "| Variant | Tokens/s | Over ModelOpt | Seconds per step | Spread "
    "| Peak above models (MiB) | Over ModelOpt | MFU |\n"
    "|:--|--:|--:|--:|--:|--:|--:|--:|"
)
PART_COLUMNS = "| Part | Seconds | TFLOP | TFLOP/s |\n|:--|--:|--:|--:|"


def main(arguments: list[str] | None = None) -> int:
    parser = options()
    given = parser.parse_args(arguments)
    if (given.student is None) != (given.teacher is None):
        parser.error("--student and --teacher belong together")
    if given.repeats < 2:
        parser.error("--repeats must be 2 at least: a spread needs two steps")
    if given.child:
        return shown(lambda: task(given))
    return shown(lambda: compare(given), table)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="cost of one step of distillation")
    parser.add_argument("--student", type=Path, help="checkpoint")
    parser.add_argument("--teacher", type=Path, help="checkpoint with the same tokenizer")
    parser.add_argument("--text", type=Path, help="text file; docstrings without it")
    parser.add_argument("--layers", type=int, default=30, help="of the random pair, like the next")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536, help="the teacher's")
    parser.add_argument("--student-ffn", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--block-tokens", type=int, default=512)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--teacher-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="weights of the other trainers' teacher; float32 with --precision fp32",
    )
    parser.add_argument("--k", type=int, default=64, help="tokens kept by the cache")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=("prepare", *VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def task(given: argparse.Namespace) -> dict[str, Any]:
    """What a child does."""
    if given.child == "floor":
        from kd_step_floor import measured_floor

        return measured_floor(given, UNTIMED_STEPS)
    from kd_step_variants import measured, prepare

    if given.child == "prepare":
        return prepare(given, (UNTIMED_STEPS + given.repeats) * given.batch)
    return measured(given, UNTIMED_STEPS)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Run the children and put their numbers together.

    This process never loads torch: the system hands its peak memory on to its children's.
    """
    load = load_average()
    absent = {
        name: f"{package} is not installed"
        for name, package in OTHERS.items()
        if name in given.variants and find_spec(package) is None
    }
    runs: dict[str, list[Any]] = {name: [] for name in given.variants}
    with tempfile.TemporaryDirectory() as folder:
        given.work = Path(folder)
        facts = child(given, "prepare")
        for number in range(given.rounds):
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            for name in (one for one in order if one not in absent):
                print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr)
                try:
                    runs[name].append(child(given, name))
                except subprocess.CalledProcessError as error:
                    if name not in OTHERS:
                        raise
                    absent[name] = f"ended with code {error.returncode}"
    return record(given, facts, runs, absent) | {"load_average": load}


def child(given: argparse.Namespace, name: str) -> Any:
    """What this script prints last when it is started for one task."""
    command = [sys.executable, __file__]
    for option, value in vars(given).items():
        if value is not None and option != "child":
            values = value if isinstance(value, list) else [value]
            command += [f"--{option.replace('_', '-')}", *map(str, values)]
    command += ["--child", name]
    surroundings = os.environ | ENVIRONMENT
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
    return json.loads(done.stdout.splitlines()[-1])


def record(
    given: argparse.Namespace,
    facts: dict[str, Any],
    runs: dict[str, list[Any]],
    absent: dict[str, str],
) -> dict[str, Any]:
    """The record from what the children said."""
    tokens = given.batch * given.block_tokens
    floor = floor_of(runs["floor"], tokens) if runs.get("floor") else None
    results = []
    for name, rounds in runs.items():
        if name in absent:
            results.append({"name": name, "absent": absent[name]})
        else:
            results.append(entry(name, rounds, tokens, floor))
    versions = {"trl": installed("trl")} if installed("trl") else {}
    return {
        "hardware": environment() | versions,
        "workload": workload(given) | facts,
        "untimed_steps": UNTIMED_STEPS,
        "repeats": given.repeats,
        "rounds": given.rounds,
        "results": results,
        "baseline": BASELINE,
        "ratios": ratios(results),
        "limits": LIMITS,
        "floor": floor,
    }


def workload(given: argparse.Namespace) -> dict[str, Any]:
    """What every variant runs on."""
    shape = ("layers", "hidden", "heads", "kv_heads", "vocab")
    random = {name: getattr(given, name) for name in shape}
    dtype = "float32" if given.precision == "fp32" else given.teacher_dtype
    return {
        "student": given.student.name if given.student else random | {"ffn": given.student_ffn},
        "teacher": given.teacher.name if given.teacher else random | {"ffn": given.ffn},
        "batch": given.batch,
        "block_tokens": given.block_tokens,
        "tokens_per_step": given.batch * given.block_tokens,
        "precision": given.precision,
        "teacher_dtype_of_others": dtype,
        "k": given.k,
        "loss": "forward KL",
    }


def entry(
    name: str, rounds: list[Any], tokens: int, floor: dict[str, Any] | None
) -> dict[str, Any]:
    """One result from the rounds of one variant; the floor's is that of an online step."""
    if name == "floor":
        parts = FLOORS["online"]
        samples = [
            sum(step)
            for one in rounds
            for step in zip(*(one["samples_s"][part] for part in parts), strict=True)
        ]
    else:
        samples = [second for one in rounds for second in one["samples_s"]]
    largest = max(rounds, key=lambda one: one["peak_bytes"] - one["loaded_bytes"])
    found = {
        "name": name,
        "tokens_per_s": tokens / median(samples),
        "median_s": median(samples),
        "spread": half_range(samples),
        "peak_bytes_above_models": largest["peak_bytes"] - largest["loaded_bytes"],
        "loaded_bytes": largest["loaded_bytes"],
        "load_counted": largest["load_counted"],
        "samples_s": samples,
    }
    if floor:
        needed = floor["flops_seconds"]["cached" if name == "cached" else "online"]
        found["mfu"] = needed / found["median_s"]
    return found


def floor_of(rounds: list[Any], tokens: int) -> dict[str, Any]:
    """Least times of both kinds of step: by its parts, and by operations over the matrix peak."""
    parts = {
        part: median([second for one in rounds for second in one["samples_s"][part]])
        for part in rounds[0]["samples_s"]
    }
    peak = max(one["matrix_peak_flops_per_s"] for one in rounds)
    flops = rounds[0]["flops"]
    seconds = {name: sum(parts[part] for part in of) for name, of in FLOORS.items()}
    return {
        "parts_s": parts,
        "seconds": seconds,
        "tokens_per_s": {name: tokens / second for name, second in seconds.items()},
        "flops": flops,
        "matrix_peak_flops_per_s": peak,
        "matrix_size": rounds[0]["matrix_size"],
        "flops_seconds": {
            name: sum(flops[part] for part in of) / peak for name, of in FLOORS.items()
        },
    }


def ratios(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed and memory of all over the baseline's; nothing where that is absent."""
    found = {one["name"]: one for one in results if "absent" not in one}
    if BASELINE not in found:
        return {}
    base, memory = found[BASELINE], "peak_bytes_above_models"
    others = {name: one for name, one in found.items() if name != BASELINE}
    speeds: dict[str, Any] = {
        name: one["tokens_per_s"] / base["tokens_per_s"] for name, one in others.items()
    }
    bytes_ratio = {name: one[memory] / base[memory] for name, one in others.items() if base[memory]}
    return speeds | {"memory_ratio": bytes_ratio}


def table(found: dict[str, Any]) -> str:
    """Markdown: all variants, then the parts of the floor."""
    hardware, work = found["hardware"], found["workload"]
    machine = hardware["gpu"] or f"{hardware['processor']}, {hardware['cores']} cores"
    tokens = f"{work['batch']} x {work['block_tokens']} tokens, {work['precision']}"
    steps = f"median of {found['rounds']} x {found['repeats']} steps"
    lines = [f"{machine}; {tokens}; {steps}", "", COLUMNS]
    lines += [row(one, found["ratios"]) for one in found["results"]]
    if floor := found["floor"]:
        lines += ["", PART_COLUMNS, *(part_row(name, floor) for name in floor["parts_s"])]
        peak = f"{floor['matrix_peak_flops_per_s'] / 1e12:.2f}"
        lines.append(f"| matrix peak, {floor['matrix_size']} cubed | | | {peak} |")
        for name, seconds in floor["seconds"].items():
            least = floor["flops_seconds"][name]
            lines.append(f"| floor, {name} | {seconds:.3f} | | |")
            lines.append(f"| operations over the peak, {name} | {least:.3f} | | |")
    return "\n".join(lines)


def row(one: dict[str, Any], ratio: dict[str, Any]) -> str:
    """A variant's line."""
    name = one["name"]
    if "absent" in one:
        return f"| {name}: {one['absent']} |" + " |" * 7
    speed, memory = ratio.get(name), ratio.get("memory_ratio", {}).get(name)
    base = "baseline" if name == BASELINE else ""
    cells = [name, f"{one['tokens_per_s']:,.0f}", base if speed is None else f"{speed:.2f}"]
    cells += [f"{one['median_s']:.3f}", f"{one['spread']:.1%}"]
    cells += [f"{one['peak_bytes_above_models'] / 2**20:,.0f}"]
    cells += [base if memory is None else f"{memory:.2f}"]
    cells += [f"{one['mfu']:.0%}" if "mfu" in one else ""]
    return f"| {' | '.join(cells)} |"


def part_row(name: str, floor: dict[str, Any]) -> str:
    """A part's line."""
    seconds, flops = floor["parts_s"][name], floor["flops"].get(name)
    cells = [name.replace("_", " "), f"{seconds:.3f}"]
    cells += [f"{flops / 1e12:.3f}", f"{flops / seconds / 1e12:.2f}"] if flops else ["", ""]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
