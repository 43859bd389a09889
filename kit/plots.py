"""matplotlib for our figures: no window, LaTeX or user's matplotlibrc; fonts for class names."""

import logging
import os
import sys
from contextlib import suppress

os.environ["MPLBACKEND"] = "Agg"  # before the import, which fails if the user's backend is missing

import matplotlib
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.ft2font import FT2Font

logging.getLogger("matplotlib").setLevel(logging.ERROR)
matplotlib.rcdefaults()
plt.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    "pdf.fonttype": 42,  # no Type 3 fonts, which journals refuse
    "svg.hashsalt": "the same figure is the same file",
})  # fmt: skip
MEASURE = RendererAgg(1, 1, dpi=200)


def legible(names: list[str]) -> list[str]:
    """The names, with fonts set for all their characters; failing that, numbers, and a note."""
    missing = {ord(c) for c in "".join(names) if not c.isspace()}
    families = list(plt.rcParams["font.family"])
    own = [font_manager.findfont(font_manager.FontProperties(family=[f])) for f in families]
    # The Last Resort font has a box for every character.
    others = {font.fname for font in font_manager.fontManager.ttflist if "Last" not in font.name}
    for path in [*own, *sorted(others)]:
        with suppress(RuntimeError, OSError):  # colour bitmaps; a deleted font
            font = FT2Font(path)
            if missing and (found := missing & font.get_charmap().keys()):
                missing -= found
                families += [font.family_name] * (path not in own)
    plt.rcParams["font.family"] = families
    if not missing:
        return names
    lacking = repr(chr(min(missing)))
    print(f"note: no installed font has {lacking}: figures show class numbers", file=sys.stderr)
    return list(map(str, range(len(names))))


def shortened(name: str, width: float, size: float) -> str:
    """The name on one line, its middle cut if wider than `width` inches; size in points."""
    name, font = " ".join(name.split()), font_manager.FontProperties(size=size)
    for kept in range(len(name), -1, -1):
        left_out = "…" if kept < len(name) else ""
        text = name[: kept - kept // 2] + left_out + name[len(name) - kept // 2 :]
        if MEASURE.get_text_width_height_descent(text, font, ismath=False)[0] <= 200 * width:
            break
    return text
