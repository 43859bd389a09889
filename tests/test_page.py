"""report.html: the same words as report.md, whole in one file, and readable on a phone."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import markdown  # tensorboard needs it, so it is there
import pytest
from conftest import copy_run

import report
from kit.page import as_html, as_page

FULL = {"quick": False, "overrides": {}, "width": 64}


@pytest.fixture(scope="module")
def out(finished_run, tmp_path_factory):
    """The report of a small study."""
    folder = tmp_path_factory.mktemp("page")
    for model in ("baseline", "se", "cbam_blocks"):
        for seed, accuracy in enumerate((93.0, 93.2, 93.1)):
            copy_run(finished_run, folder / "runs", model, seed, test_acc=accuracy, **FULL)
    assert report.main(["--runs", str(folder / "runs"), "--out", str(folder / "out")]) == 0
    return folder / "out"


class Words(HTMLParser):
    """A page as a list of tags and the words between them; wrappers and attributes left out."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("div", "p", "hr"):  # Python-Markdown puts images into paragraphs
            self.found.append(tag)

    def handle_data(self, data):
        self.found += data.split()


def test_the_same_as_python_markdown_makes_of_it(out):
    text = (out / "report.md").read_text()
    figures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    expected = markdown.markdown(text, extensions=["tables", "fenced_code"])
    assert Words(as_html(text, figures)).found == Words(expected).found
    assert {"table", "ul", "pre", "img", "strong", "h3"} < set(Words(expected).found)


def test_what_stands_in_the_text_is_escaped():
    page = as_page("# a < b & c\n\n- `<script>`\n\n[here](to/it.md)\n\n```sh\nx > y\n```\n", {})
    assert "<title>a &lt; b &amp; c</title>" in page and "<script>" not in page
    assert "<code>&lt;script&gt;</code>" in page and "x &gt; y" in page
    assert '<a href="to/it.md">here</a>' in page


def test_nothing_is_loaded_from_elsewhere(out):
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(list(out.glob("*.png"))) > 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page and "@import" not in page and "<script" not in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen(out, tmp_path, width):
    """In headless Chromium: nothing hangs over the side, and every figure is shown."""
    measure = (
        "<script>onload = () => { parent.document.body.innerText = 'measured ' + [innerWidth,"
        "document.documentElement.scrollWidth, [...document.images].filter(i => i.width > 200"
        " && i.naturalWidth).length].join(' ') + ' end' }</script>"
    )
    page = (out / "report.html").read_text().replace("</body>", measure + "</body>")
    # In a frame: a window of Chromium itself is never narrower than 500 pixels.
    frame = f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{html.escape(page)}">'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}</iframe></body>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    inner, scroll, figures = map(int, re.search(r"measured (.*) end", done.stdout)[1].split())
    assert inner == width and scroll <= width
    assert figures == len(list(out.glob("*.png")))
