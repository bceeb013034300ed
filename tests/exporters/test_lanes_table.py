"""The table of docs/lanes.md is what the lanes themselves say."""

import re
from dataclasses import replace
from pathlib import Path

from trt_kd.architectures import ARCHITECTURES
from trt_kd.architectures.shape import ModelShape
from trt_kd.config import build_plugin
from trt_kd.exporters import EXPORTERS
from trt_kd.quantization import FORMATS

PAGE = Path(__file__).parents[2] / "docs/lanes.md"
SHAPE = ModelShape("llama", 2, 128, 256, 4, 2, 32, 512, tied=True)
SETTINGS = {"recipe": {"kind": "recipe", "name": "fp8_default-kv_fp8"}}
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


def formats_table() -> str:
    """One row per number format, one column per lane: what both checks say of a quantized llama."""
    lanes = {name: EXPORTERS.load(name)() for name in EXPORTERS.names()}
    rows = [f"| format | {' | '.join(f'`{name}`' for name in lanes)} |"]
    rows.append("| --- " * (len(lanes) + 1) + "|")
    for kind in FORMATS.names():
        form = build_plugin(FORMATS, SETTINGS.get(kind, kind))
        marks = [
            "-" if lane.check(SHAPE, "quantized") or lane.check_format(SHAPE, form) else "yes"
            for lane in lanes.values()
        ]
        rows.append(f"| `{kind}` | {' | '.join(marks)} |")
    return "\n".join(rows)


def test_the_table_of_formats_is_the_lanes_own():
    page = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"(\| format \| `hf-unified`.*?)\n\n", page, re.DOTALL)
    assert found == formats_table(), f"\n{formats_table()}"


def test_the_table_of_the_page_is_the_lanes_own():
    page = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"(\| model type \|.*?)\n\n", page, re.DOTALL)
    assert found == table(), f"\n{table()}"
