"""The figure of what was cut: how sensitive every layer is, and what its cut cost.

Dropped layers are hatched and crossed, the plain cut is hollow and the refit filled, projections
differ in shape, so nothing hangs on colour alone.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trt_kd.reporting.drawing import GRID, INK, Drawing, canvas, svg_of
from trt_kd.reporting.formatting import MINUS
from trt_kd.reporting.model import LayerCut, Pruning, Refitted
from trt_kd.reporting.pruning_tables import PROJECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Layer by layer"
SHAPES = {
    "attention": ("^", "#009e73", -0.22),
    "output": ("s", "#d55e00", 0.22),
    "mlp": ("v", "#cc79a7", -0.11),
    "router": ("P", "#56b4e9", 0.33),
    "experts": ("D", "#8a6d00", 0.11),
    "down": ("o", "#0087c7", 0.0),
}
"""Marker, colour and shift to the right, in layers."""
PANEL, LEGEND = 2.1, 0.25
"""Inches."""


def layer_figure(pruning: Pruning) -> Drawing | None:
    """Block influence, and energy lost before and after the refit; None without numbers."""
    scored = any(layer.block_influence is not None for layer in pruning.layers)
    kinds = list(dict.fromkeys(r.projection for layer in pruning.layers for r in layer.refits))
    panels = scored + bool(kinds)
    if not panels:
        return None
    with canvas(0.4 + PANEL * panels + LEGEND * len(kinds)) as figure:
        found = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
        for axes in found:
            _mark_dropped(axes, pruning.layers)
        if scored:
            _influence(found[0], pruning.layers)
        if kinds:
            _energy(found[-1], pruning.layers, kinds)
        found[-1].set_xlim(-0.7, len(pruning.layers) - 0.3)
        found[-1].xaxis.get_major_locator().set_params(integer=True)
        found[-1].set_xlabel("layer of the model before the cut")
        svg = svg_of(figure, TITLE)
    return Drawing(TITLE, _text(pruning, kinds, scored=scored), svg)


def _mark_dropped(axes: "Axes", layers: Sequence[LayerCut]) -> None:
    for layer in layers:
        if layer.kept is False:
            axes.axvspan(
                layer.layer - 0.5, layer.layer + 0.5,
                facecolor="none", edgecolor=GRID, hatch="////", linewidth=0, zorder=0,
            )  # fmt: skip


def _influence(axes: "Axes", layers: Sequence[LayerCut]) -> None:
    values = [(x.layer, x.block_influence, x.kept) for x in layers if x.block_influence is not None]
    from matplotlib.ticker import LogLocator, NullLocator

    least = min(value for _, value, _ in values)
    most = max(value for _, value, _ in values)
    for dropped, marker, colour in ((False, "o", "#0087c7"), (True, "x", INK)):
        part = [(n, value) for n, value, kept in values if (kept is False) == dropped]
        axes.plot(
            [n for n, _ in part], [value for _, value in part], linestyle="none",
            marker=marker, markersize=5, markeredgewidth=1.6, color=colour, zorder=3,
        )  # fmt: skip
    note = ""
    if least > 0 and most > 8 * least:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        note = " (log scale)"
    else:
        axes.set_ylim(min(0.0, 1.1 * least), 1.1 * most or 1.0)
    axes.set_ylabel(f"block influence{note}")


def _energy(axes: "Axes", layers: Sequence[LayerCut], kinds: Sequence[str]) -> None:
    kept = [layer for layer in layers if layer.kept is not False]
    highest = 0.0
    for kind in kinds:
        marker, colour, shift = SHAPES[kind]
        shift *= len(kinds) > 1
        plain = _losses(kept, kind, shift, lambda refit: refit.plain_energy_lost)
        refit = _losses(kept, kind, shift, lambda refit: refit.refit_energy_lost)
        if len(plain) == len(refit):
            axes.vlines(
                [x for x, _ in plain], [y for _, y in refit], [y for _, y in plain],
                color=colour, linewidth=1, alpha=0.6,
            )  # fmt: skip
        for name, points, fill in (
            ("plain cut", plain, "none"),
            ("after the refit", refit, colour),
        ):
            if points:
                axes.plot(
                    *zip(*points, strict=True), linestyle="none", marker=marker, markersize=5,
                    markeredgewidth=1.4, color=colour, markerfacecolor=fill,
                    label=f"{kind}: {name}", zorder=3,
                )  # fmt: skip
        highest = max([highest, *(y for _, y in plain + refit)])
    highest = highest or 1.0
    axes.set_ylim(-0.03 * highest, 1.08 * highest)
    axes.set_ylabel("output energy lost (%)")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0,
        handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip


def _losses(
    layers: Sequence[LayerCut],
    kind: str,
    shift: float,
    read: Callable[[Refitted], float | None],
) -> list[tuple[float, float]]:
    """Place and percentage of every loss of one kind of projection."""
    found = [
        (layer.layer + shift, read(refit))
        for layer in layers
        for refit in layer.refits
        if refit.projection == kind
    ]
    return [(place, 100 * value) for place, value in found if value is not None]


def _text(pruning: Pruning, kinds: Sequence[str], *, scored: bool) -> str:
    parts = [f"{TITLE}."]
    if scored:
        parts.append(
            f"Block influence: 1 {MINUS} cosine of a layer's input and output, mean over tokens."
        )
    if kinds:
        named = " and of the ".join(PROJECTIONS[kind] for kind in kinds)
        parts.append(
            f"Energy lost: squared error of the output of the {named}, over the squared output; "
            "hollow for the plain cut, filled after the refit."
        )
    dropped = [str(layer.layer) for layer in pruning.layers if layer.kept is False]
    if dropped:
        crossed = "crossed and hatched" if scored else "hatched"
        parts.append(f"Dropped layers, {crossed}: {', '.join(dropped)}.")
    elif all(layer.kept for layer in pruning.layers):
        parts.append("No layer was dropped.")
    return " ".join(parts)
