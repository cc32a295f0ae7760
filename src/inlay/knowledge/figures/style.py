"""What all figures share: size, colours (Okabe and Ito's, told apart by everybody), and how they are saved."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.core.files import replace_file, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREEN, RED, BLUE, SKY, ORANGE, PINK, GREY, INK = (
    "#009E73 #D55E00 #0072B2 #56B4E9 #E69F00 #CC79A7 #999999 #222222".split()
)
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK, "#8C6D31")
MARKS = "osD^vPX*"
STATE = {"learned": GREEN, "approached": SKY, "stalled": "#CCCCCC", "away": RED}
ARROW = {"green": GREEN, "red": RED, "grey": GREY}


@dataclass(frozen=True)
class Drawn:
    """A figure that is ready to be saved."""

    name: str
    """File name without ending."""
    title: str
    words: str
    """What is to be seen, for a reader who knows no manual."""
    figure: Figure
    twin: dict[str, Any]
    """All numbers of the figure."""

    @functools.cached_property
    def png(self) -> bytes:
        """The picture."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=140, facecolor="white", metadata={"Software": ""})
        return out.getvalue()

    def save(self, folder: Path) -> None:
        """Write `<name>.png` and `<name>.json`."""
        replace_file(folder / f"{self.name}.png", lambda f: f.write_bytes(self.png))
        told = {"name": self.name, "title": self.title, "words": self.words, **self.twin}
        write_text(folder / f"{self.name}.json", json.dumps(plain(told), ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """JSON values: arrays as lists, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def sheet(columns: int = 1, rows: int = 1, wide: float = 4.6, high: float = 3.4, **more: Any) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns), or one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InlayError("figures need matplotlib: pip install 'inlay[knowledge]'") from e
    made = Figure(figsize=(wide * columns, high * rows), layout="constrained")
    axes = made.subplots(rows, columns, **more)
    for one in np.ravel(axes):
        calm(one)
    return made, axes


def calm(axes: Axes) -> None:
    """Less ink: no frame on top and right, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def say(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Label the axes."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=9.5, loc="left")


def legend(axes: Axes, **more: Any) -> None:
    """A legend, where there is anything to tell apart."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, **more)


def legend_below(axes: Axes, columns: int = 3) -> None:
    """The same, under the axes, where curves fill the panel."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def share(axes: Axes, low: float = -0.03, high: float = 1.03) -> None:
    """The y axis of a share."""
    axes.set_ylim(low, high)
