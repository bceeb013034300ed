"""What scoring all axes costs over a plain forward pass over the same blocks.

    python benchmarks/importance_pass.py [--model CHECKPOINT] [--repeats 7]

Scores the axes ffn, heads, kv_heads, hidden and depth in one pass, without the matrices of the
refit, on a checkpoint or on a random Llama. Prints a table, then one line of JSON. Both passes take
turns in ABBA order in one process; the memory of each is the peak of a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from showing import shown

from trt_kd.artifacts.environment import environment
from trt_kd.measuring.statistics import half_range, median, ratio_interval

AXES = ("ffn", "heads", "kv_heads", "hidden")
PASSES = ("plain", "scoring")
LIMITS = {"time_ratio": 1.10, "memory_ratio": 1.2}
COLUMNS = (
    "| Pass | Median (s) | Spread | Time ratio (95 % interval) | Peak memory (MiB) "
    "| Memory ratio |\n|:--|--:|--:|--:|--:|--:|"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="cost of the importance pass")
    parser.add_argument("--model", type=Path, help="checkpoint; a random Llama without it")
    parser.add_argument("--layers", type=int, default=12, help="of the random Llama, like the next")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", choices=("time", *PASSES), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.repeats < 2:
        parser.error("--repeats must be 2 at least: a spread needs two runs")
    if given.child:
        return shown(lambda: timed(given) if given.child == "time" else peak(given))
    return shown(lambda: compare(given), table)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Run the children and put their numbers together.

    This process never loads torch: the system hands its peak memory on to its children's.
    """
    found = {name: child(given, name) for name in PASSES}
    times = child(given, "time")
    interval = ratio_interval(times["plain"], times["scoring"])
    passes = {
        name: {
            "median_s": median(times[name]),
            "spread": half_range(times[name]),
            "samples_s": times[name],
            "loaded_bytes": found[name]["loaded_bytes"],
            "peak_bytes": found[name]["peak_bytes"],
            "load_counted": found[name]["load_counted"],
        }
        for name in PASSES
    }
    plain, scoring = passes["plain"], passes["scoring"]
    return {
        "hardware": environment(),
        "workload": workload(given) | {"parameters": times["parameters"]},
        "threads": times["threads"],
        "repeats": given.repeats,
        "passes": passes,
        "spread": max(plain["spread"], scoring["spread"]),
        "time_ratio": scoring["median_s"] / plain["median_s"],
        "time_ratio_interval": [interval.low, interval.high],
        "memory_ratio": scoring["peak_bytes"] / plain["peak_bytes"],
        "limits": LIMITS,
    }


def workload(given: argparse.Namespace) -> dict[str, Any]:
    """What both passes run on."""
    shape = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")
    model = given.model.name if given.model else {name: getattr(given, name) for name in shape}
    run = {name: getattr(given, name) for name in ("blocks", "block_tokens", "batch")}
    return {"model": model, "axes": [*AXES, "depth"], "dtype": "float32"} | run


def table(result: dict[str, Any]) -> str:
    """Markdown: the plain pass first."""
    hardware, passes = result["hardware"], result["passes"]
    lines = [f"{hardware['processor']}, {hardware['cores']} cores", "", COLUMNS]
    low, high = result["time_ratio_interval"]
    ratios = {
        "plain": ("baseline", "baseline"),
        "scoring": (
            f"{result['time_ratio']:.3f} ({low:.3f} to {high:.3f})",
            f"{result['memory_ratio']:.3f}",
        ),
    }
    for name, record in passes.items():
        time_ratio, memory_ratio = ratios[name]
        cells = [name, f"{record['median_s']:.3f}", f"{record['spread']:.1%}", time_ratio]
        cells += [f"{record['peak_bytes'] / 2**20:.0f}", memory_ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def child(given: argparse.Namespace, task: str) -> Any:
    """What this script prints when it is started for one task."""
    options: list[str] = []
    for name, value in vars(given).items():
        if value is not None and name != "child":
            options += [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, __file__, *options, "--child", task]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every pass of both kinds, taking turns."""
    import torch

    model, runs = prepared(given)
    for name in PASSES:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in PASSES}
    for repeat in range(given.repeats):
        for name in PASSES if repeat % 2 == 0 else PASSES[::-1]:
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    facts = {"parameters": model.num_parameters(), "threads": torch.get_num_threads()}
    return {**seconds, **facts}


def peak(given: argparse.Namespace) -> dict[str, int | bool]:
    """Largest resident memory at the start of, and during, two passes of one kind."""
    _, runs = prepared(given)
    load_counted = not forget_peak()
    loaded = peak_bytes()
    for _ in range(2):
        runs[given.child]()
    return {"loaded_bytes": loaded, "peak_bytes": peak_bytes(), "load_counted": load_counted}


def forget_peak() -> bool:
    """Start the peak anew, where the system can: loading takes more than a pass and hides it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def prepared(given: argparse.Namespace) -> tuple[Any, dict[str, Callable[[], object]]]:
    """The model, and both passes over the same blocks."""
    import torch

    from trt_kd.architectures import architecture_of
    from trt_kd.pruning import AXES as REGISTERED
    from trt_kd.pruning.importance import Activation, BlockInfluence
    from trt_kd.pruning.scoring import Layers, record

    model = loaded(given)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, vocab, (given.blocks, given.block_tokens), generator=generator)

    def loop(model: Any) -> None:
        for tokens_BL in blocks.split(given.batch):
            model.base_model(input_ids=tokens_BL, use_cache=False)

    def plain() -> None:
        with torch.no_grad():
            loop(model)

    architecture = architecture_of(model.config.model_type)
    places = {kind: REGISTERED.load(kind)().places(model, architecture) for kind in AXES}
    channels = {kind: (Activation(), found) for kind, found in places.items()}
    layers = Layers(BlockInfluence(), 1)
    settings = {"channels": channels, "layers": layers, "readings": ()}
    scoring = partial(record, model, architecture, loop, **settings)
    return model, {"plain": plain, "scoring": scoring}


def loaded(given: argparse.Namespace) -> Any:
    """The checkpoint, or a random Llama of the sizes asked for, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trt_kd.checkpoints import load_model

    if given.model:
        return load_model(given.model, dtype="float32")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    sys.exit(main())
