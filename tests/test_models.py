import re
import runpy

from models import MODELS, POSITIONS, SE, build_model, count_parameters

import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import REPO

COUNTS = {
    "baseline": 11_172_810,
    "se": 11_261_890,
    "cbam_blocks": 11_262_690,
    "cbam_classifier": 11_206_222,
    "cbam_prepool": 11_206_222,
    "eca": 11_172_846,
    "ge": 11_236_170,
    "gc": 11_264_058,
    "bam": 11_195_801,
    "simam": 11_172_810,
    "coord": 11_247_546,
    "triplet": 11_175_210,
    "sk": 16_080_074,
    "bot": 8_034_762,
    "se_static": 11_261_890,
    "cbam_blocks_static": 11_262_690,
}
REPLACED = {"sk": r"layer\d.\d.(conv1|bn1)", "bot": r"layer4.\d.conv2"}  # of the backbone


def torchvision_resnet18():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def test_published_models_come_first_in_table_order():
    assert list(MODELS)[:4] == ["baseline", "se", "cbam_blocks", "cbam_classifier"]


@pytest.mark.parametrize("name", COUNTS)
def test_exact_parameter_counts(name):
    assert count_parameters(build_model(name)) == COUNTS[name]


def test_baseline_equals_torchvision_bit_for_bit():
    theirs, ours = torchvision_resnet18(), build_model("baseline")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(8, 1, 28, 28)
    outputs = []
    for model in (theirs, ours):  # training mode: BatchNorm's batch statistics take part
        logits = model(images)
        logits.square().sum().backward()
        outputs.append(logits)
    assert torch.equal(*outputs)
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize("name", MODELS)
def test_backbone_has_torchvision_s_keys_and_shapes(name):
    ours = build_model(name).state_dict()
    theirs = {key: value.shape for key, value in torchvision_resnet18().state_dict().items()}
    replaced = REPLACED.get(name, "nothing")
    theirs = {key: shape for key, shape in theirs.items() if not re.match(replaced, key)}
    backbone = {key: value.shape for key, value in ours.items() if "attention" not in key}
    backbone = {key: shape for key, shape in backbone.items() if not re.match(replaced, key)}
    assert backbone == theirs
    prefixes = {"blocks": "layer3.1.attention.", "stages": "layer3.2.attention."}
    prefixes |= {"prepool": "layer4.2.attention.", "classifier": "attention."}
    prefix = prefixes.get(MODELS[name][1])
    assert prefix is None or any(key.startswith(prefix) for key in ours)


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_one_backbone(name):
    baseline = build_model("baseline", seed=5, width=8).state_dict()
    model = build_model(name, seed=5, width=8).state_dict()
    again = build_model(name, seed=5, width=8).state_dict()
    other = build_model(name, seed=6, width=8).state_dict()
    if name == "sk":  # its 3x3 branch is the convolution that was there
        renamed = {f"{c}1": f"conv1.{c}3" for c in ("conv", "bn")}
        baseline = {
            re.sub(r"(?<=\.\d\.)(conv1|bn1)", lambda m: renamed[m[0]], key): value
            for key, value in baseline.items()
        }
    for key, value in baseline.items():
        if not re.match(REPLACED.get(name, "nothing"), key) or key in model:
            assert torch.equal(model[key], value), key
    assert all(torch.equal(model[key], value) for key, value in again.items())
    assert not torch.equal(model["layer3.1.conv2.weight"], other["layer3.1.conv2.weight"])


def test_a_seed_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_model("se", seed=9, width=8)
    assert torch.equal(torch.rand(3), expected)


def test_first_weights_are_torchvision_s_distribution():
    theirs, ours = torchvision_resnet18().state_dict(), build_model("baseline", seed=0).state_dict()
    for key in theirs:
        if "conv" in key or "downsample.0" in key or "fc" in key:
            n = theirs[key].numel()
            tolerance = 6 / n**0.5  # six standard errors of a standard deviation, at least
            assert ours[key].std().item() == pytest.approx(theirs[key].std().item(), rel=tolerance)
        else:
            assert torch.equal(ours[key], theirs[key]), key


# A bias in front of a softmax or of BatchNorm's mean changes nothing: its gradient is 0, and what
# rounding leaves of that differs from CPU to CPU.
WITHOUT_EFFECT = {
    "gc": ("mask.bias",),
    "coord": (".conv.bias",),
    "bam": ("channel.0.bias", *(f"spatial.{i}.bias" for i in range(3))),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = build_model(name, seed=0).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    for parameter in model.parameters():
        if not parameter.any():  # what starts at 0 may stop the gradients behind it
            nn.init.normal_(parameter)
    model(torch.randn(8, 1, 28, 28).double()).square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for key, parameter in model.named_parameters():
        if key.endswith(WITHOUT_EFFECT.get(name, ())):
            assert parameter.grad.abs().max() < 1e-9 * largest, key
        else:
            assert parameter.grad.abs().max() > 1e-9 * largest, key
    if name == "cbam_classifier":  # as published: on a 1x1 map the kernel's middle is all there is
        assert (model.attention.spatial.conv.weight.grad != 0).sum() == 2


@pytest.mark.parametrize("name", MODELS)
def test_other_sizes_channels_and_classes(name):
    model = build_model(name, num_classes=7, in_channels=3, width=8).eval()
    assert model(torch.randn(1, 3, 33, 20)).shape == (1, 7)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["se", "gc", "simam"])
def test_any_gate_goes_anywhere(name, position):
    model = build_model(name, position=position, width=8).eval()
    module, _ = MODELS[name]
    counts = {"blocks": 8, "before_bn2": 8, "stages": 3}
    assert sum(isinstance(m, module) for m in model.modules()) == counts.get(position, 1)
    assert model(torch.randn(2, 1, 28, 28)).isfinite().all()


def test_position_and_reduction_are_set():
    first, second = build_model("se", reduction=8), build_model("se", position="classifier")
    assert first.layer1[0].attention.fc1.out_features == 8
    assert count_parameters(second) == COUNTS["baseline"] + 2 * 512 * 32 + 32 + 512
    for ours, same in (
        (build_model("cbam_blocks", position="classifier"), "cbam_classifier"),
        (build_model("cbam_classifier", position="prepool"), "cbam_prepool"),
        (build_model("se", position="blocks", reduction=16), "se"),
    ):
        assert ours.state_dict().keys() == build_model(same).state_dict().keys()
        assert count_parameters(ours) == COUNTS[same]


@pytest.mark.parametrize(
    ("name", "choice", "words"),
    [
        ("se", dict(position="block"), "model se .* 'block'"),
        ("se", dict(position="replace_conv1"), "model se .* 'replace_conv1'"),
        ("sk", dict(position="blocks"), "sk has no attention that can be placed"),
        ("bot", dict(position="blocks"), "bot has no attention that can be placed"),
        ("baseline", dict(position="blocks"), "baseline has no attention"),
        ("baseline", dict(reduction=8), "baseline has no reduction"),
        ("eca", dict(reduction=8), "eca has no reduction"),
        ("mine", {}, r"'nowhere'"),
    ],
)
def test_what_cannot_be_built_is_said(monkeypatch, name, choice, words):
    monkeypatch.setitem(MODELS, "mine", (SE, "nowhere"))
    with pytest.raises(ValueError, match=words):
        build_model(name, width=4, **choice)


def test_a_module_at_another_position_too_keeps_its_own_model(tmp_path):
    """models.py with a class, its line in ATTENTION, and an entry of its own in MODELS."""
    text = (REPO / "models.py").read_text()
    text = text.replace("ATTENTION = {\n", 'ATTENTION = {\n    "mine": type("Mine", (SE,), {}),\n')
    entry = '    "mine_prepool": (ATTENTION["mine"], "prepool"),\n'
    (tmp_path / "edited.py").write_text(text.replace("MODELS = {\n", f"MODELS = {{\n{entry}"))
    edited = runpy.run_path(str(tmp_path / "edited.py"))["MODELS"]
    assert list(edited) == ["mine_prepool", *MODELS, "mine"]
    assert edited["mine"] == (edited["mine_prepool"][0], "blocks")


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"'resnet'.*baseline, se"):
        build_model("resnet")
