"""Report: put every number side by side, judge the gates, write the page."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError
from trt_kd.reporting.gates import Gate
from trt_kd.reporting.model import Report, Role

REHEARSED = "Rehearsal: a shrunken run that shows that every stage works. The numbers mean nothing."


class ReportConfig(StageConfig):
    """What stands on the report and what decides."""

    stage: ClassVar[str] = "report"

    title: str = Field(default="Compression report", min_length=1)
    """Heading."""
    baseline: Role = "teacher"
    """The first row, against which every change is given."""
    gates: list[Gate] = []
    """Limits that decide release; none leaves the verdict undecided."""
    roles: dict[Role, str] = {}
    """What rows are called, by role; a role left out gets a plain name. Where any is given, gates
    may only name these."""
    recipe: dict[str, Any] = {}
    """Resolved settings of the whole run, to be shown."""
    notes: list[str] = []
    """What a reader must know before believing a number; shown below the verdict."""

    @model_validator(mode="after")
    def _gates_fit(self) -> Self:
        names = [gate.name for gate in self.gates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"gates: the name {twice[0]!r} stands twice")
        for index, gate in enumerate(self.gates):
            for role in gate.roles:
                if self.roles and role not in self.roles:
                    known = ", ".join(self.roles)
                    raise ValueError(f"gates.{index}: no role {role!r} here; roles: {known}")
        return self

    def rehearsal(self) -> Self:
        """The same gates, with a note that the numbers mean nothing."""
        return self.model_copy(update={"notes": [*self.notes, REHEARSED]})


def report(config: ReportConfig, *, out: Path, **inputs: Artifact) -> Artifact:
    """Write ``report.html``, ``report.md``, ``report.json`` and ``model_card.md`` to ``out``.

    Inputs by name: ``<role>.model`` (checkpoint), ``<role>.shipped`` (export; absent: the
    checkpoint ships), ``<role>.evaluation``, ``benchmark`` and ``export.<name>``.

    Raises:
        ArtifactError: if an input has another name, is damaged, or the baseline has no model.
    """
    from trt_kd.reporting.markdown import report_markdown
    from trt_kd.reporting.model_card import licence_of, model_card
    from trt_kd.reporting.page import page

    with writing(out, kind="report", config=config, inputs=inputs) as draft:
        made = make_report(config, inputs)
        source = inputs.get("teacher.model")
        recorded = str(source.metrics.get("license") or "") if source else ""
        licence = recorded or (licence_of(source.path) if source else "")
        texts = {
            "report.json": made.model_dump_json(indent=2) + "\n",
            "report.md": report_markdown(made),
            "report.html": page(made),
            "model_card.md": model_card(made, licence=licence),
        }
        for name, text in texts.items():
            (draft.path / name).write_text(text, encoding="utf-8")
        draft.metrics["verdict"] = made.verdict
        draft.metrics["gates"] = {gate.name: gate.verdict for gate in made.gates}
    return Artifact.open(out, expect="report")


def make_report(config: ReportConfig, inputs: Mapping[str, Artifact]) -> Report:
    """Collect the rows, then judge every gate on them.

    Raises:
        ArtifactError: if an input has another name, is damaged, or the baseline has no model.
    """
    from trt_kd.reporting import collect
    from trt_kd.reporting.proposals import proposals
    from trt_kd.reporting.pruning import pruning_of
    from trt_kd.reporting.search import search_of
    from trt_kd.reporting.training import training_of
    from trt_kd.reporting.verdicts import decide, overall

    sources = collect.sort_inputs(inputs)
    rows = collect.variants(sources, baseline=config.baseline, names=config.roles)
    found = Report(
        name=str(config.recipe.get("name", "report")),
        title=config.title,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        verdict="undecided",
        baseline=config.baseline,
        variants=rows,
        exports=collect.export_rows(sources),
        pruning=pruning_of(sources, rows),
        search=search_of(sources),
        training=training_of(sources),
        environment=collect.environment_of(sources),
        recipe=config.recipe,
        lineage=collect.lineage(inputs),
        notes=[*config.notes, *collect.notes(sources)],
    )
    evidence = collect.evidence(sources)
    found = found.model_copy(update={"notes": [*found.notes, *proposals(found, evidence)]})
    judged = [decide(gate, found, evidence) for gate in config.gates]
    notes = found.notes if judged else [*found.notes, "No gates: nothing decides release."]
    verdict = overall(gate.verdict for gate in judged)
    return found.model_copy(update={"gates": judged, "verdict": verdict, "notes": notes})


def read_report(directory: Path) -> Report:
    """Read ``report.json`` of the report artifact in ``directory``.

    Raises:
        ArtifactError: if there is none or it does not follow the schema.
    """
    artifact = Artifact.open(directory, expect="report")
    path = artifact.path / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}",
            hint=f"remove {directory} and run the report stage again",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise ArtifactError(
            f"{path} is damaged at {where}: {first['msg']}",
            hint=f"remove {directory} and run the report stage again",
        ) from error
