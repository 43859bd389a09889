import json
import re
import time

import benchmark
import data
import train
from kit import fast, training_speed
from kit.training_speed import PilImages, plain_steps
from models import MODELS, build_model

import pytest
import torch
from conftest import REPO, is_one_line, unaligned
from test_models import torchvision_resnet18
from torch.utils.data import DataLoader

PUBLISHED_FLOPS = {  # 2 x thop in G, FlopCounterMode exactly
    "baseline": (0.92, 911_601_664),
    "se": (0.92, 911_775_744),
    "cbam_blocks": (0.92, 912_359_464),
    "cbam_classifier": (0.92, 911_732_932),
}


def convolution_flops(model):
    """2 x multiply-adds of convolutions and linear layers for one image, from output shapes."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        weights_per_output = layer.weight[0].numel()
        total += 2 * output.numel() * weights_per_output

    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 1, 28, 28))
    return total


@pytest.mark.parametrize("name", PUBLISHED_FLOPS)
def test_flops_are_the_published_ones(name):
    found = benchmark.count(name)
    assert (round(found["flops"] / 1e9, 2), found["flops_aten"]) == PUBLISHED_FLOPS[name]
    assert found["flops_aten"] == convolution_flops(build_model(name).eval())


def rows_of(out, name="benchmark"):
    return json.loads((out / f"{name}.json").read_text())


def small(out, *flags):
    """benchmark.py of a narrow model on a CPU, each batch timed once; the exit code."""
    fixed = ["--models", "se", "--width", "4", "--batch-sizes", "2", "--repeats", "1"]
    return benchmark.main([*fixed, "--device", "cpu", "--out", str(out), *flags])


def test_benchmark_json_has_a_row_a_model_and_batch_size(tmp_path, capsys):
    flags = ["--width", "8", "--batch-sizes", "1", "4", "--repeats", "5", "--device", "cpu"]
    flags += ["--modes", "eager"]
    assert benchmark.main([*flags, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    expected = [(size, model) for size in (1, 4) for model in MODELS]
    assert [(row["batch_size"], row["model"]) for row in rows] == expected
    for row in rows:
        assert set(row) >= {
            "model", "params", "flops", "flops_aten", "batch_size", "precision", "mode",
            "ms_per_image", "ms_per_image_p10", "ms_per_image_p90", "ms_per_image_p99",
            "images_per_second", "peak_memory_mb", "device",
        }  # fmt: skip
        times = [row[f"ms_per_image{p}"] for p in ("_p10", "", "_p90", "_p99")]
        assert times[0] > 0 and times == sorted(times)
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms_per_image"])
    printed = capsys.readouterr()
    assert (tmp_path / "benchmark.md").read_text() in printed.out and printed.err == ""
    assert printed.out.splitlines()[:2] == ["fp32, batch 1", "fp32, batch 4"]  # in a pipe
    assert all(f"| `{name}` |" in unaligned(printed.out) for name in MODELS)

    # --keep measures only what is not there yet under the same settings
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    assert rows_of(tmp_path) == rows
    (tmp_path / "benchmark.json").write_text(json.dumps(rows[1:]))
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    kept = rows_of(tmp_path)
    assert kept[1:] == rows[1:] and kept[0]["ms_per_image"] != rows[0]["ms_per_image"]
    edited = kept[1] | {"sha256": kept[1]["sha256"] | {"models.py": "before an edit"}}
    (tmp_path / "benchmark.json").write_text(json.dumps([kept[0], edited, *kept[2:]]))
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    again = rows_of(tmp_path)
    assert [a == b for a, b in zip(again, kept)] == [True, False] + [True] * (len(rows) - 2)
    assert [row["sha256"] for row in again] == [row["sha256"] for row in kept]
    flags[1] = "4"
    two = ["--models", "baseline", "se", "--keep", "--out", str(tmp_path)]
    assert benchmark.main([*flags, *two]) == 0
    both = rows_of(tmp_path)
    assert both[4:] == again and [row["width"] for row in both[:4]] == [4] * 4
    few = ["--models", "se", "--batch-sizes", "4", *flags[4:], "--width", "8"]
    assert benchmark.main([*few, "--out", str(tmp_path)]) == 0  # the other rows stay
    found = rows_of(tmp_path)
    changed = [(row["width"], row["batch_size"], row["model"])
               for row, old in zip(found, both, strict=True) if row != old]  # fmt: skip
    assert changed == [(8, 4, "se")]


@pytest.mark.parametrize("content", ["{", "3", "[3, null]", '[{"model": "se"}]'])
def test_a_damaged_file_is_not_written_over(tmp_path, content, capsys):
    (tmp_path / "benchmark.json").write_text(content)
    flags = ["--models", "baseline", "--width", "4", "--batch-sizes", "2", "--device", "cpu"]
    flags += ["--modes", "eager", "--repeats", "1", "--keep", "--out", str(tmp_path)]
    assert benchmark.main(flags) == 1
    assert is_one_line(error := capsys.readouterr().err) and "benchmark.json" in error
    assert "delete it" in error and (tmp_path / "benchmark.json").read_text() == content


def test_the_table_is_relative_to_the_baseline():
    row = {"device": "CPU", "torch": "2", "width": 8, "image": "1x28x28", "classes": 10}
    row |= {"batch_size": 64, "precision": "fp32", "params": 1234, "flops_aten": 5e6, "flops": 6e9}
    times = [("baseline", "eager", 2.0), ("se", "eager", 3.0), ("se", "graph", 1.0)]
    rows = [row | {"model": n, "mode": mode, "ms_per_image": ms} for n, mode, ms in times]
    assert unaligned(benchmark.markdown(rows)).splitlines()[4:] == [
        "| model | parameters | MFLOPs | GFLOPs as published | eager, ms/image | graph, ms/image |",
        "|" + " --- |" * 6,
        "| `baseline` | 1,234 | 5.0 | 6.00 | 2.00 (1.00) | - |",
        "| `se` | 1,234 | 5.0 | 6.00 | 3.00 (1.50) | 1.00 |",
    ]


@pytest.mark.slow
def test_compiled_compared_with_eager(tmp_path):
    assert small(tmp_path, "--models", "cbam_blocks", "--width", "8") == 0  # all modes of a CPU
    eager, compiled = rows_of(tmp_path)
    assert (eager["mode"], compiled["mode"]) == ("eager", "compile")
    assert eager["logit_error"] == 0 and 0 < compiled["logit_error"] < 1e-4
    assert eager["set_up_seconds"] is None and compiled["set_up_seconds"] > 0


def test_a_mode_with_other_logits_is_left_out_and_fails(tmp_path, monkeypatch, capsys):
    def without_the_gates(forward, **options):
        return lambda images: forward(images) * 1.001

    monkeypatch.setattr(torch, "compile", without_the_gates)
    assert small(tmp_path) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "se, mode compile, fp32" in error and "1.0e-03" in error
    (eager,) = rows_of(tmp_path)
    assert eager["mode"] == "eager"
    older = eager | {"mode": "compile", "sha256": {}}  # one that earlier code has measured
    (tmp_path / "benchmark.json").write_text(json.dumps([eager, older]))
    assert small(tmp_path) == 1
    assert [row["mode"] for row in rows_of(tmp_path)] == ["eager"]


def test_a_trial_is_not_kept_for_a_measurement(tmp_path):
    for repeats in (1, 3):
        assert small(tmp_path, "--modes", "eager", "--keep", "--repeats", str(repeats)) == 0
        assert [row["repeats"] for row in rows_of(tmp_path)] == [repeats]


def test_one_without_memory_leaves_no_flags_to_the_others(tmp_path, monkeypatch):
    """They are set to float32 for the logits that others are compared with."""
    seen, build = [], benchmark.build

    def failing(*shape):
        if shape[0] == "cbam_blocks":
            fast.set_up_torch("fp32")
            raise torch.OutOfMemoryError("out of memory")
        return build(*shape)

    timed = benchmark.seconds_per_call
    monkeypatch.setattr(benchmark, "build", failing)
    monkeypatch.setattr(
        benchmark,
        "seconds_per_call",
        lambda *call: seen.append(torch.are_deterministic_algorithms_enabled()) or timed(*call),
    )
    monkeypatch.setattr(fast, "why_not", lambda *_: None)  # as on a GPU
    flags = ["--models", "se", "cbam_blocks", "--modes", "eager", "--precisions", "default"]
    assert small(tmp_path, *flags, "--repeats", "2") == 1
    assert seen == [False, False]


def test_a_mode_that_does_not_run_is_left_out(tmp_path, monkeypatch, capsys):
    def failing(forward, **options):
        raise NotImplementedError("no such compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", failing)
    assert small(tmp_path) == 0
    error = capsys.readouterr().err
    assert is_one_line(error) and "no such compiler" in error
    assert [row["mode"] for row in rows_of(tmp_path)] == ["eager"]


def test_the_check_of_logits_sees_the_spatial_gate():
    model = benchmark.build("cbam_blocks", 4)
    images = torch.rand(2, 1, 28, 28)
    before = model(images)
    model.layer4[1].attention.spatial.conv.weight.data.mul_(2)
    assert (model(images) - before).abs().max() / before.abs().max() > 1e-3


def test_timing_waits_for_the_work():
    def sleep(x):
        time.sleep(0.02)
        return x

    assert benchmark.seconds_per_call(sleep, torch.zeros(1)) >= 0.02


# --- Training steps -------------------------------------------------------------------------------


def test_the_training_loop_equals_the_plain_one(tmp_path, fashion_mnist):
    flags = ["--limit-train", "66", "--limit-test", "100", "--epochs", "2", "--device", "cpu"]
    place = ["--data-dir", str(REPO / "data"), "--runs", str(tmp_path)]
    assert train.main(["--model", "baseline", *flags, *place]) == 0
    folder = tmp_path / "fashion_mnist/published/baseline/seed0"
    ours = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    train_idx, val_idx = data.split_indices(60_000, seed=0)
    train_idx, val_idx = train_idx[:66], val_idx[:64]
    images, labels = fashion_mnist.train_images, fashion_mnist.train_labels
    model = torchvision_resnet18().to(memory_format=torch.channels_last)
    model.load_state_dict(build_model("baseline", seed=0).state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    # Adam's first step is the learning rate times the sign of each gradient, however small that is:
    # rounding, which differs between the two, moves the loss in the third digit.
    for row in ours:
        order = data.shuffled(train_idx, 0, row["epoch"])  # each epoch has one of its own
        loader = DataLoader(PilImages(images[order], labels[order]), 64)
        total = sum(loss * n for loss, n in plain_steps(model, loader, optimizer, "cpu"))
        scheduler.step()
        assert row["train_loss"] == pytest.approx(total / 66, rel=5e-3)
        ((val_images, val_labels),) = DataLoader(PilImages(images[val_idx], labels[val_idx]), 64)
        with torch.no_grad():
            predictions = model.eval()(val_images).argmax(1)
        assert row["val_acc"] == pytest.approx(train.accuracy(predictions, val_labels))
    best = torch.load(folder / "best.pt", weights_only=True)
    assert len(ours) == 2 and best.keys() == model.state_dict().keys()


def without_classes(error):
    """Without the lines on classes that a few random images lack."""
    lines = error.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match("note: no (training|validation)", line))


def test_training_steps_compared_with_a_plain_loops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    flags = ["--models", "baseline", "se", "--batch-sizes", "16", "--repeats", "2"]
    assert small(tmp_path, "--train", *flags) == 0
    rows = rows_of(tmp_path, "benchmark_train")
    modes = [("plain loop", "default"), ("plain loop, resident data", "default")]
    modes += [("eager", "fp32"), ("compile", "fp32")]
    expected = [(model, *each) for model in ("baseline", "se") for each in modes]
    assert [(row["model"], row["mode"], row["precision"]) for row in rows] == expected
    for row in rows:
        assert (row["width"], row["batch_size"], row["turns"], row["steps"]) == (4, 16, 2, 3)
        assert row["images_per_second"] == pytest.approx(16e3 / row["ms_per_step"])
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert "kit/fast.py" in row["sha256"] and row["device"].startswith("CPU ")
        if row["mode"] == "plain loop":
            assert row["ratio_low"] == row["ratio_high"] == 1
    printed = capsys.readouterr()
    assert without_classes(printed.err) == ""
    assert (tmp_path / "benchmark_train.md").read_text() in printed.out
    assert unaligned(printed.out).count("| `se` | 16 |") == 4
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"benchmark_train.json", "benchmark_train.md"}


def test_training_steps_are_written_after_every_turn(tmp_path, monkeypatch):
    """And each turn begins with untimed steps."""
    taken = []

    def plain_turn(*_):
        def turn(steps):
            taken.append(steps)
            if len(taken) == 6:  # in the second turn: there are two loops
                raise KeyboardInterrupt

        return turn

    monkeypatch.setattr(training_speed, "plain_turn", plain_turn)
    flags = ["--models", "baseline", "--modes", "eager", "--repeats", "7"]
    assert small(tmp_path, "--train", *flags) == 130
    rows = rows_of(tmp_path, "benchmark_train")
    assert [row["turns"] for row in rows] == [1, 1, 1] and taken == [1, 3] * 3


@pytest.mark.slow
def test_a_slower_step_has_a_lower_ratio(tmp_path, monkeypatch):
    def slow(forward, **options):
        def slower(*batch):
            time.sleep(0.5)
            return forward(*batch)

        return slower

    monkeypatch.setattr(torch, "compile", slow)
    flags = ["--models", "baseline", "--batch-sizes", "4", "--repeats", "3"]
    assert small(tmp_path, "--train", *flags) == 0
    _, _, eager, slower = rows_of(tmp_path, "benchmark_train")
    assert slower["ms_per_step"] > 500 and slower["ratio"] < eager["ratio"]


def test_a_mode_that_falls_back_keeps_its_row_with_the_reason(tmp_path, monkeypatch, capsys):
    def failing(forward, **options):
        raise NotImplementedError("no such compiler")

    monkeypatch.setattr(torch, "compile", failing)
    assert small(tmp_path, "--train", "--models", "baseline", "--batch-sizes", "4") == 0
    rows = rows_of(tmp_path, "benchmark_train")
    assert [row["mode"] for row in rows[2:]] == ["eager", "compile"] and "fallback" not in rows[2]
    assert rows[3]["ran_in"] == "eager" and "no such compiler" in rows[3]["fallback"]
    text = (tmp_path / "benchmark_train.md").read_text()
    assert (
        "| compile (ran in eager) |" in unaligned(text) and "mode compile failed (NotImpl" in text
    )
    error = without_classes(capsys.readouterr().err)
    assert is_one_line(error) and "no such compiler" in error


@pytest.mark.parametrize(
    "flags",
    [
        ["--train", "--keep"],
        ["--train", "--image", "3x32x32"],
        ["--train", "--precisions", "default"],
        ["--batch-sizes", "0"],
        ["--batch-sizes", "64", "-1"],
        ["--batch-sizes", "1000000000000000000000"],
        ["--repeats", "x"],
        ["--repeats", "0"],
        ["--models", "vgg"],
        ["--modes", "graph"],
        ["--precisions", "tf32"],
        ["--precisions", "default"],
        ["--like", "runs/any", "--width", "8"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)


def test_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert small(tmp_path / "file", "--modes", "eager") == 1
    assert is_one_line(capsys.readouterr().err)
