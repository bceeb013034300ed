"""The table of docs/lanes.md is what the lanes themselves say."""

import re
from dataclasses import replace
from pathlib import Path

from trt_kd.architectures import ARCHITECTURES
from trt_kd.architectures.shape import ModelShape
from trt_kd.exporters import EXPORTERS

PAGE = Path(__file__).parents[2] / "docs/lanes.md"
SHAPE = ModelShape("llama", 2, 128, 256, 4, 2, 32, 512, tied=True)
EXPERTS = {"mixtral", "qwen3_moe"}


def table() -> str:
    """One row per model type, one column per lane: what ``check`` says of a plain checkpoint."""
    lanes = {name: EXPORTERS.load(name)() for name in EXPORTERS.names()}
    rows = [f"| model type | {' | '.join(f'`{name}`' for name in lanes)} |"]
    rows.append("| --- " * (len(lanes) + 1) + "|")
    for kind in ARCHITECTURES.names():
        shape = replace(SHAPE, model_type=kind)
        if kind in EXPERTS:
            shape = replace(shape, experts=4, experts_per_token=2, expert_ffn=64)
        marks = ["yes" if not lane.check(shape, "checkpoint") else "-" for lane in lanes.values()]
        rows.append(f"| {kind} | {' | '.join(marks)} |")
    return "\n".join(rows)


def test_the_table_of_the_page_is_the_lanes_own():
    page = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"(\| model type \|.*?)\n\n", page, re.DOTALL)
    assert found == table(), f"\n{table()}"
