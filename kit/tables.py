"""Tables in Markdown."""


def table(rows: list[list]) -> str:
    """One line for each row, the first of them the header; aligned, for the terminal too."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)
