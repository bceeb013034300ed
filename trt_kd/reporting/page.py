"""``report.html``: one file, no script, nothing fetched, every text escaped."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trt_kd.reporting import details, latency_tables, pruning_tables, search_tables, tables
from trt_kd.reporting.figures import figures
from trt_kd.reporting.formatting import bytes_text
from trt_kd.reporting.model import Report
from trt_kd.reporting.pruning_figure import layer_figure
from trt_kd.reporting.readings import headline, verdict_sentence
from trt_kd.reporting.search_figure import search_figures
from trt_kd.reporting.training_figure import alarm_table, training_figure, training_sentence

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"


def page(report: Report) -> str:
    """The whole page."""
    from markupsafe import Markup

    return _template().render(
        report=report,
        sentence=verdict_sentence(report),
        headline=headline(report),
        gates=details.gates(report),
        comparison=tables.comparison(report),
        figures=[(drawing.text, Markup(drawing.svg)) for drawing in figures(report)],
        cut=_cut(report),
        search=_search(report),
        training=_training(report),
        workloads=details.workloads(report),
        loads=details.loads(report),
        costs=details.stage_costs(report),
        exports=details.exports(report),
        environment=environment_rows(report.environment),
        recipe=recipe_text(report.recipe),
    )


def _cut(report: Report) -> dict[str, Any] | None:
    """Tables and figure of what was cut."""
    from markupsafe import Markup

    pruning = report.pruning
    if pruning is None:
        return None
    drawing = layer_figure(pruning)
    return {
        "parts": pruning_tables.parts(report, pruning),
        "sizes": pruning_tables.sizes(report, pruning),
        "layers": pruning_tables.layers(pruning),
        "memory": pruning_tables.memory(report, pruning),
        "evidence": pruning_tables.evidence(pruning),
        "missing": pruning.missing,
        "figure": (drawing.text, Markup(drawing.svg)) if drawing else None,
    }


def _search(report: Report) -> dict[str, Any] | None:
    """Sentences, tables and figures of how the sizes were chosen."""
    from markupsafe import Markup

    search = report.search
    if search is None:
        return None
    return {
        "paragraphs": search_tables.paragraphs(search),
        "facts": search_tables.facts(search),
        "measured": search_tables.measured(search),
        "comparisons": search_tables.comparisons(search),
        "tournament": search_tables.tournament(search),
        "corners": latency_tables.corners(search),
        "timed": latency_tables.timed(search),
        "missing": search.missing,
        "figures": [(drawing.text, Markup(drawing.svg)) for drawing in search_figures(search)],
    }


def _training(report: Report) -> dict[str, Any] | None:
    """Sentence, figure and alarms of the training."""
    from markupsafe import Markup

    training = report.training
    if training is None:
        return None
    drawing = training_figure(training)
    return {
        "sentence": training_sentence(training),
        "alarms": alarm_table(training),
        "missing": training.missing,
        "figure": (drawing.text, Markup(drawing.svg)) if drawing else None,
    }


def recipe_text(recipe: dict[str, Any]) -> str:
    """The resolved recipe as YAML, in its own order."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=88) if recipe else ""


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every known fact about the machine."""
    rows = []
    for name, value in environment.items():
        if value is None:
            continue
        size = name.endswith("_bytes") and isinstance(value, int | float)
        label = name.removesuffix("_bytes").replace("_", " ")
        rows.append((label, bytes_text(value) if size else str(value)))
    return rows


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
