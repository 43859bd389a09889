"""Cells and tables of the report, in Markdown."""

from kit.results import Study

Lines = list[str]


def table(header: Lines, rows: list[Lines]) -> Lines:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]


def image(name: str) -> str:
    caption = name.removesuffix(".png").replace("_", " ").replace(" vs ", " against ")
    return f"![{caption}]({name})"


def label(study: Study, model: str) -> str:
    return f"{model} (quick)" if study.quick else model


def interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def p_value(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.001 else number(p, ".3f")
