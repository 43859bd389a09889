import copy
import json
import time

import pytest
import thop
import torch
from conftest import is_one_line

import benchmark
from models import MODELS, build_model

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
    model = build_model(name)
    flops, flops_aten = benchmark.count_flops(model)
    assert (round(flops / 1e9, 2), flops_aten) == PUBLISHED_FLOPS[name]
    assert flops_aten == convolution_flops(model.eval())


def test_thop_profiles_a_copy(monkeypatch):
    profiled = []
    original = thop.profile

    def spy(model, *args, **options):
        profiled.append(model)
        return original(model, *args, **options)

    monkeypatch.setattr(benchmark.thop, "profile", spy)
    model = build_model("cbam_blocks", width=8)
    before = copy.deepcopy(model.state_dict())
    benchmark.count_flops(model)
    assert profiled and all(other is not model for other in profiled)
    assert "total_ops" in profiled[0].state_dict()  # what thop leaves behind ...
    assert model.state_dict().keys() == before.keys()  # ... is not left in ours
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_benchmark_json_has_a_row_a_model(tmp_path, capsys):
    flags = ["--width", "8", "--batch-size", "4", "--repeats", "5", "--device", "cpu"]
    assert benchmark.main([*flags, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["model"] for row in rows] == list(MODELS)
    for row in rows:
        assert set(row) >= {
            "model", "params", "flops", "flops_aten", "batch_size", "precision", "mode",
            "ms_per_image", "ms_per_image_p10", "ms_per_image_p90", "images_per_second",
            "peak_memory_mb", "device",
        }  # fmt: skip
        assert 0 < row["ms_per_image_p10"] <= row["ms_per_image"] <= row["ms_per_image_p90"]
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms_per_image"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in MODELS)

    # --keep measures only what is not there yet under the same settings
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "benchmark.json").read_text()) == rows
    (tmp_path / "benchmark.json").write_text(json.dumps(rows[1:]))
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "benchmark.json").read_text())
    assert kept[1:] == rows[1:] and kept[0]["ms_per_image"] != rows[0]["ms_per_image"]
    edited = kept[1] | {"models_sha256": "of models.py before an edit"}
    (tmp_path / "benchmark.json").write_text(json.dumps([kept[0], edited, *kept[2:]]))
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "benchmark.json").read_text())
    assert again[0] == kept[0] and again[1]["models_sha256"] == kept[1]["models_sha256"]
    flags[1] = "4"
    assert benchmark.main([*flags, "--keep", "--out", str(tmp_path)]) == 0
    assert {row["width"] for row in json.loads((tmp_path / "benchmark.json").read_text())} == {4}


def test_timing_waits_for_the_work():
    class Sleeper(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    assert benchmark.seconds_per_batch(Sleeper(), torch.zeros(1)) >= 0.02


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--repeats", "x"], ["--models", "vgg"]])
def test_wrong_usage_is_one_line_and_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags)
    assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)


def test_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--width", "4", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    out = str(tmp_path / "file")
    assert benchmark.main([*flags, "--models", "baseline", "--out", out]) == 1
    assert is_one_line(capsys.readouterr().err)
