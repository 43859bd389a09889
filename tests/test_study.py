"""kit/study.py: its plans, what it refuses, and all of a small study."""

import itertools
import json
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import benchmark
import data
import train
from kit import study
from kit.command_line import UserError
from kit.environment import source_hashes
from kit.plans import add_plan, read_plans
from kit.settings import as_config
from models import MODELS

import pytest
from conftest import REPO, is_one_line, run_all, settings_of, unaligned, variables
from PIL import Image

VARIABLES = ["MODELS", "SEEDS", "RECIPE", "DATASET", "FLAGS", "RUNS", "OUT", "JOBS", "SHARD"]
SMALL = {"SEEDS": "0 1", "FLAGS": "--width 16 --epochs 4 --limit-train 256 --limit-test 500"}


@pytest.fixture
def plan(monkeypatch, capsys):
    """plan("full", SEEDS="0"): the lines of a plan, comments among them."""

    def call(*words, **environment):
        for name in [*VARIABLES, "PYTHON"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        assert study.main(["plan", *words]) == 0
        return capsys.readouterr().out.splitlines()

    return call


def runs_in(lines):
    """(RUNS, recipe, model, seed, further flags) of every training run of a plan."""
    found = []
    for words in (shlex.split(line, comments=True)[1:] for line in lines):
        if words[:1] == ["train.py"]:
            flags = dict(zip(words[1::2], words[2::2]))
            named = [flags.pop(f"--{name}") for name in ("runs", "recipe", "model", "seed")]
            assert flags.pop("--dataset")
            found.append((*named, " ".join(f"{key} {value}" for key, value in flags.items())))
    return found


def finish(runs, *flags, **result):
    """The folder of a finished run with these flags, as train.py leaves it."""
    settings = settings_of(*map(str, flags), "--runs", str(runs))
    folder = (
        runs / settings.dataset_name / settings.recipe / settings.model / f"seed{settings.seed}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    config = as_config(settings) | {"data": result.pop("data", "0")}
    row = {"epoch": 1, "train_loss": 1.0, "val_acc": 50.0, "lr": 1e-3}
    result = dict(
        dataset=settings.dataset_name, test_acc=50.0, test_acc_last=50.0, val_acc=50.0, params=10,
        epochs_run=1, best_epoch=1, train_seconds=1.0, images_per_second=1.0, device="CPU",
        classes=["a", "b"], image=[1, 28, 28], test_images=10,
    ) | result  # fmt: skip
    result |= {k: config[k] for k in ("model", "recipe", "seed", "width", "precision", "quick")}
    result |= {"overrides": config["overrides"], "mode": "eager"}
    env = {"torch": "2", "sha256": source_hashes(), "variables": {}}
    for name, content in (("config.json", config), ("result.json", result), ("env.json", env)):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text(json.dumps(row))
    return folder


def test_full_is_the_published_table_and_a_verdict(plan):
    lines, models = plan("full"), ["baseline", "se", "cbam_blocks", "cbam_classifier"]
    published = [("runs", "published", model, str(k), "") for k in range(5) for model in models]
    models.append("se_static")
    verdict = [("runs", "short", model, str(k), "") for k in range(20) for model in models]
    assert runs_in(lines) == published + verdict
    first, *last = (shlex.split(line, comments=True)[1:] for line in (lines[0], *lines[-3:]))
    folders = [f"runs/fashion_mnist/short/{model}/seed0" for model in models]
    limit = ["--limit-test", "10000"]
    assert first == ["data.py", "--dataset", "fashion_mnist", "--data-dir", "data"] and last == [
        ["benchmark.py", "--models", *models, "--keep", "--out", "results"],
        ["explain.py", "--keep", "--out", "results", *limit, "--compare", *folders],
        ["report.py", "--runs", "runs", "--out", "results"],
    ]
    assert plan("full", SHARD="1/3", JOBS=2) == [lines[0], *lines[2:21:3], *lines[22:121:3]]
    assert plan("verdict") == [lines[0], *lines[21:]]
    assert plan("full", RECIPE="strong", SEEDS="7")[-3].count("strong") == 0
    assert len(runs_in(plan("full", RECIPE="strong", SEEDS="7"))) == 4  # that table alone


def test_flags_are_those_of_every_run(plan, tmp_path):
    """And of what is done already."""
    folder = finish(tmp_path, "--model", "eca", "--recipe", "short", "--seed", 3, "--width", 16)
    mine = {"MODELS": "baseline eca", "RUNS": tmp_path}
    lines = plan("verdict", FLAGS="--width 16", **mine)
    runs = runs_in(lines)
    assert len(runs) == 40 and {flags for *_, flags in runs} == {"--width 16"}
    assert [line.split()[3] for line in lines if line.endswith("# done")] == ["eca"]
    first = tmp_path / "fashion_mnist/short/baseline/seed0"
    assert lines[-3].endswith(f"--like {first}  # skips what is there")
    (line,) = [line for line in plan("verdict", **mine) if "# not done" in line]
    assert f"{folder} holds a run with width 16 instead of 64" in line
    placed = plan("verdict", FLAGS="--position classifier", MODELS="se")
    assert "runs/fashion_mnist/short/se_classifier/seed0" in placed[-2]


def test_what_is_planned_is_written_before_the_first_run(tmp_path):
    """Once; more of it adds a line when there are results, and until then takes its place."""

    def seeds(models, seeds, overrides=()):
        run = dict(runs=tmp_path, dataset_name="mnist", recipe="short", overrides=dict(overrides))
        pairs = itertools.product(models, seeds)
        add_plan([SimpleNamespace(**run, model=model, seed=seed) for model, seed in pairs])
        return [(plan["models"], len(plan["seeds"])) for plan in read_plans(tmp_path)]

    assert seeds(["baseline", "se"], range(5)) == [(["baseline", "se"], 5)]
    assert seeds(["baseline", "se"], range(20)) == [(["baseline", "se"], 20)]
    assert seeds(["se"], range(3)) == [(["baseline", "se"], 20)]
    result = tmp_path / "mnist/short/se/seed0/result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    more = [(["baseline", "se"], 20), (["baseline", "eca"], 10)]
    assert seeds(["baseline", "eca"], range(10)) == seeds(["eca"], range(9)) == more
    narrow = {"width": 16}
    more.append((["se"], 2))
    assert seeds(["se"], range(2), narrow) == seeds(["se"], range(2), narrow) == more
    keys = {"date", "dataset", "recipe", "overrides", "models", "seeds"}
    assert set(read_plans(tmp_path)[0]) == keys


@pytest.mark.parametrize("content", ["{", "3", "[3]", '[{"models": ["se"]}]', '[{"seeds": 3}]'])
def test_a_damaged_plan_is_one_line(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json is damaged") as error:
        read_plans(tmp_path)
    assert is_one_line(str(error.value))


def test_quick_and_other_data(plan, tmp_path):
    quick = plan("quick", MODELS="se  baseline se", SEEDS="3", RUNS=tmp_path, PYTHON="py")
    assert runs_in(quick) == [(str(tmp_path), "quick", m, "3", "") for m in ("se", "baseline")]
    assert quick[-3].endswith("--modes eager --batch-sizes 64  # skips what is there")
    assert quick[-1].startswith("py ")
    for place in ("my/birds", "yours/birds"):
        for i, name in itertools.product(range(3), "ab"):
            path = tmp_path / place / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (24, 32), 9 * i + len(place)).save(path)
    mine = tmp_path / "my/birds"
    digest = data.load_dataset(str(mine), tmp_path / "data").digest
    folder = finish(
        tmp_path, "--model", "se", "--dataset", mine, "--recipe", "strong", "--seed", 3,
        data=digest, image=[1, 32, 24], classes=["a", "b"],
    )  # fmt: skip
    birds = {"RUNS": tmp_path, "SEEDS": "3", "RECIPE": "strong"}
    lines = plan("full", DATASET=mine, **birds)
    assert [run[2] for run in runs_in(line for line in lines if line.endswith("# done"))] == ["se"]
    first = tmp_path / "birds/strong/baseline/seed3"
    assert lines[-3].endswith(f"--like {first}  # skips what is there")
    args = benchmark.parse(["--like", str(folder)])
    assert (args.image, args.classes, args.width) == ("1x32x24", 2, 64)
    lines = plan("full", DATASET=tmp_path / "yours/birds", **birds)
    (line,) = [line for line in lines if "# not done" in line]
    assert f"{folder} holds a run with other images or labels" in line


def test_without_a_word_the_gpu_decides(plan, monkeypatch, capsys):
    monkeypatch.setattr(study, "visible_gpus", lambda: (["0"], "NVIDIA H100 80GB"))
    assert plan() == plan("full") and " results/nvidia_h100_80gb/" in plan("study")[-1]
    monkeypatch.setattr(study, "visible_gpus", lambda: ([], "no GPU at all"))
    assert study.main(["plan"]) == 0
    assert capsys.readouterr().err == "no GPU at all: a quick run on the CPU\n"
    assert study.main(["study"]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "no GPU at all" in error and 'FLAGS="--width 16"' in error


def test_the_study_is_every_run_once_and_what_matters_most_first(plan, tmp_path):
    for k in range(3):
        finish(tmp_path / "runs", "--model", "se", "--seed", k, "--recipe", "short")
    lines = plan("study", OUT=tmp_path)
    compared, at = study.COMPARED, ("stages", "prepool", "classifier")
    further = ["baseline", "cbam_blocks", *(m for m in MODELS if m not in compared)]
    placed = [("baseline", "")]
    placed += [(m, f"--position {position}") for m in ("se", "cbam_blocks") for position in at]
    expected = [
        *(("runs", "published", m, k, "") for k in range(5) for m in compared),
        *(("runs", "short", m, k, "") for k in range(20) for m in compared),
        *(("fp32", "short", m, k, "--precision fp32")
          for k in range(10) for m in ("baseline", "cbam_blocks")),
        *(("modules/runs", "short", m, k, "") for k in range(10) for m in further),
        *(("positions/runs", "short", m, k, flags) for k in range(10) for m, flags in placed),
    ]  # fmt: skip
    assert runs_in(lines) == [(f"{tmp_path}/{r}", *n, str(k), f) for r, *n, k, f in expected]
    assert len(expected) == 345 and sum(line.endswith("# done") for line in lines) == 3
    scripts = [shlex.split(line, comments=True)[1] for line in lines if line[0] != "#"]
    assert scripts[:2] == ["data.py", "-m"]
    looks = ["explain.py", *["benchmark.py"] * 3, "report.py", "train.py"]
    assert scripts[2 + 5 * len(compared) :][: len(looks)] == looks


def test_a_small_study_is_the_same_with_flags_and_seeds(plan, monkeypatch):
    monkeypatch.setattr(study, "visible_gpus", lambda: ([], "no GPU at all"))
    whole, lines = plan("study", OUT="small"), plan("study", OUT="small", **SMALL)
    few = [run[:4] for run in runs_in(whole) if int(run[3]) < 2]
    assert [run[:4] for run in runs_in(lines)] == few and len(few) == 64
    assert all(SMALL["FLAGS"] in flags for *_, flags in runs_in(lines))
    costs = [line for line in lines if " benchmark.py " in line]
    like = "--like small/runs/fashion_mnist/published/baseline/seed0"
    assert len(costs) == 4 and all(like in line and "graph" not in line for line in costs)


def test_done_is_a_whole_result_of_just_these_settings(plan, tmp_path):
    """The plan says of a run what train.py would."""
    fp32 = "--model", "baseline", "--seed", 1, "--precision", "fp32", "--recipe", "short"

    def remarks(what="full", **environment):
        lines = [line.partition("  # ")[::2] for line in plan(what, **environment)]
        return {runs_in([line])[0][2:4]: remark for line, remark in lines if "done" in remark}

    for flags in (fp32, (*fp32, "--lr", 0.5)):
        finish(tmp_path / "fp32", *flags)
    assert "lr 0.5 instead of 0.001" in remarks("study", OUT=tmp_path)["baseline", "1"]
    finish(tmp_path, "--model", "se", "--seed", 1, "--lr", 0.5)
    for seed in range(2, 5):
        folder = finish(tmp_path, "--model", "se", "--seed", seed)
    (folder.parent / "seed3/result.json").write_text("")  # damaged
    env = json.loads((folder / "env.json").read_text())
    env["sha256"]["models.py: SE"] = "0"
    (folder / "env.json").write_text(json.dumps(env))
    finish(tmp_path, "--model", "baseline", "--seed", 0)
    (tmp_path / "fashion_mnist/published/baseline/seed0/metrics.jsonl").write_text("")
    found = remarks(RUNS=tmp_path)
    assert found.keys() == {("se", "1"), ("se", "2"), ("se", "3"), ("se", "4"), ("baseline", "0")}
    assert found["se", "2"] == "done" and "lr 0.5 instead of 0.001" in found["se", "1"]
    assert found["se", "4"].startswith("done (models.py: SE edited since;")
    assert "damaged (result.json: " in found["se", "3"]
    assert "metrics.jsonl has not the 1 epochs" in found["baseline", "0"]
    assert all(found[name].startswith("not done") for name in (("se", "1"), ("baseline", "0")))


@pytest.mark.parametrize("name", [n for n in train.SETTINGS if n not in ("epochs", "quick")])
def test_a_run_with_any_other_setting_is_not_done(plan, tmp_path, name):
    """Whichever it is: they come from the table."""
    value = train.SETTINGS[name][0]
    other = {"lr": 0.1, "normalize": "data", "flip": True, "anneal": "batch", "tested": "last"}
    other = other.get(name)
    other = value + 1 if other is None else other
    folder = finish(tmp_path, "--model", "se", "--seed", 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: other}))
    (line,) = [line for line in plan("full", RUNS=tmp_path) if "  # not done" in line]
    assert f"not done: {folder} holds a run with {name} {other} instead of" in line


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        ("plan all", {}, "all"),
        ("plan full quick", {}, "full quick"),
        ("study --miniature", {}, "study --miniature"),
        ("quick", {"MODELS": "se resnet"}, "resnet"),
        ("plan full", {"SEEDS": "0 one"}, "one"),
        ("quick", {"SEEDS": " "}, "SEEDS"),
        ("quick", {"RECIPE": "published"}, "RECIPE"),
        ("verdict", {"RECIPE": "strong"}, "RECIPE"),
        ("verdict", {"FLAGS": "--widht 16"}, "FLAGS: unrecognized arguments: --widht"),
        ("plan verdict", {"FLAGS": "--seed 3"}, "FLAGS: they may not set model"),
        ("plan verdict", {"FLAGS": "--dry-run"}, "FLAGS: they may not set model"),
        ("full", {"FLAGS": "--width '16"}, "FLAGS: No closing quotation"),
        ("plan full", {"RUNS": "-rf"}, "RUNS"),
        ("quick", {"OUT": "-out"}, "OUT"),
        ("plan full", {"RECIPE": "strnog"}, "strnog"),
        ("plan full", {"DATASET": "fashion"}, "choose from fashion_mnist, mnist"),
        ("plan full", {"DATASET": "no/where"}, "there is no folder"),
        ("plan full", {"RUNS": "a\nb"}, "one line"),
        ("plan full", {"SHARD": "4/4"}, "SHARD"),
        ("study", {"MODELS": "se"}, "MODELS"),
        ("plan study", {"RUNS": "elsewhere"}, "RUNS"),
        ("study", {"SHARD": "0/2"}, "SHARD"),
        ("plan study", {"JOBS": "0"}, "JOBS"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words, environment, named, monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(SystemExit) as ended:
        study.main(words.split())
    done = capsys.readouterr()
    assert (ended.value.code, done.out) == (2, "") and is_one_line(done.err) and named in done.err


@pytest.mark.slow
def test_a_small_study(tmp_path):
    """Stopped in its first training run, resumed to its end, and called once more."""
    out, log = tmp_path / "out", tmp_path / "log"
    small = {"OUT": out} | SMALL
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["./run_all.sh", "study"], cwd=REPO, env=variables(**small), stdout=file, stderr=file
        )
        while "epoch  1/4" not in log.read_text() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143

    done = run_all("study", **small)
    assert done.returncode == 0, done.stderr
    text, modules, positions = (
        unaligned((out / folder / "report.md").read_text())
        for folder in ("", "modules", "positions")
    )

    def row(model, seeds):
        return f"| `{model}` (smoke test, width 16) | {seeds} |"

    assert all(text.count(row(model, 2)) >= 2 for model in study.COMPARED)  # of either recipe
    assert all(row(model, 2) in modules for model in study.FURTHER)
    assert row("se_stages", 2) in positions and "explain_compare.png" in text
    plans = [(p["recipe"], len(p["models"]), len(p["seeds"])) for p in read_plans(out / "runs")]
    assert plans == [("published", 5, 2), ("short", 5, 2)]
    speed = json.loads((out / "benchmark_train.json").read_text())
    assert {"plain loop", "eager"} < {row["mode"] for row in speed}

    # The small files alone, as from a clone: nothing is trained again, the reports are the same.
    for path in [*out.rglob("*.pt"), *out.rglob("events.out.tfevents.*"), out / "report.md"]:
        path.unlink()
    again = run_all("study", **small)
    assert again.returncode == 0 and "kept: " in again.stdout
    assert "epoch  1/4" not in again.stdout and (out / "report.md").read_text() == text
