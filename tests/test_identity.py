"""What makes two runs comparable: each difference is said where the verdict stands, or there is
none. The train.py and explain.py sides are in test_resume.py and test_explain.py, plans in
test_study.py."""

import itertools
import json
import math
import random
import re
import shutil

import report
import train
from kit.environment import SOURCES
from kit.runs import different, read_run

import numpy as np
import pytest
from conftest import copy_run, settings_of, unaligned

FULL = {"quick": False, "overrides": {}, "width": 64}
ACCURACIES = {"baseline": [92.0, 92.1, 92.2], "se": [93.1, 93.2, 93.4], "se_static": [92, 93, 92.5]}
BETTER = "`se` is better than `baseline`"


@pytest.fixture(scope="module")
def master(finished_run, tmp_path_factory):
    """Three models, three seeds each; se is better than the baseline."""
    runs = tmp_path_factory.mktemp("alike")
    for model, values in ACCURACIES.items():
        for seed, accuracy in enumerate(values):
            copy_run(finished_run, runs, model, seed, **FULL, test_acc=accuracy)
    return runs


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take most of the time, and test_report.py looks at them."""
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})


@pytest.fixture
def runs(master, tmp_path):
    shutil.copytree(master, tmp_path / "runs")
    return tmp_path / "runs"


def folder_of(runs, model, seed):
    return runs / "fashion_mnist/published" / model / f"seed{seed}"


def change(folder, name, **changes):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def found_in(runs, *flags):
    """(the answer and what follows it, the row of se if it has a verdict, the README's block)."""
    out, readme = runs.parent / "out", runs.parent / "README.md"
    readme.write_text("<!-- report.py: out -->\n<!-- end of out -->\n")
    flags = ["--runs", str(runs), "--out", str(out), "--readme", str(readme), *flags]
    assert report.main(flags) == 0
    text, block = (unaligned(path.read_text()) for path in (out / "report.md", readme))
    finding = text.partition("\n## ")[2].partition("\n###")[0]
    verdicts = "better|worse|equivalent|undecided"
    (row,) = re.findall(rf"^\| `se` .*(?:{verdicts}).*", finding, re.MULTILINE) or [""]
    return finding, row, block


def test_runs_that_are_alike_have_no_mark(runs):
    finding, row, block = found_in(runs)
    assert BETTER in finding and "| better |" in row and "†" not in finding + row + block
    assert "alike" not in finding and "eft out" not in finding + block


@pytest.mark.parametrize("name", train.SETTINGS)
def test_another_setting_whichever_it_is_is_not_paired(runs, name):
    other = {"normalize": "data", "flip": True}.get(name, 0.75)
    if isinstance(train.SETTINGS[name][0], int) and name != "flip":
        other = 77
    for seed in range(3):
        change(folder_of(runs, "se", seed), "config", **{name: other})
    finding, row, block = found_in(runs)
    assert "`se` is" not in finding and row == ""
    for text in (finding, block):
        assert f"Left out, se seeds 0 1 2:** its settings differ: {name} {other} inst" in text


def test_a_setting_that_is_new_leaves_finished_runs_what_they_are(runs):
    """README's "A setting", with a default of 0.9: what is named is the code that uses it."""
    folder = folder_of(runs, "se", 1)
    hashes = json.loads((folder / "env.json").read_text())["sha256"]
    changes = {"train.py: SETTINGS[momentum]": "0", "train.py: prepare": "0"}
    change(folder, "config", momentum=0.9)
    change(folder, "env", sha256=hashes | changes)
    finding, row, block = found_in(runs)
    assert BETTER in finding and "| better † |" in row and "eft out" not in finding + block
    assert "seed 1: other code (train.py: prepare)" in block
    assert len(json.loads((runs.parent / "out/summary.json").read_text())["studies"]) == 1


def test_a_new_setting_that_was_chosen_counts(runs):
    """Those runs are a study of their own; compared with others, it is said."""
    for seed in range(3):
        for name in ("config", "result"):
            change(folder_of(runs, "se", seed), name, overrides={"momentum": 0.5})
        change(folder_of(runs, "se", seed), "config", momentum=0.5)
    finding, _, _ = found_in(runs)
    assert "`se` is" not in finding
    assert len(json.loads((runs.parent / "out/summary.json").read_text())["studies"]) == 2
    old, new = (read_run(folder_of(runs, model, 0)).settings for model in ("baseline", "se"))
    assert different(new, old) == ["momentum 0.5 instead of none"]


def test_a_new_setting_that_the_recipe_turns_on_counts(runs):
    change(folder_of(runs, "se", 1), "config", clip=1.0, chosen=["clip"])
    finding, _, _ = found_in(runs)
    assert "Left out, se seed 1:** its settings differ: clip 1.0 instead of none" in finding
    settings = settings_of("--model", "se", "--recipe", "short", "--lr", "0.01", "--device", "cpu")
    assert settings.chosen == ["epochs", "lr", "anneal", "patience", "tested"]


def test_other_data_or_labels_are_not_paired(runs):
    change(folder_of(runs, "se", 0), "config", data="0" * 16)
    finding, _, _ = found_in(runs)
    assert "Left out, se seed 0:** its settings differ: other images or labels" in finding
    folder = folder_of(runs, "se", 1)
    order = np.random.default_rng(0).permutation(10_000)
    for name in ("labels", "predictions"):  # both, so that the accuracy is the same
        path = folder / f"test_{name}.npy"
        np.save(path, np.load(path)[order])
    finding, row, _ = found_in(runs)
    assert "Left out, se seed 1:** its settings differ: other test labels" in finding and row == ""


def test_a_test_set_of_another_size_is_not_paired(runs):
    folder = folder_of(runs, "se", 0)
    for name in ("labels", "predictions"):
        path = folder / f"test_{name}.npy"
        np.save(path, np.load(path)[:5000])
    right = (np.load(folder / "test_labels.npy") == np.load(folder / "test_predictions.npy")).mean()
    change(folder, "result", test_images=5000, test_acc=100 * right)
    assert (
        "Left out, se seed 0:** its settings differ: other test labels; test_images 5000"
        in found_in(runs)[0]
    )


@pytest.mark.parametrize("name", SOURCES)
def test_other_code_whichever_file_is_said_in_the_verdict(runs, name):
    folder = folder_of(runs, "se", 1)
    hashes = json.loads((folder / "env.json").read_text())["sha256"]
    definition = next(key for key in hashes if key.startswith(f"{name}: "))
    change(folder, "env", sha256=hashes | {name: "0", definition: "0"})
    finding, row, block = found_in(runs)
    reason = f"seed 1: other code ({definition})"
    (verdict,) = [line for line in finding.splitlines() if BETTER in line]
    (control,) = [line for line in finding.splitlines() if "against its control" in line]
    assert f"**Some pairs differ in more than the model: {reason}.**" in verdict.replace("\\", "")
    assert "| better † |" in row and ") †" in finding and control.endswith("†.")
    assert "| better † |" in block and f"- † se: {reason}" in block.replace("\\", "")


@pytest.mark.parametrize("name", ["models.py: Spread", "data.py: DATASETS[mine]"])
def test_what_was_added_to_the_code_is_no_difference(runs, name):
    folder = folder_of(runs, "se", 1)
    hashes = json.loads((folder / "env.json").read_text())["sha256"]
    change(folder, "env", sha256=hashes | {name: "0"})
    assert "†" not in "".join(found_in(runs))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("result", "device", "NVIDIA H100"),
        ("env", "torch", "3.0"),
        ("result", "precision", "bf16"),
        ("result", "mode", "graph"),
        ("env", "changes", ["models.py edited since"]),
    ],
)
def test_other_circumstances_are_said_in_the_verdict(runs, file, key, value):
    folder = folder_of(runs, "se", 1)
    change(folder, file, **{key: value})
    if key == "precision":
        change(folder, "config", precision=value)
    finding, row, block = found_in(runs)
    said = value[0] if key == "changes" else value
    (verdict,) = [line for line in finding.splitlines() if BETTER in line]
    assert "Some pairs differ in more than the model: seed 1: " in verdict and said in verdict
    assert "| better † |" in row and "| better † |" in block
    assert any("† se: seed 1: " in line and said in line for line in block.splitlines())


def test_pairs_may_differ_from_each_other(runs):
    """One seed of all models on another device: said where it is said how it was measured."""
    for folder in runs.rglob("seed1"):
        change(folder, "result", device="NVIDIA H100")
    finding, row, block = found_in(runs)
    assert "| better |" in row and "†" not in finding + block
    measured = (runs.parent / "out/report.md").read_text().partition("## How it was measured")[2]
    assert "3 runs: NVIDIA H100" in measured
    # But for the baseline's: its pairs are not alike.
    here = json.loads((folder_of(runs, "se", 0) / "result.json").read_text())["device"]
    change(folder_of(runs, "baseline", 1), "result", device=here)
    _, _, block = found_in(runs)
    assert f"- † se: seed 1: device NVIDIA H100 against {here}" in block


def test_which_of_two_folders_is_unlike_is_said(runs, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(runs, there)
    for seed in range(3):
        change(folder_of(there, "se", seed), "result", device="NVIDIA H100")
    found_in(runs, "--compare", str(there))
    text = (runs.parent / "out/report.md").read_text().partition("## Compared with")[2]
    here = json.loads((folder_of(runs, "se", 0) / "result.json").read_text())["device"]
    assert f"† se: seeds 0 1 2: device {here} against NVIDIA H100" in text


def test_what_contradicts_itself_is_no_result(runs, capsys):
    """Another size, copies, wrong accuracies: named, and the rest is paired."""
    change(folder_of(runs, "se", 0), "result", params=999_999)
    finding, _, _ = found_in(runs)
    assert re.search("Left out, se seed 0:.*parameter counts, [0-9,]+ or 999,999", finding)
    assert "over only 2 to 3 seeds" in finding
    assert "Left out, se seed 0:** " in capsys.readouterr().out  # also on the terminal


def test_a_size_of_one_seed_against_another_is_none_at_all(runs):
    shutil.rmtree(folder_of(runs, "se", 2))
    change(folder_of(runs, "se", 0), "result", params=999_999)
    finding, row, _ = found_in(runs)
    assert "Left out, se seeds 0 1:" in finding and row == ""


@pytest.mark.parametrize("what", ["run", "predictions", "unlabelled predictions"])
def test_a_copy_under_another_seed_is_no_result(runs, what):
    first, second = (folder_of(runs, "se", seed) for seed in (0, 1))
    if what == "run":
        shutil.rmtree(second)
        shutil.copytree(first, second)
        change(second, "config", seed=1)
        change(second, "result", seed=1)
    else:
        shutil.copy(first / "test_predictions.npy", second)
        change(second, "result", test_acc=93.1)
        if what != "predictions":
            (second / "test_labels.npy").unlink()
    finding, row, _ = found_in(runs)
    assert "Left out, se seeds 0 1:** the same predictions for different seeds" in finding
    assert row == "" and "over only 3 seeds" in finding  # se_static


@pytest.mark.parametrize("other", [("baseline", 1), ("se", 2)])
def test_predictions_of_another_run_are_noticed(runs, other):
    folder = folder_of(runs, "se", 1)
    shutil.copy(folder_of(runs, *other) / "test_predictions.npy", folder)
    finding, _, _ = found_in(runs)
    assert "of its predictions are correct, but its test_acc is 93.20%" in finding
    assert "over only 2 seeds" in finding


def test_two_seeds_exchanged_are_noticed(runs):
    first, second = (folder_of(runs, "se", seed) for seed in (0, 1))
    for name, (a, b) in itertools.product(["result"], [(first, second)]):
        bodies = [(path / f"{name}.json").read_text() for path in (a, b)]
        (a / f"{name}.json").write_text(bodies[1])
        (b / f"{name}.json").write_text(bodies[0])
    finding, _, _ = found_in(runs)
    assert finding.count("seed is 1 in result.json, 0 in config.json") == 1
    assert (
        finding.count("seed is 0 in result.json, 1 in config.json") == 1 and BETTER not in finding
    )


def test_a_history_that_is_too_short_is_no_result(runs):
    path = folder_of(runs, "se", 1) / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    finding, _, _ = found_in(runs)
    assert "metrics.jsonl has not the 2 epochs of result.json" in finding
    assert "over only 2 to 3 seeds" in finding


def test_a_cost_measured_with_other_code_is_marked(runs):
    code = json.loads((folder_of(runs, "se", 0) / "env.json").read_text())["sha256"]
    own = {name: code[name] for name in ("models.py", "kit/fast.py")}
    row = dict(
        params=1, flops=1, flops_aten=1, batch_size=64, precision="fp32", mode="eager", width=64,
        ms_per_image=2.0, ms_per_image_p10=1.9, ms_per_image_p90=2.1, ms_per_image_p99=3.0,
        device="CPU", torch="2", image="1x28x28", classes=10,
    )  # fmt: skip
    rows = [row | {"model": model, "sha256": own} for model in ACCURACIES]
    out = runs.parent / "out"
    out.mkdir()
    (out / "benchmark.json").write_text(json.dumps(rows))
    assert "†" not in "".join(found_in(runs))
    rows[1]["sha256"] = own | {"models.py": "0"}
    (out / "benchmark.json").write_text(json.dumps(rows))
    finding, _, block = found_in(runs)
    for text in (finding, block):
        assert "se: cost and accuracy were measured with different code (models.py)" in text
        assert "| 1.00x † |" in text
    (summary,) = json.loads((out / "summary.json").read_text())["studies"]
    assert summary["costs_of_other_code"] == {"se": ["models.py"]}


# --- Damage ---------------------------------------------------------------------------------------

FILES = ["config.json", "env.json", "result.json", "metrics.jsonl", "benchmark.json",
         "explain.json"]  # fmt: skip
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = [None, True, False, 0, 1, -1, 10**400, -(10**30), 0.5, -1e308, math.nan, math.inf, "", "x",
          "\u202e<b>", [], [1], {}, {"a": 1}, DEEP]  # fmt: skip


def places(content, path=()):
    """Every key and index in it, and the whole."""
    yield path
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from places(value, (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


GATES = {
    "mean": 0.3, "spread_over_channels": 0.1, "spread_over_images": 0.1, "saturated": 0.1,
    "hardly_vary": 0.1,
}  # fmt: skip
EXPLAINED = {
    "test_images": 100, "test_acc": 93.0, "won": 1, "lost": 3, "test_acc_gates_fixed": 91.0,
    "gates": {"layer4": GATES}, "images": [1],
}  # fmt: skip


def mutations(runs, out, name):
    """(the file, its content with one value replaced), each value by each of VALUES."""
    path = (out if name == "benchmark.json" else folder_of(runs, "se", 1)) / name
    text = path.read_text()
    lines = text.splitlines() if name.endswith("l") else [text]
    for i, line in enumerate(lines):
        content = json.loads(line)
        for place, value in itertools.product(places(content), VALUES):
            changed = json.dumps(replaced(content, place, value))
            yield path, "\n".join([*lines[:i], changed, *lines[i + 1 :]])


@pytest.fixture
def reported(runs):
    """runs, the folder of a report, and what makes one: {model: verdict}, and its text."""
    out = runs.parent / "out"
    out.mkdir()
    row = dict(
        params=1, flops=1, flops_aten=1, batch_size=64, precision="fp32", mode="eager", width=64,
        ms_per_image=2.0, ms_per_image_p10=1.9, ms_per_image_p90=2.1, ms_per_image_p99=3.0,
        device="CPU", torch="2", sha256={}, image="1x28x28", classes=10,
    )  # fmt: skip
    rows = [row | {"model": model} for model in ("baseline", "se")]
    (out / "benchmark.json").write_text(json.dumps(rows))
    (folder_of(runs, "se", 1) / "explain.json").write_text(json.dumps(EXPLAINED))

    def make():
        found = report.make_report(report.parse(["--runs", str(runs), "--out", str(out)]))[0]
        text = (out / "report.md").read_text()
        return {model: c.verdict for model, c in found.against.items()}, text

    return runs, out, make


def check_mutations(reported, names, keep):
    """No traceback; no verdict changes unless something is marked or left out; how many."""
    runs, out, make = reported
    expected, plain = make()
    chosen = [each for name in names for each in mutations(runs, out, name) if keep()]
    for path, body in chosen:
        before = path.read_text()
        path.write_text(body)
        verdicts, text = make()
        said = "†" in text or "eft out" in text
        assert said or verdicts == expected, (path.name, body[:300])
        assert len(text) < 3 * len(plain) and "Traceback" not in text
        path.write_text(before)
    return len(chosen)


@pytest.mark.parametrize("name", FILES)
def test_no_damaged_value_ends_a_report_or_changes_a_verdict_in_silence(reported, name):
    draw = random.Random(0)
    assert check_mutations(reported, [name], lambda: draw.random() < 0.01) > 2


@pytest.mark.slow
def test_two_thousand_damaged_values(reported):
    draw = random.Random(1)
    assert check_mutations(reported, FILES, lambda: draw.random() < 0.6) >= 2000


# --- Two sets of runs, links, missing files -------------------------------------------------------


def compared(runs, change_there):
    """What report.py --compare says of a copy of the runs that was changed."""
    other = runs.parent / "other"
    shutil.copytree(runs, other)
    for folder in other.glob("*/*/*/*"):
        change_there(folder)
    found_in(runs, "--compare", str(other))
    text = (runs.parent / "out/report.md").read_text()
    return text.partition("## Compared with")[2].partition("\n## ")[0], text


def test_compared_with_runs_on_other_data(runs):
    section, text = compared(runs, lambda folder: change(folder, "config", data="0" * 16))
    assert section == "" and "not compared, other images or labels" in text


def test_compared_with_runs_with_other_settings(runs):
    """Which may be on purpose: it is said in which."""
    section, _ = compared(runs, lambda folder: change(folder, "config", label_smoothing=0.5))
    assert "Settings that differ: there label_smoothing 0.5 instead of none here" in section


def test_compared_with_runs_by_other_code(runs):
    section, _ = compared(runs, lambda folder: change(folder, "env", sha256={"models.py": "0"}))
    assert re.search(r"\| (undecided|equivalent) † \|", section)
    assert re.search(r"- † se: seeds 0 1 2: other code \(models.py\)", section)


@pytest.mark.parametrize("name", ["predictions", "labels"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_without_predictions_or_labels_there_is_still_a_report(runs, name, everywhere):
    model = "*" if everywhere else "se"
    for path in runs.glob(f"*/*/{model}/*/test_{name}.npy"):
        path.unlink()
    finding, row, _ = found_in(runs)
    assert BETTER in finding and "| better |" in row


def test_links_to_a_run_count_once(runs):
    (runs / "latest").symlink_to(folder_of(runs, "se", 0))
    (runs / "loop").symlink_to(runs)
    finding, _, _ = found_in(runs)
    assert BETTER in finding and "eft out" not in (runs.parent / "out/report.md").read_text()


def test_a_damaged_run_is_named_wherever_its_verdict_stands(runs, capsys):
    (folder_of(runs, "se", 1) / "result.json").write_text("{")
    finding, _, block = found_in(runs)
    for text in (finding, block, capsys.readouterr().out):
        assert "se/seed1 left out, its files are damaged" in text
