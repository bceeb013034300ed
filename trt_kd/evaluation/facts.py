"""Common knowledge that a small model has: written for this project, kept as data beside this."""

import json
from importlib.resources import files
from typing import Literal

from trt_kd.data.base import DataConfig
from trt_kd.evaluation.task import ChoiceItem, ChoiceTask


class Facts(ChoiceTask):
    """Complete a statement of common knowledge: capitals, elements, opposites, history and more."""

    kind: Literal["facts"] = "facts"

    def items(self, data: DataConfig, *, limit: int, seed: int) -> list[ChoiceItem]:
        """The first ``limit`` items of the file, whose order mixes the topics."""
        text = files(__package__).joinpath("facts.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()[:limit]]
        return [ChoiceItem(row["prompt"], tuple(row["choices"]), row["answer"]) for row in rows]
