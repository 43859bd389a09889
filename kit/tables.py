"""Tables in Markdown."""


def table(rows: list[list]) -> str:
    """One line for each row, the first of them the header."""
    lines = [f"| {' | '.join(map(str, row))} |\n" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]) + "\n")
    return "".join(lines)
