"""``model_card.md``: what a reader of the student's weights must know, short.

In the form of Mitchell et al. 2019 (arXiv:1810.03993) as the hubs read it: a header of
metadata, then what it is, how it was made, what was measured and what it may be used for.
"""

import re
from pathlib import Path

from trt_kd.reporting.model import LineageNode, Report
from trt_kd.reporting.readings import verdict_sentence
from trt_kd.reporting.tables import comparison, markdown, plain

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
SUMMARY = """A smaller student of its teacher, pruned and recovered by distillation. It loads in
stock transformers.
"""
LIMITS = """Quality was measured on the text and tasks above only. The student inherits its
teacher's biases and errors, and pruning can widen them where nothing was measured. Evaluate it on
your own task before you rely on it.
"""


def licence_of(checkpoint: Path) -> str:
    """What the files of ``checkpoint`` say about its licence; empty where they say nothing.

    The hub's metadata at the top of README.md counts, then a licence file by its title.
    """
    readme = checkpoint / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
        found = (
            re.search(r"^license:\s*([\w.+-]+)\s*$", head[1], flags=re.MULTILINE) if head else None
        )
        if found:
            return found[1]
    for name in LICENCE_FILES:
        path = checkpoint / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((" ".join(line.split()) for line in lines if line.strip()), "")[:80]
    return ""


def model_card(report: Report, *, licence: str) -> str:
    """The card of the student that ``report`` is about."""
    spdx = re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence)
    header = [
        "---",
        *([f"license: {licence}"] if spdx else []),
        "tags: [pruning, distillation]",
        "---",
    ]
    terms = (
        f"The teacher's files name the licence {plain(licence)}; it covers the student too."
        if licence
        else "The teacher's files name no licence: look it up before sharing the student."
    )
    made = [f"{n}. {_step(node)}" for n, node in enumerate(_behind(report), 1)]
    return "\n".join(
        [
            *header,
            f"\n# {plain(report.title)}\n",
            SUMMARY,
            f"Release verdict: **{report.verdict}**. {verdict_sentence(report)}\n",
            *(f"> {plain(note)}\n" for note in report.notes),
            "## How it was made\n",
            *made,
            "\n## Results\n",
            markdown(comparison(report)),
            "## Limits\n",
            LIMITS,
            f"## Licence\n\n{terms}",
            "",
        ]
    )


def _behind(report: Report) -> list[LineageNode]:
    """Artifacts from the source to what ships of the student, each after its inputs."""
    variant = report.variant("student_quantized") or report.variant("student")
    if variant is None:
        return []
    kept = {key[:12] for part, key in variant.artifacts.items() if part != "evaluation"}
    for node in reversed(report.lineage):
        if node.key in kept:
            kept |= set(node.inputs.values())
    return [node for node in report.lineage if node.key in kept]


def _step(node: LineageNode) -> str:
    inputs = ", ".join(f"{plain(role)} `{key}`" for role, key in node.inputs.items())
    return f"{node.stage}: `{node.key}`" + (f" from {inputs}" if inputs else "")
