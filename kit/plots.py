"""matplotlib as our figures need it, whatever the surroundings ask for.

No window (MPLBACKEND), no LaTeX, none of the user's own settings (matplotlibrc); and fonts for the
class names, where the machine has any.
"""

import logging
import os
import sys
from contextlib import suppress

os.environ["MPLBACKEND"] = "Agg"  # before the import, which fails for one that is not installed

import matplotlib
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

__all__ = ["legible", "matplotlib", "plt"]

logging.getLogger("matplotlib").setLevel(logging.ERROR)
matplotlib.rcdefaults()
plt.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    "pdf.fonttype": 42,  # no Type 3 fonts, which journals refuse
    "svg.hashsalt": "the same figure is the same file",
})  # fmt: skip


def legible(names: list[str]) -> list[str]:
    """The names, with fonts for all their characters set; else numbers from 0 on, and a note."""
    missing = {ord(c) for c in "".join(names) if not c.isspace()}
    families = list(plt.rcParams["font.family"])
    own = [font_manager.findfont(font_manager.FontProperties(family=[f])) for f in families]
    others = {font.fname for font in font_manager.fontManager.ttflist if "Last" not in font.name}
    for path in [*own, *sorted(others)]:  # Last Resort has a box for every character
        with suppress(RuntimeError):  # some cannot be read, such as those of coloured pictures
            font = FT2Font(path)
            found = missing & font.get_charmap().keys() if missing else set()
            missing -= found
            families += [font.family_name] if found and path not in own else []
    plt.rcParams["font.family"] = families
    if not missing:
        return names
    example = chr(min(missing))
    print(f"note: no font here has {example!r}: figures show class numbers", file=sys.stderr)
    return list(map(str, range(len(names))))
