"""Kill a distillation again and again; it must end as if nothing had happened.

    python benchmarks/kill_drill.py --student CHECKPOINT --teacher CHECKPOINT [--kills 20]

Trains once without a break, online and cached. Then trains in child processes that are sent SIGKILL
at random moments, from start-up to the renaming of the finished folder, and are started again until
they finish; a run that finishes is compared with the unbroken one and the next begins, until there
were --kills kills in all. Weights must be the same bit for bit, and every logged loss the same
number. Prints a table, then one line of JSON.

The child is forked from a process that has the libraries loaded and has computed nothing, so that
a kill falls into work and not into imports.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from trt_kd.artifacts import Artifact, work_directory
from trt_kd.artifacts.environment import environment
from trt_kd.data.base import DataConfig
from trt_kd.data.text import TextFiles
from trt_kd.errors import TrtKdError
from trt_kd.stages.distill import DistillConfig, distill, require_modelopt

KINDS = ("online", "cached")
LIMIT = 20.0
"""A child may take this many times as long as the unbroken run, and a minute."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a killed distillation ends like an unbroken one")
    parser.add_argument("--student", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint of the teacher")
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=3, help="steps")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--text", type=Path, help="text file; docstrings without it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = parser.parse_args(arguments)
    if given.kills < 1:
        parser.error("--kills must be at least 1")
    try:
        require_modelopt()
        load_libraries()
        with tempfile.TemporaryDirectory() as folder:
            results = [drill(given, kind, Path(folder)) for kind in given.kinds]
    except TrtKdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = {"schema_version": 1, "hardware": environment(), "results": results}
    print(table(results))
    print(json.dumps(record))
    return 0 if all(row["identical"] for row in results) else 1


def load_libraries() -> None:
    """Import what training imports, so that no child has to."""
    import trt_kd.losses.top_k
    import trt_kd.teachers.writing
    import trt_kd.training.loop  # noqa: F401


def drill(given: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """Kill runs with one kind of teacher and compare every finished one with the unbroken one."""
    config = settings(given, kind)
    whole = folder / f"{kind}-whole"
    started = time.perf_counter()
    if not attempt(given, config, whole, None, 3600.0):
        raise TrtKdError(f"the unbroken run failed; see {log_of(whole)}", hint="mend it first")
    seconds = time.perf_counter() - started
    moments = random.Random(given.seed)
    kills, finished, resumed = 0, 0, []
    identical, difference, before = True, 0.0, -1
    while kills < given.kills or before >= 0:
        out = folder / f"{kind}-{finished}"
        delay = moments.uniform(0.0, seconds) if kills < given.kills else None
        if attempt(given, config, out, delay, LIMIT * seconds + 60.0):
            same, apart = compared(whole, out)
            identical, difference = identical and same, max(difference, apart)
            finished, before = finished + 1, -1
        elif delay is None:
            raise TrtKdError(f"a run failed by itself; see {log_of(out)}", hint="mend it first")
        else:
            kills, before = kills + 1, newest_step(out)
            resumed.append(before)
    return {
        "name": kind,
        "kills": kills,
        "finished_runs": finished,
        "unbroken_s": seconds,
        "checkpoint_steps_after_each_kill": resumed,
        "identical": identical,
        "largest_loss_difference_nats_per_token": difference,
    }


def settings(given: argparse.Namespace, kind: str) -> DistillConfig:
    """Both terms, so that every part of a step counts."""
    data = DataConfig(block_tokens=given.block_tokens)
    if given.text is not None:
        source = TextFiles(files=[str(given.text)])
        data = DataConfig(source=source, block_tokens=given.block_tokens)
    return DistillConfig.model_validate(
        {
            "teacher": kind,
            "data": data.model_dump(),
            "steps": given.steps,
            "batch_size": given.batch_size,
            "checkpoint_every_steps": given.checkpoint_every,
            "precision": given.precision,
            "task_weight": {"kind": "linear", "end": 0.5},
            "monitor": {"every_steps": 4, "blocks": 2},
        }
    )


def attempt(
    given: argparse.Namespace,
    config: DistillConfig,
    out: Path,
    delay: float | None,
    limit_s: float,
) -> bool:
    """Start the run in a child; kill it after ``delay`` seconds. Say whether it finished.

    Raises:
        TrtKdError: if the child failed before it was killed, or took too long.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        child_run(given, config, out)
    end = time.monotonic() + (limit_s if delay is None else delay)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                log = log_of(out).read_text(encoding="utf-8")
                raise TrtKdError(f"a run failed by itself: {log[-2000:]}", hint="mend it first")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if delay is None:
        raise TrtKdError(f"a run took longer than {limit_s:.0f} s", hint="look why it hangs")
    return (out / "trt_kd.json").is_file()  # the kill came after the last renaming


def child_run(given: argparse.Namespace, config: DistillConfig, out: Path) -> None:
    """The work of a child, which ends here: a fork must not run on in its parent's code."""
    import traceback

    with log_of(out).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            roles = {name: Artifact.open(getattr(given, name)) for name in ("student", "teacher")}
            distill(config, **roles, out=out)
            os._exit(0)
        finally:
            traceback.print_exc()
            log.flush()
            os._exit(1)


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def newest_step(out: Path) -> int:
    """Step of the newest complete checkpoint that a kill left; 0 where there is none."""
    from trt_kd.training.checkpointing import is_complete, step_of

    found = (work_directory(out) / "checkpoints").glob("checkpoint-*")
    return max((step_of(path) for path in found if is_complete(path)), default=0)


def compared(whole: Path, other: Path) -> tuple[bool, float]:
    """Whether weights and losses of both are the same, and how far losses are apart at most."""
    one, two = Artifact.open(whole), Artifact.open(other)
    weights = {
        name for name in one.manifest.files if name.endswith((".safetensors", ".index.json"))
    }
    same = all(one.manifest.files[n] == two.manifest.files.get(n) for n in weights)
    rows = [
        row
        for name in ("history.jsonl", "monitors.jsonl")
        for row in zip(*(losses(a.path / name) for a in (one, two)), strict=True)
    ]
    apart = max(abs(a[name] - b[name]) for a, b in rows for name in a)
    return same and apart == 0.0, apart


def losses(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| Teacher | Kills | Runs finished | Same weights and losses | Largest difference (nats) |",
        "|:--|--:|--:|:--|--:|",
    ]
    lines += [
        f"| {row['name']} | {row['kills']} | {row['finished_runs']} "
        f"| {'yes' if row['identical'] else 'NO'} "
        f"| {row['largest_loss_difference_nats_per_token']:g} |"
        for row in results
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
