"""What the harness adds to a decoding step, and how often its intervals hold the truth.

    python benchmarks/harness_overhead.py --ort-genai EXPORT --transformers CHECKPOINT
        [--runs 60] [--comparisons 40] [--pairs 6] [--input-tokens 32] [--output-tokens 32]

First question: the ITL of ``measure_steps`` on a backend's session beside a loop written by hand
around the same loaded model, run in turns; the ratio of medians of runs with its t interval.
Second: one variant against itself, as ``trt-kd benchmark --compare A A`` does it, with fresh
processes for every comparison; a 95 % interval of the ratio should hold 1 in about 38 of 40, and
37 is asked. Prompts are random token ids: no number here is a speed. Prints a table, then JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trt_kd.artifacts.environment import environment
from trt_kd.backends import BACKENDS
from trt_kd.backends.interleaved import interleave
from trt_kd.backends.worker import Worker
from trt_kd.errors import TrtKdError
from trt_kd.measuring.clock import Workload, measure_steps
from trt_kd.measuring.machine import conditions, load_average
from trt_kd.measuring.metrics import of_steps
from trt_kd.measuring.rounds import Rounds
from trt_kd.measuring.statistics import median, ratio_interval

LIMIT = 0.02
ASKED = 37 / 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="overhead and honesty of the harness")
    for name in BARE:
        parser.add_argument(f"--{name}", type=Path, help=f"directory that {name} loads")
    parser.add_argument("--runs", type=int, default=60, help="pairs of runs per backend")
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of runs per comparison")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    directories = {
        name: folder for name in BARE if (folder := getattr(given, name.replace("-", "_")))
    }
    if not directories:
        parser.error("name a directory for at least one backend")
    try:
        result = measure(given, directories)
    except TrtKdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(json.dumps(result))
    return 0


def measure(given: argparse.Namespace, directories: dict[str, Path]) -> dict[str, Any]:
    """Both answers; the first backend named is compared with itself."""
    workload = Workload(
        batch_size=1, input_tokens=given.input_tokens, output_tokens=given.output_tokens
    )
    found = {
        name: overhead(name, folder, workload, given.runs, given.threads)
        for name, folder in directories.items()
    }
    name, folder = next(iter(directories.items()))
    itself = against_itself(name, folder, workload, given, found[name]["vocab_size"])
    return {
        "hardware": environment(),
        **conditions(),
        "load_average": load_average(),
        "workload": workload.model_dump(),
        "itl_ratio": {name: each["ratio"] for name, each in found.items()},
        "overhead": found,
        "itself": itself,
        "ok": {
            "overhead": all(abs(each["ratio"] - 1) <= LIMIT for each in found.values()),
            "itself": itself["covered"] >= ASKED * itself["comparisons"],
        },
    }


def overhead(
    name: str, directory: Path, workload: Workload, runs: int, threads: int | None
) -> dict[str, Any]:
    """ITL of the harness over that of a bare loop on the same loaded model, in ABBA order."""
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"harness": [], "bare": []}
    with BACKENDS.load(name)(threads=threads).load(directory) as session:
        vocab = session.vocab_size
        loops = {"harness": partial(measure_steps, session), "bare": partial(BARE[name], session)}
        for number in tqdm(range(-1, runs), desc=name, unit="pair", disable=None):
            prompts = _prompts(random, workload, vocab)
            for loop in loops if number % 2 else reversed(loops):
                step_s = loops[loop](prompts, workload.output_tokens)
                if number >= 0:
                    times[loop].append(1e3 * median(step_s[1:]))
    interval = ratio_interval(times["bare"], times["harness"])
    return {
        "itl_ms": {loop: median(values) for loop, values in times.items()},
        "ratio": interval.estimate,
        "interval": [interval.low, interval.high],
        "runs": runs,
        "vocab_size": vocab,
    }


def bare_ort_genai(session: Any, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """What a user writes by hand; the model is the session's own, loaded once."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(session._model)
    total = len(prompts[0]) + new_tokens
    params.set_search_options(
        batch_size=len(prompts), max_length=total, min_length=total, do_sample=False
    )
    last, times = time.perf_counter(), []
    generator = genai.Generator(session._model, params)
    generator.append_tokens(np.asarray(prompts, dtype=np.int32))
    for _ in range(new_tokens):
        generator.generate_next_token()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def bare_transformers(session: Any, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """What a user writes by hand; the model is the session's own, loaded once."""
    import torch

    last, times = time.perf_counter(), []
    ids, cache = torch.tensor(prompts, device=session.model.device), None
    with torch.inference_mode():
        for _ in range(new_tokens):
            output = session.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            if ids.is_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - last)
            last = now
    return times


BARE: dict[str, Callable[[Any, list[list[int]], int], list[float]]] = {
    "ort-genai": bare_ort_genai,
    "transformers": bare_transformers,
}


def against_itself(
    name: str, directory: Path, workload: Workload, given: argparse.Namespace, vocab: int
) -> dict[str, Any]:
    """How many intervals of the ratio of a variant to itself hold 1."""
    backend = BACKENDS.load(name)(threads=given.threads)
    rounds = Rounds((workload,), repeats=given.pairs, warmup=1)
    random = np.random.default_rng(1)
    intervals = []
    for _ in tqdm(range(given.comparisons), desc="itself", unit="comparison", disable=None):
        with ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(side, backend, directory)) for side in "ab"}
            rows = np.concatenate([_prompts(random, workload, vocab) for _ in range(rounds.rows)])
            found = interleave(workers, dict.fromkeys("ab", rows), rounds, tolerance=1.0)
        sides = [
            [median(of_steps(run.step_s, workload).itl_ms) for run in found[side, workload].runs]
            for side in "ab"
        ]
        interval = ratio_interval(*sides)
        intervals.append([interval.low, interval.estimate, interval.high])
    return {
        "backend": name,
        "comparisons": len(intervals),
        "pairs": given.pairs,
        "covered": sum(low <= 1 <= high for low, _, high in intervals),
        "intervals": intervals,
    }


def _prompts(random: np.random.Generator, workload: Workload, vocab: int) -> list[list[int]]:
    ids = random.integers(3, vocab, (workload.batch_size, workload.input_tokens))
    return ids.tolist()  # type: ignore[no-any-return]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| Backend | ITL bare (ms) | ITL here (ms) | Ratio (95 % interval) |"]
    lines.append("|:--|--:|--:|--:|")
    for name, found in result["overhead"].items():
        low, high = found["interval"]
        itl = found["itl_ms"]
        ratio = f"{found['ratio']:.4f} ({low:.4f} to {high:.4f})"
        lines.append(f"| {name} | {itl['bare']:.3f} | {itl['harness']:.3f} | {ratio} |")
    itself = result["itself"]
    told = f"{itself['backend']} against itself: {itself['covered']} of {itself['comparisons']}"
    return "\n".join([*lines, "", f"{told} intervals hold 1"])


if __name__ == "__main__":
    sys.exit(main())
