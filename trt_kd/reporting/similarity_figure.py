"""The similarity of two models' layers as a picture."""

from collections.abc import Sequence
from pathlib import Path

from trt_kd.errors import ConfigError
from trt_kd.reporting.drawing import canvas
from trt_kd.training.pairing import Judged

FORMATS = (".svg", ".png")
HEIGHT = 3.6
"""Inches."""


def check_figure(path: Path) -> None:
    """Check, before anything is measured, that a picture can be written there.

    Raises:
        ConfigError: if the format is not known or the folder does not exist.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"a figure cannot be written as {path.suffix or path.name!r}",
            hint=f"end its name with {' or '.join(FORMATS)}",
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder", hint="make it first")


def draw_similarity(
    similarity: Sequence[Sequence[float]], pairs: Sequence[Judged], path: Path
) -> None:
    """Write the matrix as a heat map, the pairs marked, the weak ones with a cross.

    Args:
        similarity: CKA, a row for every layer of the student.
        pairs: to be marked.
        path: ends with ``.svg`` or ``.png``.

    Raises:
        ConfigError: if it cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    with canvas(HEIGHT) as figure:
        axes = figure.add_subplot()
        figure.patch.set_visible(True)
        figure.patch.set_facecolor("white")
        axes.grid(visible=False)
        image = axes.imshow(similarity, vmin=0.0, vmax=1.0, cmap="viridis", origin="lower")
        for marker, name, weak in (("o", "pair", False), ("x", "weak pair", True)):
            chosen = [pair for pair in pairs if pair.weak is weak]
            if chosen:
                columns, rows = [p.teacher for p in chosen], [p.student for p in chosen]
                axes.scatter(columns, rows, marker=marker, color="#d55e00", s=28, label=name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("teacher's layer")
        axes.set_ylabel("student's layer")
        if pairs:
            figure.legend(loc="outside upper right", ncols=2, frameon=False)
        figure.colorbar(image, ax=axes, label="linear CKA")
        try:
            figure.savefig(path, dpi=200)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}",
                hint="choose a folder that you may write to",
            ) from error
