"""Do what a plan says: skip what is done, resume what was cut off, lose nothing."""

import gc
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from trt_kd.artifacts import MANIFEST, Artifact
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, TrtKdError
from trt_kd.pipeline.estimate import free_bytes
from trt_kd.pipeline.flow import without_cut
from trt_kd.pipeline.plan import Plan, PlannedStep, make_plan, planned_steps, superseded
from trt_kd.pipeline.recipe import Recipe
from trt_kd.pipeline.stages import STAGES
from trt_kd.seeding import seed_everything
from trt_kd.stages.corners import PruningDoesNotPayError
from trt_kd.training.distributed import require_one_process

log = logging.getLogger(__name__)


def run(recipe: Recipe, root: Path) -> dict[str, Artifact]:
    """Bring every step of ``recipe`` below ``root`` to "done"; return the artifacts by step.

    Where pruning does not pay, the steps that build on the pruned model are left out and the report
    says why.

    Raises:
        ConfigError: if a launcher started several processes.
    """
    require_one_process("trt-kd run")
    plan = make_plan(recipe, root)
    check_disk(plan)
    for warning in plan.warnings:
        log.warning("%s", warning)
    with locked(root):
        try:
            return _bring_all(plan.steps)
        except PruningDoesNotPayError as error:
            why = f"{error.told}. Nothing was pruned."
        log.warning("%s", why)
        left = without_cut([planned.step for planned in plan.steps], why)
        return _bring_all(planned_steps(left, root, plan.shapes))


def _bring_all(steps: Sequence[PlannedStep]) -> dict[str, Artifact]:
    done: dict[str, Artifact] = {}
    verified: set[Path] = set()
    for number, planned in enumerate(steps, start=1):
        where = f"[{number}/{len(steps)}] {planned.step.name}"
        done[planned.step.name] = _bring(planned, done, verified, where=where)
    return done


def rehearse(recipe: Recipe, root: Path) -> dict[str, Artifact]:
    """Run every stage of ``recipe`` for real on a two-layer twin, in ``root``, from nothing.

    What is written is removed when the rehearsal passes and kept when it fails.
    """
    shutil.rmtree(root, ignore_errors=True)
    artifacts = run(recipe.rehearsal(), root)
    shutil.rmtree(root)
    return artifacts


def check_disk(plan: Plan) -> None:
    """Refuse to start where the plan's files would not fit.

    Raises:
        ArtifactError: with the free and the needed space.
    """
    needed = sum(planned.estimate.disk_bytes or 0.0 for planned in plan.to_do)
    free = free_bytes(plan.root)
    if needed > free:
        raise ArtifactError(
            f"{plan.root} has {free / 1e9:.1f} GB free, the plan needs {needed / 1e9:.1f} GB",
            hint="free disk space or choose another folder with --out",
        )


def _bring(
    planned: PlannedStep, done: Mapping[str, Artifact], verified: set[Path], *, where: str
) -> Artifact:
    """Return the artifact of one step, from disk or from work."""
    if planned.state == "done":
        log.info("%s: done", where)
        return Artifact.open(planned.out)
    _make_room(planned.out)
    kept = superseded(planned.out, planned.key)
    if (kept / MANIFEST).is_file():
        kept.rename(planned.out)
        log.info("%s: restored", where)
        return Artifact.open(planned.out)
    step = planned.step
    inputs = {role: done[name] for role, name in step.inputs.items()}
    log.info("%s: %s", where, STAGES[step.stage].summary)
    start = perf_counter()
    try:
        artifact = perform(step.stage, step.config, planned.out, inputs, verified)
    except PruningDoesNotPayError:
        raise
    except BaseException:
        log.error("%s: failed after %.0f s", where, perf_counter() - start)
        raise
    gc.collect()
    gc.freeze()  # what is left are libraries; later collections need not walk through them
    log.info("%s: %.0f s", where, perf_counter() - start)
    return artifact


def perform(
    stage: str,
    config: StageConfig,
    out: Path,
    inputs: Mapping[str, Artifact],
    verified: set[Path],
) -> Artifact:
    """Run one stage from its own seed, on inputs that are as their stages left them.

    ``verified`` holds the folders that need not be digested again; it grows.

    Raises:
        ArtifactError: if an input was changed.
    """
    for artifact in inputs.values():
        if artifact.path not in verified:
            artifact.verify()
            verified.add(artifact.path)
    seed_everything(getattr(config, "seed", 0))
    return STAGES[stage].run(config, out=out, **inputs)


def _make_room(out: Path) -> None:
    """Move what stands at ``out`` for another recipe aside, where its key finds it again."""
    if not out.exists():
        return
    try:
        place = superseded(out, Artifact.open(out).key)
    except ArtifactError as error:
        raise ArtifactError(
            f"{out} is in the way and is no finished artifact", hint=f"move or remove {out}"
        ) from error
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    out.rename(place)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep two runs from working in one folder.

    Raises:
        ArtifactError: if the folder cannot be made or lies in an artifact, or another process
            works in it.
    """
    import fcntl

    for folder in (root, *root.absolute().parents):
        if (folder / MANIFEST).is_file():
            raise ArtifactError(
                f"{root} lies in the artifact {folder}, which would no longer be what was made",
                hint="choose an output folder outside of it with --out",
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = (root / ".lock").open("w")
    except OSError as error:
        raise ArtifactError(
            f"{root} cannot be written: {error.strerror}",
            hint="choose an output folder that you may write to with --out",
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrtKdError(
                f"another run is at work in {root}", hint="wait for it, or give another --out"
            ) from error
        yield
