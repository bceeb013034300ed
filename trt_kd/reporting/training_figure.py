"""The figure of the training: losses over the steps, with the alarms where they were raised.

Curves differ in dashes and marks, alarms are numbered as in their table, so nothing hangs on colour
alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kd.reporting.drawing import INK, Drawing, canvas, svg_of
from trt_kd.reporting.tables import Cell, Row, Table
from trt_kd.reporting.training_model import Curve, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Losses over the steps"
STYLES = (
    ("#0087c7", "-"), ("#d55e00", (0, (5, 1.5))), ("#009e73", (0, (1.5, 1.5))),
    ("#cc79a7", (0, (6, 1.5, 1.5, 1.5))), ("#8a8a8a", (0, (3, 3))), ("#e69f00", (0, (8, 2))),
    ("#56b4e9", (0, (2, 4))),
)  # fmt: skip
"""Colour and dashes of the curves in turn."""
FEW = 40
"""A curve of at most so many points has them marked: it was measured and not logged by step."""
HEIGHT, LEGEND_ROW = 2.9, 0.22
"""Inches, without the legend, and of each of its rows."""


def training_figure(training: Training) -> Drawing | None:
    """Every curve and alarm, or None where there is no curve."""
    curves = training.curves
    if not curves:
        return None
    with canvas(HEIGHT + LEGEND_ROW * -(-len(curves) // 2)) as figure:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw(axes, curve, number)
        for number, alarm in enumerate(training.alarms, 1):
            axes.axvline(alarm.step, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
            text = axes.annotate(
                str(number), (alarm.step, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                textcoords="offset points",
            )  # fmt: skip
            text.set_in_layout(False)
        _scale(axes, curves)
        axes.set_xlabel("step")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0,
            handletextpad=0.4, columnspacing=1.0,
        )  # fmt: skip
        svg = svg_of(figure, TITLE)
    marks = " Dashed upright lines: alarms, numbered as in the table." if training.alarms else ""
    return Drawing(TITLE, f"{TITLE}; held-out values were measured every few steps.{marks}", svg)


def alarm_table(training: Training) -> Table:
    """Every alarm that was raised, in the order of the figure's numbers."""
    rows = [
        Row(
            f"{number}. {alarm.name}",
            [Cell(str(alarm.step)), Cell(alarm.says), Cell(alarm.advice)],
        )
        for number, alarm in enumerate(training.alarms, 1)
    ]
    return Table("Alarm", ["Step", "What was seen", "What helps"], rows)


def training_sentence(training: Training) -> str:
    """How long the training was and whether it raised an alarm."""
    parts = []
    if training.steps is not None and training.tokens is not None:
        parts.append(f"{training.steps:,} steps on {training.tokens:,} tokens.")
    if training.monitor_s is not None:
        parts.append(f"Measuring on held-out text took {training.monitor_s:.1f} s beside them.")
    if not any("Alarms" in sentence for sentence in training.missing):
        count = len(training.alarms)
        said = (
            "No alarm was" if not count else "1 alarm was" if count == 1 else f"{count} alarms were"
        )
        parts.append(f"{said} raised.")
    return " ".join(parts)


def _draw(axes: "Axes", curve: Curve, number: int) -> None:
    colour, dashes = STYLES[number % len(STYLES)]
    axes.plot(
        curve.steps, curve.values, color=colour, linestyle=dashes, linewidth=1.5, label=curve.name,
        marker="o" if len(curve.steps) <= FEW else "", markersize=3.5,
    )  # fmt: skip


def _scale(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Logarithmic where values span decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for curve in curves for value in curve.values]
    axes.set_ylabel("nats per token")
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("nats per token (log scale)")
