"""``report.md``: the same report for a repository, a pull request or a terminal."""

from trt_kd.reporting import details, latency_tables, pruning_tables, search_tables
from trt_kd.reporting.model import Report
from trt_kd.reporting.page import environment_rows, recipe_text
from trt_kd.reporting.readings import verdict_sentence
from trt_kd.reporting.tables import comparison, markdown, plain
from trt_kd.reporting.training_figure import alarm_table, training_sentence


def report_markdown(report: Report) -> str:
    """The whole report in Markdown; text from outside cannot bring in markup."""
    parts = [
        f"# {plain(report.title)}\n",
        f"**{report.verdict.capitalize()}.** {plain(verdict_sentence(report))}\n",
    ]
    parts += [f"> {plain(note)}\n" for note in report.notes]
    sections = [
        ("Gates", details.gates(report)),
        ("Result", comparison(report)),
    ]
    parts += [f"## {title}\n\n{markdown(table)}" for title, table in sections if table.rows]
    parts += _cut(report)
    parts += _search(report)
    parts += _training(report)
    sections = [
        ("What each stage cost and gave back", details.stage_costs(report)),
        ("Every workload", details.workloads(report)),
        ("Under load", details.loads(report)),
        ("Further exports", details.exports(report)),
    ]
    parts += [f"## {title}\n\n{markdown(table)}" for title, table in sections if table.rows]
    facts = [
        f"- {plain(name)}: {plain(value)}" for name, value in environment_rows(report.environment)
    ]
    parts.append("## Environment\n\n" + "\n".join(facts) + "\n")
    if report.recipe:
        fenced = "\n".join(f"    {line}" for line in recipe_text(report.recipe).splitlines())
        parts.append(f"## Recipe\n\n{fenced}\n")
    nodes = [
        f"- {plain(node.name)}: {node.stage} `{node.key}`"
        + "".join(f", {plain(role)} `{key}`" for role, key in node.inputs.items())
        for node in report.lineage
    ]
    parts.append("## Lineage\n\n" + "\n".join(nodes) + "\n")
    return "\n".join(parts)


def _cut(report: Report) -> list[str]:
    """What was cut, or nothing."""
    pruning = report.pruning
    if pruning is None:
        return []
    evidence = pruning_tables.evidence(pruning)
    tables = [
        ("Sizes", pruning_tables.sizes(report, pruning)),
        ("Layers", pruning_tables.layers(pruning)),
        ("Predicted memory", pruning_tables.memory(report, pruning)),
    ]
    return [
        "## What was cut\n\n" + markdown(pruning_tables.parts(report, pruning)),
        *([f"{evidence}\n"] if evidence else []),
        *(f"{plain(sentence)}\n" for sentence in pruning.missing),
        *(f"### {title}\n\n{markdown(table)}" for title, table in tables if table.rows),
    ]


def _search(report: Report) -> list[str]:
    """How the sizes were chosen, or nothing."""
    search = report.search
    if search is None:
        return []
    tables = [
        ("Lanes under the limit", latency_tables.corners(search)),
        ("Timed on the runtime", latency_tables.timed(search)),
        ("Candidates", search_tables.measured(search)),
        ("Tournament", search_tables.tournament(search)),
        ("Against the first choice", search_tables.comparisons(search)),
        ("The search in numbers", search_tables.facts(search)),
    ]
    return [
        "## How the sizes were chosen\n",
        *(f"{plain(text)}\n" for text in search_tables.paragraphs(search)),
        *(f"{plain(sentence)}\n" for sentence in search.missing),
        *(f"### {title}\n\n{markdown(table)}" for title, table in tables if table.rows),
    ]


def _training(report: Report) -> list[str]:
    """How the student was trained, or nothing."""
    training = report.training
    if training is None:
        return []
    alarms = alarm_table(training)
    return [
        f"## Training\n\n{plain(training_sentence(training))}\n",
        *(f"{plain(sentence)}\n" for sentence in training.missing),
        *([f"### Alarms\n\n{markdown(alarms)}"] if alarms.rows else []),
    ]
