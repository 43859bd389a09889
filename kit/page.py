"""report.md as one HTML page that holds its figures, to be mailed or opened anywhere.

It knows the Markdown that sections.py writes, and no more: headings, paragraphs, lists, tables,
fenced code, images on lines of their own; inside a line `code`, **bold** and [links](to).
"""

import base64
import html
import re

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .7rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         overflow-wrap: normal; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr:nth-child(even) td { background: #f6f6f6; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: .7rem; font-size: .8rem; }
code { background: #f0f0f0; padding: 0 .2rem; }
pre code { background: none; padding: 0; }
@media print { body { max-width: none; font-size: 10pt; } table { font-size: 7pt; }
               .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } }
"""


def as_page(markdown: str, figures: dict[str, bytes]) -> str:
    """One self-contained page. figures: {file name: PNG}, all that the text shows."""
    title = markdown.splitlines()[0].removeprefix("# ")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{as_html(markdown, figures)}\n</body>\n</html>\n"
    )


def as_html(markdown: str, figures: dict[str, bytes]) -> str:
    """The elements of the page's body, one a block of the text."""
    out = []
    # Fenced code may hold blank lines; elsewhere they part the blocks.
    for i, part in enumerate(re.split(r"^```\w*\n(.*?)^```$", markdown, flags=re.M | re.S)):
        if i % 2:
            out.append(f"<pre><code>{html.escape(part)}</code></pre>")
        else:
            out += [
                block(text.splitlines(), figures) for text in re.split(r"\n\s*\n", part.strip())
            ]
    return "\n".join(out)


def block(lines: list[str], figures: dict[str, bytes]) -> str:
    """One heading, list, table, image or paragraph."""
    if not lines:
        return ""
    first = lines[0]
    if heading := re.fullmatch(r"(#+) (.*)", first):
        level = len(heading[1])
        return f"<h{level}>{inline(heading[2])}</h{level}>"
    if first.startswith("- "):
        return "<ul>\n" + "\n".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "\n</ul>"
    if first.startswith("| "):
        rows = [[inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
        head, body = row(rows[0], "th"), "\n".join(row(cells, "td") for cells in rows[2:])
        return (
            f'<div class="wide"><table>\n<thead>\n{head}\n</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )
    if shown := re.fullmatch(r"!\[(.*)\]\((.*)\)", first):
        data = base64.b64encode(figures[shown[2]]).decode()
        return f'<img alt="{html.escape(shown[1])}" src="data:image/png;base64,{data}">'
    return f"<p>{inline(' '.join(lines))}</p>"


def row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def inline(text: str) -> str:
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[(.+?)\]\((.+?)\)", r'<a href="\2">\1</a>', text)
