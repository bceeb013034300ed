"""What each layer costs in each low-bit format, as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_kd.reporting.drawing import canvas
from trt_kd.reporting.training_figure import STYLES

HEIGHT = 3.2
"""Inches."""

Costs = Mapping[str, Mapping[str, Any]]
"""By format: ``layer_kl_nats``, one number for each layer, and ``whole_kl_nats``."""


def sensitivity_rows(costs: Costs) -> list[list[str]]:
    """Rows of the table, the heading first: layers, their sum, all of them together."""
    columns = [[*one["layer_kl_nats"]] for one in costs.values()]
    rows = [["layer", *costs]]
    rows += [
        [str(layer), *map(_nats, values)] for layer, values in enumerate(zip(*columns, strict=True))
    ]
    rows.append(["sum", *(_nats(sum(column)) for column in columns)])
    rows.append(["all at once", *(_nats(one["whole_kl_nats"]) for one in costs.values())])
    return rows


def sensitivity_table(costs: Costs) -> str:
    """The table in Markdown."""
    heading, *rows = sensitivity_rows(costs)
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    caption = "KL to the original in nats per token, one layer quantized at a time."
    return f"{caption}\n\n{table}\n"


def draw_sensitivity(costs: Costs, path: Path) -> None:
    """Write the cost of every layer, a curve for each format, to the ``.svg`` or ``.png`` file.

    Costs are drawn on a logarithmic scale where all are positive.
    """
    from matplotlib.ticker import MaxNLocator

    metadata = {"Date": None} if path.suffix == ".svg" else None
    with canvas(HEIGHT) as figure:
        axes = figure.add_subplot()
        figure.patch.set_visible(True)
        figure.patch.set_facecolor("white")
        for number, (name, one) in enumerate(costs.items()):
            colour, dashes = STYLES[number % len(STYLES)]
            values = one["layer_kl_nats"]
            axes.plot(
                range(len(values)), values, color=colour, linestyle=dashes, marker="o",
                markersize=3.5, linewidth=1.5, label=name,
            )  # fmt: skip
        if all(value > 0 for one in costs.values() for value in one["layer_kl_nats"]):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer that is quantized")
        axes.set_ylabel("KL to the original (nats per token)")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        figure.savefig(path, dpi=200, metadata=metadata)


def _nats(value: float) -> str:
    return f"{value:.2e}"
