"""Our figures are ours, whatever the surroundings ask for; names are legible, or numbers."""

import os

from kit import plots, run
from kit.plots import legible, plt, shortened

import pytest
from conftest import is_one_line, script, train_small
from matplotlib import font_manager
from tensorboard.summary.writer.record_writer import RecordWriter


def python(code, **variables):
    done = script("-c", code, env=os.environ | variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "x"])
def test_no_window_whatever_a_notebook_leaves_behind(backend):
    code = "import kit.figures; from matplotlib import get_backend; print(get_backend())"
    assert python(code, MPLBACKEND=backend).lower() == "agg"


def test_no_settings_of_the_user(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    code = "from kit.plots import plt; plt.title('$a_b'); plt.savefig('/dev/null', format='png')"
    python(code, MPLCONFIGDIR=str(tmp_path))


def test_a_user_id_without_a_name(tmp_path):
    """What getpass raises then ended torch.compile."""
    code = "import os, pwd\nfor name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'):\n"
    code += "    os.environ.pop(name, None)\npwd.getpwuid = lambda uid: {}[uid]\n"
    assert python(code + "import kit, getpass; print(getpass.getuser())").startswith("uid")


def test_names_are_legible_or_numbers(monkeypatch, capsys):
    monkeypatch.setitem(plt.rcParams, "font.family", plt.rcParams["font.family"])
    latin = ["chat", "Größe", "αβγ", "кот", "a b"]  # DejaVu has these
    assert legible(latin) == latin and capsys.readouterr().err == ""
    before = plt.rcParams["font.family"]
    names = ["chat", "\U0010fffd"]  # a private character that no font has
    assert legible(names) == ["0", "1"] and is_one_line(capsys.readouterr().err)
    assert plt.rcParams["font.family"] == before


def test_another_font_is_taken_where_one_has_the_characters(monkeypatch):
    """With a stand-in: one that has nothing but what the first one lacks."""
    lacking = "\U0010fffd"
    real = plots.FT2Font

    class Font:
        def __init__(self, path):
            self.first = path.endswith("DejaVuSans.ttf")
            self.family_name = real(path).family_name

        def get_charmap(self):
            return {ord("a"): 1} if self.first else {ord(lacking): 1}

    monkeypatch.setattr(plots, "FT2Font", Font)
    monkeypatch.setitem(plt.rcParams, "font.family", ["DejaVu Sans"])
    assert legible(["a", lacking]) == ["a", lacking]
    assert len(plt.rcParams["font.family"]) == 2


def test_a_font_that_was_uninstalled_is_passed_over(monkeypatch):
    gone = font_manager.FontEntry(fname="/no/such/font.ttf", name="Gone")
    there = font_manager.fontManager.ttflist
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*there, gone])
    assert legible(["\U0010fffd"]) == ["0"]


def test_names_are_shortened_to_the_width_that_they_have():
    assert shortened("Ankle boot", 1, 7) == "Ankle boot" and shortened("", 1, 7) == ""
    assert shortened("a\nb\t c", 1, 7) == "a b c"
    long = shortened("golden retriever, 0123456789", 0.8, 7)
    assert long.startswith("golden") and long.endswith("6789") and "…" in long
    widths = {}
    for name in (long, "golden retriever, 0123456789"):
        box = plt.figure(dpi=200).text(0, 0, name, fontsize=7).get_window_extent()
        widths[name] = box.width / 200
    assert 0.7 < widths.pop(long) <= 0.81 < min(widths.values())
    assert len(shortened("W" * 99, 0.3, 7)) < len(shortened("i" * 99, 0.3, 7))


@pytest.mark.parametrize("error", [RuntimeError("no such font\nand more"), OSError(28, "full")])
def test_a_picture_that_fails_costs_a_note(monkeypatch, tmp_path, capsys, error):
    def failing(*arguments):
        raise error

    monkeypatch.setattr(run, "log_test", failing)
    assert train_small("baseline", tmp_path, "--epochs", "1") == 0
    error = capsys.readouterr().err
    assert is_one_line(error) and "note: not all is in TensorBoard" in error


@pytest.mark.parametrize("n", [3, 9])
def test_a_log_that_cannot_be_written_costs_a_note(monkeypatch, tmp_path, capsys, n):
    """A full quota at the n-th event: while it trains, or at the end."""
    calls, write = iter(range(n)), RecordWriter.write

    def full(writer, event):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        write(writer, event)

    monkeypatch.setattr(RecordWriter, "write", full)
    assert train_small("baseline", tmp_path, "--epochs", "2") == 0
    assert list(tmp_path.rglob("result.json"))
    lines = set(capsys.readouterr().err.splitlines())
    assert lines == {"note: not all is in TensorBoard: OSError: [Errno 28] No space left on device"}
