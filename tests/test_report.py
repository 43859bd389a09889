import csv
import json
import os
import shutil
import statistics

import report
from kit import verdicts
from kit.figures import FIGURES
from kit.findings import ablation
from kit.results import Study, read_rows, read_studies

import numpy as np
import pytest
from conftest import FULL, ROW, SLOWER, copy_run, is_one_line, make_runs, script
from PIL import Image


def row_of(text, model):
    """The cells of the first table row of `model`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{model}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_answer_and_the_published_figures_beside_ours(study):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    sd = statistics.stdev([93.1, 93.3, 93.2])
    accuracy = f"93.20 ± {sd:.2f}"
    assert row_of(text, "baseline") == ["`baseline`", "3", accuracy, "-", "-", "1.00x"]
    # Two means and a difference over the same seeds: the baseline's has three.
    assert row_of(text, "cbam_blocks")[1:3] == ["2", "92.60 ± 0.14"]
    assert row_of(text, "cbam_blocks")[3].startswith("-0.60 (")
    section = text.partition("### Published / ours")[2].partition("\n### ")[0]
    assert row_of(section, "baseline")[1:] == [
        "93.27 / 93.20", "11.17 / 0.18", "0.92 / 0.92", "0.06 / 0.250",
    ]  # fmt: skip
    assert row_of(section, "cbam_classifier")[1] == "93.18 / -"
    assert "smoke test" not in text.lower() and "## What is missing" not in text
    assert text.index("**Compared with `baseline` over only 2 to 3 seeds, ") < text.index(
        "| model "
    )
    assert "published, from one run each: -0.57" in text and "python train.py --model" in text
    shown = FIGURES.keys() - {"accuracy_vs_epochs.png", "compared.png"}  # all stop at one epoch
    for figure in shown:
        assert f"({figure})" in text
        with Image.open(out / figure) as image:
            assert min(image.size) > 400
    assert not (out / "accuracy_vs_epochs.png").exists()


def test_the_terminal_shows_every_study_with_a_verdict(study, finished_run, capsys):
    runs, out = study
    short = {"baseline": [92.0, 92.1], "se": [92.5, 92.61]}
    make_runs(finished_run, runs / "short", short, recipe="short")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    title, answer, table, *rest, written = capsys.readouterr().out.strip().split("\n\n")
    assert written == f"written: {out}/report.md, and report.html beside it"
    assert title == "fashion_mnist, recipe published"
    assert answer.startswith(
        "Compared with `baseline` over only 2 to 3 seeds, worse: `cbam_blocks` (-0.60); "
    )
    assert row_of(table, "baseline") == ["`baseline`", "3", "93.20 ± 0.10", "-", "-", "1.00x"]
    assert row_of(table, "se")[1:3] == ["3", "93.10 ± 0.26"] and "undecided" in table
    assert len(set(map(len, table.splitlines()))) == 1  # in columns
    assert rest[0] == "fashion_mnist, recipe short" and "better: `se`" in rest[1]


def test_verdicts_against_the_baseline(finished_run, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    accuracies = {
        "baseline": [93.0, 93.1, 93.2, 93.3, 93.4],
        "se": [92.0, 92.1, 92.21, 92.3, 92.39],
        "cbam_blocks": [93.5, 92.7, 93.6, 92.9, 93.4],
        "cbam_classifier": [93.9],
        "se_static": [92.3, 92.1, 92.2, 92.5, 92.4],
        "eca": [93.01, 93.1, 93.21, 93.3, 93.4],
    }
    make_runs(finished_run, runs, accuracies)
    out.mkdir()
    rows = [ROW | {"model": "baseline"}, ROW | {"model": "se", **SLOWER}]
    (out / "benchmark.json").write_text(json.dumps(rows))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    _, seeds, _, difference, verdict, _ = row_of(text, "se")
    assert (seeds, verdict) == ("5", "worse") and difference.startswith("-1.00 (")
    assert row_of(text, "cbam_blocks")[4] == "undecided"
    assert row_of(text, "eca")[4] == "equivalent"
    answer = next(line for line in text.splitlines() if line.startswith("**Compared"))
    assert answer.startswith("**Compared with `baseline` over 5 seeds, worse: `se` (-1.00), ")
    assert "; equivalent (within 0.3 points): `eca` (+0.00); undecided: `cbam_blocks`" in answer
    assert "- `se` is worse than `baseline`: -1.00 points (" in text
    assert "over 5 seeds (92.20% against 93.20%; p < 0.001 after correction)" in text
    assert "; inference takes 1.50x the baseline's time." in text
    assert "- `cbam_classifier`: no verdict, fewer than two seeds" in text
    assert "- `se` against its control `se_static`" in text
    (summary,) = json.loads((out / "summary.json").read_text())["studies"]
    assert summary["against_reference"]["se"]["verdict"] == "worse"
    assert summary["against_control"]["se"]["verdict"] == "equivalent"
    # The margin, the reference and the models can be chosen.
    flags = ["--margin", "0.001", "--reference", "se", "--models", "eca", "baseline"]
    assert report.main(["--runs", str(runs), "--out", str(out), *flags]) == 0
    text = (out / "report.md").read_text()
    assert "**Compared with `se` over 5 seeds, better: `baseline` (+1.00), `eca` (+1.00).**" in text
    assert "Holm's correction over `baseline`, `eca`, level 5%" in text
    assert "cbam" not in text.partition("### Published")[0]


def planned(runs, *plans, **changes):
    rows = [
        dict(date=f"2026-11-{i + 1:02}", dataset="fashion_mnist", recipe="published", overrides={},
             models=["baseline", "se"], seeds=list(range(n))) | changes
        for i, n in enumerate(plans)
    ]  # fmt: skip
    (runs / "plan.json").write_text(json.dumps(rows))


def test_no_verdict_before_the_planned_seeds_are_finished(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_runs(finished_run, runs, {"baseline": [92.0, 92.1, 92.2], "se": [93.0, 93.11, 93.2]})

    def made(*flags):
        assert report.main(["--runs", str(runs), "--out", str(out), *flags]) == 0
        (summary,) = json.loads((out / "summary.json").read_text())["studies"]
        return (out / "report.md").read_text(), summary["against_reference"]["se"]["verdict"]

    text, verdict = made()
    assert verdict == "better" and "No plan was recorded" in text
    planned(runs, 5)
    text, verdict = made()
    assert verdict is None and row_of(text, "se")[4] == "interim, 3 of 5"
    assert "no verdict yet: `se`" in text and "Planned on 2026-11-01: 5 seeds." in text
    assert "planned, not finished: se seeds 3 4" in text
    planned(runs, 2, 3)
    text, verdict = made()
    added = "5% / 2, because seeds were added: over all looks at most 7.5%"
    assert verdict == "better" and f"level 2.5% ({added})" in text
    planned(runs, 2)
    text = made()[0]
    assert "Not compared, baseline seed 2, se seed 2:** not planned" in text
    assert row_of(text, "baseline")[1:3] == ["2", "92.05 ± 0.07"]
    (runs / "plan.json").rename(tmp_path / "plan.json")
    assert "No plan was recorded" in made()[0]
    (tmp_path / "plan.json").rename(runs / "plan.json")
    for folder in (tmp_path, runs / "fashion_mnist"):  # above RUNS, and below
        assert report.main(["--runs", str(folder), "--out", str(out)]) == 0
        assert "Planned on 2026-11-01: 2 seeds" in (out / "report.md").read_text()
    planned(runs, 9, recipe="short")  # another study's
    assert made()[1] == "better"
    planned(runs, 3, models=["baseline", "se", "eca"])
    other = copy_run(finished_run, runs / "more", "se", 0, dataset="cifar10")
    (other / "result.json").unlink()
    text, verdict = made()
    assert "planned, not finished: eca seeds 0 1 2" in text and f"unfinished: {other}" in text
    text, verdict = made("--models", "se", "--dataset", "fashion_mnist")  # what was asked for
    assert verdict == "better" and "not finished" not in text and "unfinished" not in text
    (runs / "plan.json").write_text("[{]")
    assert "plan.json is damaged" in made()[0]


def test_the_newcomer_s_path(finished_run, tmp_path):
    """Other studies and stray runs in the same folder change neither study nor figures."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    own = {"baseline": [93.0, 93.1, 93.2], "spread": [93.5, 93.61, 93.7]}
    make_runs(finished_run, runs, own)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    (first,) = json.loads((out / "summary.json").read_text())["studies"]
    env = runs / "fashion_mnist/published/spread/seed0/env.json"
    code = json.loads(env.read_text())["sha256"]
    more = {"second": [93.3, 93.4, 93.5]}
    make_runs(finished_run, runs, more)
    for path in runs.glob("*/*/second/*/env.json"):  # a class was added to models.py since
        added = {"sha256": code | {"models.py": "0", "models.py: Second": "0"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | added))
    copy_run(finished_run, runs, "se", 0, dataset="a_data_set", **FULL)
    copy_run(finished_run, runs / "stray", "se", 8, overrides={"epochs": 99}, quick=False, width=64)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    title = text.splitlines()[2]
    assert title == "## fashion_mnist, recipe published" and "†" not in text
    assert row_of(text, "spread")[1:3] == ["3", "93.60 ± 0.10"] and row_of(text, "second")
    summary = json.loads((out / "summary.json").read_text())["studies"][0]
    assert summary["models"]["spread"] == first["models"]["spread"]
    tex = (out / "results.tex").read_text()
    assert "spread & 93.60 & 0.10 & 3 &" in tex and "Minimum detectable difference" in tex


def test_one_seed_is_no_verdict(finished_run, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_runs(finished_run, runs, {"baseline": [93.1], "se": [95.0]})
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "**No verdict: no model has two seeds in common with `baseline`.**" in text
    assert "`se`: no verdict, fewer than two seeds" in text and "better" not in text
    assert not (out / "differences.png").exists()


def test_beside_other_runs(study, finished_run, tmp_path, capsys):
    runs, out = study
    there = tmp_path / "there"
    make_runs(finished_run, there, {"baseline": [93.0, 93.3], "se": [92.0, 92.5, 92.1]})
    args = ["--runs", str(runs), "--out", str(out), "--compare"]
    assert report.main([*args, str(there)]) == 0
    text = (out / "report.md").read_text()
    section = text[text.index(f"## Compared with {there}") :]
    baseline, se = row_of(section, "baseline"), row_of(section, "se")
    assert baseline[1:3] == ["93.20", "93.15"] and baseline[3].startswith("+0.05 (")
    assert se[3].startswith("+0.90 (") and se[4:] == ["better", "3"]
    assert "(compared.png)" in section and (out / "compared.png").exists()
    planned(there, 5)
    assert report.main([*args, str(there)]) == 0
    _, _, section = (out / "report.md").read_text().partition("## Compared with")
    assert row_of(section, "se")[4] == "interim, 3 of 5"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        report.main([*args, str(tmp_path / "nowhere")])
    assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    assert report.main([*args, str(tmp_path / "empty")]) == 0
    reason = f"--compare {tmp_path / 'empty'}: no finished run"
    assert reason in (out / "report.md").read_text() and reason in capsys.readouterr().out


def test_the_readme_s_block(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})
    runs, out = study
    readme = tmp_path / "README.md"
    args = ["--runs", str(runs), "--out", str(out), "--readme", str(readme)]
    markers = "<!-- report.py: out -->\nold\n<!-- end of out -->"
    begun, _, ended = markers.splitlines()
    for bad in (markers.replace("out", "other"), markers + markers, f"{ended}\n{begun}", "\xe9"):
        readme.write_text(bad, encoding="latin-1")
        assert report.main(args) == 1
        assert is_one_line(capsys.readouterr().err) and not (out / "report.md").exists()
        assert readme.read_text(encoding="latin-1") == bad
    readme.write_text(f"# Mine\n\n{markers}\n\nThe rest.\n")
    assert report.main(args) == 0
    text = readme.read_text()
    assert text.startswith("# Mine\n\n<!-- report.py: out -->\n") and "old" not in text
    assert text.endswith("<!-- end of out -->\n\nThe rest.\n")
    assert row_of(text, "se")[1] == "93.10 ± 0.26" and "](out/report.md)" in text
    assert report.main(args) == 0 and readme.read_text() == text
    gates = "<!-- explain.py: out -->\nas it was\n<!-- end of explain.py -->\n"
    readme.write_text(text + gates)
    assert report.main(args) == 0 and readme.read_text() == text + gates
    assert "its table of gates stays" in capsys.readouterr().err


def test_a_readme_keeps_its_mode_its_line_endings_and_what_was_edited(study, tmp_path, monkeypatch):
    runs, out = study
    readme = tmp_path / "README.md"
    readme.write_bytes(b"# Mine\r\n<!-- report.py: out -->\r\n<!-- end of out -->\r\nThe rest.\r\n")
    readme.chmod(0o640)

    def edited_meanwhile(*_):
        with open(readme, "ab") as file:
            file.write(b"An edit.\r\n")
        return {}

    monkeypatch.setattr(report, "draw_figures", edited_meanwhile)
    flags = ["--runs", str(runs), "--out", str(out), "--readme", str(readme)]
    assert report.main(flags) == 0
    body = readme.read_bytes()
    assert body.endswith(b"The rest.\r\nAn edit.\r\n") and b"| `se` " in body
    assert body.count(b"\n") == body.count(b"\r\n") and readme.stat().st_mode & 0o777 == 0o640


def test_what_happened_to_a_run_is_said_where_nothing_is_compared(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path / "runs", "se", 0, **FULL)
    env = json.loads((folder / "env.json").read_text()) | {
        "changes": ["models.py: SE edited since"]
    }
    (folder / "env.json").write_text(json.dumps(env))
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "se/seed0: changed during the run: models.py: SE edited since" in text


def test_a_folder_that_cannot_be_read_is_named(study, monkeypatch, tmp_path, capsys):
    runs, _ = study
    closed, scandir = runs / "fashion_mnist/published/se", os.scandir
    for here, there in ("xy", "yx"):  # links that lead to each other have no end
        (runs / here).mkdir()
        (runs / here / "link").symlink_to(runs / there)

    def scan(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert report.main(["--runs", str(runs), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    reason = "/published/se left out, it cannot be read: Permission denied"
    assert text.count(reason) == text.count("cannot be read") == 2  # what was found, is missing
    assert reason in capsys.readouterr().out
    missing = tmp_path / "not" / "there"
    assert report.main(["--runs", str(missing), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and f"below {missing} (not a folder): run" in error


def test_planning(study, tmp_path, capsys):
    by_runs = ["--power", "--difference", "0.2", "--runs"]
    assert report.main([*by_runs, str(study[0])]) == 0
    assert capsys.readouterr().out.startswith("fashion_mnist, recipe published:\nTo detect")
    assert report.main([*by_runs, str(tmp_path / "none")]) == 1
    assert is_one_line(capsys.readouterr().err)
    assert report.main(["--power", "--sd", "0.15", "--difference", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    alone, corrected = (int(line.split()[0]) for line in lines[1:3])
    sd = 0.15 * 2**0.5
    for n, level in ((alone, 0.05), (corrected, 0.05 / 4)):
        assert verdicts.power(0.2, sd, n, level) >= 0.8 > verdicts.power(0.2, sd, n - 1, level)
    wrong = "", "--sd 0.1", "--sd -1 --difference 1", "--sd 1 --difference 1e-9", "--sd nan "\
        "--difference 1", f"--sd 1 --difference 1 --comparisons {10**400}"  # fmt: skip
    for flags in (*(f"--power {each}" for each in wrong), "--sd 1"):
        with pytest.raises(SystemExit) as stopped:
            report.main(flags.split())
        assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)


def test_predictions_of_another_length_are_not_counted(finished_run, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    copy_run(finished_run, runs, "baseline", 0, **FULL)
    short = copy_run(finished_run, runs, "se", 0, **FULL)
    np.save(short / "test_predictions.npy", np.zeros(99, np.uint8))
    empty = copy_run(finished_run, runs, "se", 1, **FULL)
    (empty / "test_labels.npy").write_bytes(b"")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert (
        "se/seed0 left out" in text and "predictions.npy: it has shape (99,), 10,000 images" in text
    )
    assert "se/seed1 left out" in text
    assert "No verdict" in text


def test_inference_time_in_two_modes(study):
    runs, out = study
    rows = [ROW | {"model": model, "params": 1} for model in ("baseline", "se")]
    for model, ms in (("baseline", 0.1), ("se", 0.15)):
        times = {"ms_per_image": ms, "ms_per_image_p10": 0.09, "ms_per_image_p90": 0.2}
        rows.append(ROW | {"model": model, "mode": "compile"} | times)
    rows += [ROW | {"model": "se", "batch_size": 1}]
    rows += [ROW | {"model": "baseline", "image": "3x32x32", "ms_per_image_p90": 0.9}]
    (out / "benchmark.json").write_text(json.dumps(rows))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    section = text.partition("### Published / ours")[2]
    assert row_of(section, "baseline")[4] == "0.06 / 0.250"  # eager, fp32, batch 64
    assert row_of(text, "se")[5] == "1.00x, compile 1.50x"


def test_a_fallback_is_reported(finished_run, tmp_path):
    copy_run(finished_run, tmp_path / "runs", "se", 0, fallback="mode graph failed (X: no)", **FULL)
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "se/seed0: mode graph failed (X: no)" in (tmp_path / "out/report.md").read_text()


def test_csv_and_summary(study):
    runs, out = study
    report.main(["--runs", str(runs), "--out", str(out)])
    with open(out / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["model"], line["seed"]) for line in lines][:4] == [
        ("baseline", "0"), ("baseline", "1"), ("baseline", "2"), ("se", "0"),
    ]  # fmt: skip
    assert [float(line["test_acc"]) for line in lines[3:6]] == [92.9, 93.4, 93.0]
    (summary,) = json.loads((out / "summary.json").read_text())["studies"]
    se = summary["models"]["se"]
    assert (se["n"], se["seeds"]) == (3, [0, 1, 2])
    assert se["test_acc_mean"] == pytest.approx(93.1)
    assert se["test_acc_sd"] == pytest.approx(statistics.stdev([92.9, 93.4, 93.0]))
    assert (se["test_acc_min"], se["test_acc_max"]) == (92.9, 93.4)


def test_same_files_same_text(study, tmp_path):
    runs, out = study
    report.main(["--runs", str(runs), "--out", str(out)])
    first = (out / "report.md").read_text()
    shutil.copytree(runs, tmp_path / "elsewhere" / "runs")
    report.main(["--runs", str(tmp_path / "elsewhere" / "runs"), "--out", str(out)])
    assert (out / "report.md").read_text() == first


def test_quick_runs_are_marked_and_kept_apart(study, finished_run):
    runs, out = study
    copy_run(finished_run, runs, "cbam_blocks", 7)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "cbam_blocks")[1] == "2"  # the narrow run is not among the full ones
    section = text.partition("## Other runs, without a verdict")[2].partition("\n## ")[0].strip()
    assert "epochs 2" in section and "width 8 (smoke test): cbam" in section
    assert is_one_line(section) and section.endswith("(1 seed)")
    with open(out / "results.csv") as file:
        quick = {line["seed"]: line["quick"] for line in csv.DictReader(file)}
    assert quick["7"] == "True" and quick["0"] == "False"


def test_unfinished_and_damaged_runs_are_named(study):
    runs, out = study
    published = runs / "fashion_mnist" / "published"
    (published / "se" / "seed1" / "result.json").unlink()
    (published / "se" / "seed2" / "result.json").write_text('{"model": "se"')
    shutil.copytree(published / "se" / "seed0", published / "se" / "seed9")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1:3] == ["1", "92.90"]
    assert "se/seed9 left out, same model and seed as" in text
    assert f"unfinished: {published / 'se' / 'seed1'}, 2 epochs done" in text
    assert "se/seed2 left out, its files are damaged" in text


@pytest.mark.parametrize("name", ["config.json", "env.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"null", b"[]", b"{}", b"3", b"", b"\xff\xfe"])
def test_one_damaged_run_does_not_take_the_others_along(study, name, content):
    runs, _ = study
    (runs / "fashion_mnist" / "published" / "se" / "seed1" / name).write_bytes(content)
    (found,), problems = read_studies(runs)
    seeds = [run.seed for run in found.runs["se"]]
    assert seeds == [0, 2] and len(problems) == 1 and "se/seed1 left out" in problems[0].words


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_acc": float("nan")}, "test_acc is nan"),
        ({"test_acc": 930.0}, "test_acc is 930"),
        ({"val_acc": None}, "val_acc is None"),
        ({"train_seconds": 0}, "train_seconds is 0"),
        ({"params": "many"}, "params is many"),
    ],
)
def test_a_result_that_cannot_be_is_named_and_left_out(study, changes, reason):
    runs, out = study
    path = runs / "fashion_mnist/published/se/seed1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1] == "2"
    assert any("se/seed1 left out" in line and reason in line for line in text.splitlines())


def test_other_settings_in_the_same_folder_are_named_and_left_out(study):
    runs, out = study
    path = runs / "fashion_mnist/published/se/seed1/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 0.5}))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1] == "2"
    assert "se/seed1 left out, its settings differ: lr 0.5 instead of 0.001" in text


def test_seeds_missing_for_one_model_are_named_and_the_rest_is_paired(study):
    runs, out = study
    shutil.rmtree(runs / "fashion_mnist/published/baseline/seed1")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    # The mean of seeds 0 and 2, not of three.
    assert row_of(text, "se")[1:3] == ["2", "92.95 ± 0.07"]
    assert row_of(text, "se")[3].startswith("-0.20 (")
    assert "`cbam_blocks`: no verdict, fewer than two seeds" in text


def test_other_models_beside_the_baseline_are_a_table_of_their_own(finished_run, tmp_path):
    for model, accuracy in (("baseline", 93.0), ("eca", 93.2)):
        for seed in (0, 1):
            changes = dict(overrides={}, quick=False, test_acc=accuracy + seed / 10)
            copy_run(finished_run, tmp_path / "runs", model, seed, **changes)
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    section = text.partition("### Published / ours")[2]
    assert row_of(section, "baseline")[1] == "93.27 / 93.05"
    assert row_of(section, "eca")[1] == "- / 93.25" and "| `se`" not in text


@pytest.mark.parametrize(
    ("dataset", "recipe", "models", "shown"),
    [
        ("fashion_mnist", "published", ["baseline", "se", "eca"], 4),
        ("fashion_mnist", "quick", ["baseline"], 4),
        ("fashion_mnist", "published", ["baseline", "eca"], 1),
        ("fashion_mnist", "strong", ["baseline", "se"], 0),
        ("mnist", "published", ["baseline", "se"], 0),
    ],
)
def test_published_figures_stand_beside_their_like(dataset, recipe, models, shown):
    study = Study(dataset, recipe, {}, {name: [] for name in models}, {}, [])
    assert len(study.published) == shown


def test_only_damaged_runs_make_no_table(study, capsys):
    runs, out = study
    for path in runs.glob("*/*/*/*/result.json"):
        path.write_text("{")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 1
    assert is_one_line(capsys.readouterr().err) and not (out / "report.md").exists()


def test_an_accuracy_that_its_predictions_do_not_bear_out_is_no_result(study):
    runs, out = study
    folder = runs / "fashion_mnist/published/se"
    shutil.copy(folder / "seed0/test_predictions.npy", folder / "seed1")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "92.90% of its predictions are correct, but its test_acc is" in text
    assert row_of(text, "se")[1] == "2"


@pytest.mark.parametrize(
    "body", [b"PK\x03\x04 no archive", b"", b"\x93NUMPY\x01\x00", np.float32(1).tobytes(), None]
)
def test_what_is_no_array_of_classes_is_named(study, body):
    runs, _ = study
    path = runs / "fashion_mnist/published/se/seed1/test_labels.npy"
    if body is None:
        np.save(path, np.array([], dtype=np.uint8))
        result = path.with_name("result.json")
        result.write_text(json.dumps(json.loads(result.read_text()) | {"test_images": None}))
    else:
        path.write_bytes(body)
    (found,), problems = read_studies(runs)
    assert len(found.runs["se"]) == 2 and "se/seed1 left out" in problems[0].words


def test_a_folder_of_any_name(study):
    runs, out = study
    folder = runs / "fashion_mnist/published/ev\udcff\n## il|/seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "\n## il" not in text and "unfinished" in text


@pytest.mark.parametrize(
    "content",
    ["null", "3", "[{}]", "{", '[{"model": "se"}]']
    + [
        json.dumps([ROW | {"model": "se"} | change])
        for change in (
            {"ms_per_image": None}, {"ms_per_image": 0}, {"torch": 2},
            {"model": ["se"]}, {"params": 10**400},
        )
    ],
)  # fmt: skip
def test_a_damaged_benchmark_is_named_and_left_out(tmp_path, content):
    (tmp_path / "benchmark.json").write_text(content)
    rows, (problem,) = read_rows(tmp_path / "benchmark.json")
    assert rows == [] and is_one_line(problem.words) and "benchmark.json" in problem.words
    assert "is damaged (" in problem.words
    assert "run python benchmark.py again" in problem.words


def test_a_report_without_a_damaged_benchmark(study):
    runs, out = study
    (out / "benchmark.json").write_text("{")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "benchmark.json is damaged (" in text and row_of(text, "se")[1] == "3"


def test_without_benchmark_it_says_so(study):
    runs, out = study
    (out / "benchmark.json").unlink()
    (out / "inference_time.png").write_bytes(b"of an earlier report")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "no FLOPs and no inference time" in text and "inference_time.png" not in text
    assert not (out / "inference_time.png").exists()
    assert len(row_of(text, "se")) == 5  # without a column for inference


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and str(tmp_path) in error
    assert not (tmp_path / "out").exists()


def test_needs_no_torch(study, tmp_path):
    runs, out = study
    block = tmp_path / "torch.py"
    block.write_text("raise ImportError('report.py must not import torch')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import report; sys.exit("
    done = script("-c", program + f"report.main(['--runs', {str(runs)!r}, '--out', {str(out)!r}]))")
    assert done.returncode == 0, done.stderr


# --- Where run folders lie, and what they may look like -------------------------------------------


def test_runs_are_found_at_any_depth_by_what_they_say(study, tmp_path):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    expected = json.loads((out / "summary.json").read_text())["studies"]
    deep = tmp_path / "deep"
    (deep / "a/b").mkdir(parents=True)
    (runs / "fashion_mnist/published/baseline").rename(deep / "a/b/renamed")
    (runs / "fashion_mnist/published/se").rename(deep / "se")
    (runs / "fashion_mnist").rename(deep / "a/fashion_mnist")
    (deep / "se/seed1").rename(deep / "any name")
    (deep / ".hidden").mkdir()
    shutil.copytree(deep / "se/seed0", deep / ".hidden/seed0")
    assert report.main(["--runs", str(deep), "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["studies"] == expected
    one = deep / "any name"
    assert report.main(["--runs", str(one), "--out", str(out)]) == 0  # the folder of a run itself
    assert row_of((out / "report.md").read_text(), "se")[1:3] == ["1", "93.40"]


def test_a_copy_of_a_run_counts_once_and_is_named(study):
    runs, out = study
    shutil.copytree(runs / "fashion_mnist", runs / "a/backup/fashion_mnist")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1] == "3"
    named = [line for line in text.splitlines() if "left out, same model and seed as" in line]
    assert len(named) == 8 and all(line.startswith(f"- {runs / 'a/backup'}") for line in named)


def test_a_setting_that_is_not_used_is_none_or_zero(study):
    """So a new setting, off by default, leaves finished runs what they are."""
    runs, _ = study
    path = runs / "fashion_mnist/published/se/seed1/config.json"
    config = json.loads(path.read_text())
    new = {"weight_decay": 0.0, "crop": 0, "flip": False, "a_new_one": 0, "image_size": 0}
    path.write_text(json.dumps(config | new))
    (found,), problems = read_studies(runs)
    assert len(found.runs["se"]) == 3 and not problems
    path.write_text(json.dumps(config | {"label_smoothing": 0.1}))
    (found,), (problem,) = read_studies(runs)
    assert len(found.runs["se"]) == 2
    assert "label_smoothing 0.1 instead of none" in problem.words


# --- explain.json ---------------------------------------------------------------------------------


EXPLAINED = "runs/fashion_mnist/published/cbam_blocks/seed0"


def explained_report(folder, **changes):
    """report.md with the run's explain.json changed."""
    path = folder / EXPLAINED / "explain.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(found))
    assert report.main(["--runs", str(folder / "runs"), "--out", str(folder / "out")]) == 0
    return (folder / "out/report.md").read_text(), found


def test_what_explain_py_found_is_in_the_report(explained):
    text, found = explained_report(explained)
    section = text.partition("### What attention attends to")[2].partition("\n## ")[0]
    fixed = f"{found['test_acc_gates_fixed']:.2f}"
    ablation, stages = section.split("Test accuracy of the same weights")
    name, *row = row_of(ablation, "cbam_blocks")
    assert name == "`cbam_blocks` (smoke test, width 8)" and row[-1].startswith("-2.00 (")
    assert row[:-1] == ["0", "100", f"{found['test_acc']:.2f}", fixed]
    assert ["layer4", "0.250", "0.010", "0.002", "-", "100%"] in [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in stages.splitlines()
    ]
    assert f"![cbam blocks seed0 explain](../{EXPLAINED}/explain.png)" in section
    assert (explained / "out/report.html").read_text().count("<img ") == text.count("![")
    summary = json.loads((explained / "out/summary.json").read_text())
    assert summary["studies"][0]["explained"] == [found | {"model": "cbam_blocks", "seed": 0}]


@pytest.mark.parametrize("key", ["gates", "lost", "test_acc"])
@pytest.mark.parametrize("value", [float("nan"), "x", None])
def test_a_damaged_explain_json_is_named(explained, key, value):
    text, _ = explained_report(explained, **{key: value})
    assert "What attention attends to" not in text and row_of(text, "cbam_blocks")[1] == "2"
    assert "seed0/explain.json left out, it is damaged" in text


@pytest.mark.parametrize("kind", ["link", "text"])
def test_only_a_picture_is_shown_as_one(explained, kind):
    """A stranger's link may lead to a private file, which the page would hold."""
    picture, secret = explained / EXPLAINED / "explain.png", explained / "secret.png"
    shutil.move(picture, secret)
    picture.symlink_to(secret) if kind == "link" else picture.write_text("a key")
    text, _ = explained_report(explained)
    assert "What attention attends to" in text and "explain.png" not in text


def test_the_interval_is_that_of_paired_proportions():
    """With 1/2 an image more of each of the four kinds: right or wrong, before and after."""
    both, lost, won, neither = 5, 3, 1, 2
    row = {"test_acc_gates_fixed": 6 / 11, "test_images": 11, "won": won, "lost": lost}
    values = np.repeat([0, -1, 1, 0], np.array([both, lost, won, neither]) * 2 + 1)  # doubled
    middle, error = values.mean(), 1.96 * values.std() / (11 + 2) ** 0.5
    difference, bounds = ablation(row)
    assert difference == pytest.approx(100 * (won - lost) / 11)
    assert bounds == pytest.approx((100 * (middle - error), 100 * (middle + error)))
    assert ablation(row | {"test_acc_gates_fixed": None}) is None
    _, (low, high) = ablation(row | {"won": 0, "lost": 0})
    assert low == -high < -10  # of 11 images none changed: that says little
