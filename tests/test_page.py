"""The page and the table for papers: safe whatever a file holds, legible, complete."""

import functools
import html
import json
import operator
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import report
from kit import words
from kit.figures import FIGURES

import pytest
from conftest import ROW


class Elements(HTMLParser):
    """The tags of a page, and its text in one string."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = Counter(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text += data


def test_nothing_is_loaded_from_elsewhere(study):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(list(out.glob("*.png"))) > 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert "default-src 'none'" in page and "script-src" not in page
    assert {"table", "ul", "pre", "img", "strong", "h3"} < Elements(page).tags.keys()


HOSTILE = [
    "<script>alert(1)</script>", '[x](" onfocus="alert(1)) ![y](z.png)', "a|b `c` *d* __e__ _f_",
    "```\n# title\n<b>", "&lt;i&gt; $\\frac{1}{2}$ ~~g~~ <!-- h",
    "\u202e\x02wzxhzdk:0\x03\r\n\n## i",
]  # fmt: skip


def test_what_comes_from_outside_stays_text(study, monkeypatch):
    """In class names, folders, settings, machines and commands."""
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})
    runs, out = study
    arguments = ["--runs", str(runs), "--out", str(out)]

    def change(of):
        for path in runs.glob("*/*/*/*/*.json"):
            content = json.loads(path.read_text())
            if path.name == "result.json":
                classes = [of, "golden_retriever", *map(str, range(8))]
                content |= {"classes": classes, "device": of, "overrides": {"lr": of}}
                content |= {"fallback": of}
            own = {"torch": of, "date": of, "git_commit": of, "changes": [of], "command": of}
            own |= {"overrides": {"lr": of}}
            path.write_text(json.dumps(content | ({} if path.name == "result.json" else own)))
        rows = [ROW | {"model": m, "device": of, "torch": of} for m in report.PUBLISHED]
        (out / "benchmark.json").write_text(json.dumps(rows))
        for begun in runs.glob("begun*"):
            shutil.rmtree(begun)
        folder = runs / ("begun" + of.replace("/", "")) / "seed0"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert report.main(arguments) == 0
        return Elements((out / "report.html").read_text()), (out / "report.md").read_text()

    plain, plain_text = change("plain")
    for name in HOSTILE:
        hostile, text = change(name)
        assert hostile.tags == plain.tags
        assert len(text.splitlines()) == len(plain_text.splitlines())
        shown = re.sub("[\u202e\x02\x03\\s]+", " ", name).strip()
        assert shown in " ".join(hostile.text.split())


def in_chromium(page, folder):
    """What the body of a page says when Chromium has run its scripts."""
    (folder / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    flags += ["--virtual-time-budget=9000"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return html.unescape(re.search(r"measured (.*) end", done.stdout, re.DOTALL)[1])


def leaves(value, path=()):
    """The paths of all strings in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        if isinstance(child, str):
            yield *path, key
        elif isinstance(child, (dict, list)):
            yield from leaves(child, (*path, key))


HACK = "document.title='CHANGED'"
ATTACKS = [
    f"</td></pre></title><script>{HACK}</script><img src=x onerror={HACK}><svg onload={HACK}>",
    f'[x](" autofocus onfocus="{HACK}") ![](x"onerror="{HACK}) [j](javascript:{HACK}) <!--',
    f"x\n\n```\n\n# $\\frac{{1}}{{2}}$ \u202e<b>\n\n<script>{HACK}</script>",
]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_string_of_any_file_changes_the_page(explained, monkeypatch, attack):
    """In Chromium, with scripts allowed: the title stays, and no element that acts appears."""
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})
    runs, out = explained / "runs", explained / "out"
    (out / "benchmark.json").write_text(json.dumps([ROW | {"model": "cbam_blocks", "width": 8}]))
    files = [*runs.glob("*/*/*/seed0/*.json"), *out.glob("*.json")]
    pages = []
    for path in files:
        before = path.read_text()
        for *parents, key in leaves(json.loads(before)):
            content = json.loads(before)
            functools.reduce(operator.getitem, parents, content)[key] = attack
            path.write_text(json.dumps(content))
            assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
            pages.append((out / "report.html").read_text())
        path.write_text(before)
    frames = "".join(
        f'<iframe srcdoc="{html.escape(p.replace("default-src", "x-src"))}"></iframe>'
        for p in pages
    )
    look = (
        "<script>onload = () => setTimeout(() => { document.body.innerText = 'measured ' +"
        "JSON.stringify([...document.getElementsByTagName('iframe')].map(f => f.contentDocument)"
        ".map(d => [d.title, ...new Set([...d.querySelectorAll('*')].flatMap(e =>"
        "[e.tagName, ...e.getAttributeNames()]))])) + ' end' }, 500)</script>"
    )
    found = json.loads(in_chromium(f"<!doctype html><body>{frames}{look}</body>", explained))
    assert len(found) == len(pages) >= 60 and sum("CHANGED" in page for page in pages) > 20
    for title, *names in found:
        assert title == "Does attention earn its keep in ResNet-18?"
        assert not {"SCRIPT", "SVG", "FORM", "INPUT", "OBJECT", "BASE"} & set(names)
        assert not [name for name in names if name.startswith("on") or name == "autofocus"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [1100, 400])
def test_the_page_fits_the_screen(study, tmp_path, width):
    """In headless Chromium: nothing has a scroll bar, and every figure is shown."""
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    measure = (
        "<script>onload = () => { parent.document.body.innerText = 'measured ' + [innerWidth,"
        "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth"
        " && e.clientWidth).length, [...document.images].filter(i => i.width > 200"
        " && i.naturalWidth).length].join(' ') + ' end' }</script>"
    )
    page = (out / "report.html").read_text().replace("</body>", measure + "</body>")
    page = page.replace("default-src 'none'", "script-src 'unsafe-inline'")
    # In a frame: a window of Chromium itself is never narrower than 500 pixels.
    frame = f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{html.escape(page)}">'
    found = in_chromium(f"<!doctype html><body>{frame}</iframe></body>", tmp_path)
    inner, too_wide, figures = map(int, found.split())
    assert (inner, too_wide) == (width, 0)
    assert figures == len(list(out.glob("*.png")))


def test_a_table_for_a_paper(study):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    lines = (out / "results.tex").read_text().splitlines()
    assert all(line.startswith("%") or line.isascii() for line in lines)
    table = [line for line in lines if not line.startswith("%")]
    assert table[1] == r"\begin{tabular}{lrrrrllrr}" and table[-1] == r"\end{tabular}}"
    rows = table[table.index(r"\midrule") + 1 : table.index(r"\bottomrule")]
    assert len(rows) == 3 and all(line.count("&") == 8 for line in rows)
    assert all(line.endswith(r" \\") for line in rows)
    (row,) = [line for line in table if line.startswith(r"cbam\_blocks ")]
    assert row.startswith(r"cbam\_blocks & 92.60 & 0.14 & 2 & $-0.60$ & ")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_the_table_for_a_paper_compiles(study):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    page = (
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{results}\end{document}"
    )
    (out / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and (out / "page.pdf").stat().st_size > 10_000, done.stdout


def test_what_latex_would_act_upon_is_escaped():
    assert words.text("golden_retriever") == "golden_retriever" != words.text("_a_")
    assert words.tex("a_b & 5% of $1 #2 {x} ~y ^z \\w") == (
        r"a\_b \& 5\% of \$1 \#2 \{x\} \~{}y \^{}z \textbackslash{}w"
    )
    assert words.tex("é狗\n%x") == "é? \\%x"


def test_figures_in_other_formats(study):
    runs, out = study
    flags = ["--runs", str(runs), "--out", str(out)]
    assert report.main([*flags, "--formats", "pdf", "svg"]) == 0
    for name in FIGURES.keys() - {"accuracy_vs_epochs.png", "compared.png"}:
        pdf, svg = ((out / name).with_suffix(f".{kind}").read_bytes() for kind in ("pdf", "svg"))
        assert pdf[:5] == b"%PDF-" and b"/Type3" not in pdf and b"<svg" in svg
        assert (out / name).exists()
    assert report.main(flags) == 0
    assert {path.suffix for path in out.glob("*_*")} == {".png"}
