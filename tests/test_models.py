import copy

import pytest
import torch
import torch.nn as nn
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from models import ATTENTION, CBAM, MODELS, SE, build_model, count_parameters

COUNTS = {
    "baseline": 11_172_810,
    "se": 11_261_890,
    "cbam_blocks": 11_262_690,
    "cbam_classifier": 11_206_222,
}


def torchvision_resnet18():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def test_published_models_come_first_in_table_order():
    assert list(MODELS)[:4] == list(COUNTS)


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
    backbone = {key: value.shape for key, value in ours.items() if "attention" not in key}
    assert backbone == theirs
    places = {"blocks": "layer3.1.attention.", "classifier": "attention.", None: "\0"}
    prefix = places[MODELS[name][1]]
    assert any(key.startswith(prefix) for key in ours) == (name != "baseline")


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_one_backbone(name):
    baseline = build_model("baseline", seed=5, width=8).state_dict()
    model = build_model(name, seed=5, width=8).state_dict()
    again = build_model(name, seed=5, width=8).state_dict()
    other = build_model(name, seed=6, width=8).state_dict()
    assert all(torch.equal(model[key], value) for key, value in baseline.items())
    assert all(torch.equal(model[key], value) for key, value in again.items())
    assert not torch.equal(model["layer4.1.conv2.weight"], other["layer4.1.conv2.weight"])


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


def slow_mlp(weights, values):
    """W2 relu(W1 v + b1) + b2, sum by sum."""
    (w1, b1), (w2, b2) = weights
    hidden = [max(0.0, sum(w * v for w, v in zip(row, values)) + b) for row, b in zip(w1, b1)]
    return [sum(w * h for w, h in zip(row, hidden)) + b for row, b in zip(w2, b2)]


def slow_sigmoid(v):
    return 1 / (1 + 2.718281828459045**-v)


def linear(layer):
    return layer.weight.tolist(), layer.bias.tolist()


def slow_se(module, image):
    """One image (C, H, W) as nested lists -> the same, after the paper's formula."""
    means = [sum(map(sum, channel)) / (len(channel) * len(channel[0])) for channel in image]
    gates = map(slow_sigmoid, slow_mlp((linear(module.fc1), linear(module.fc2)), means))
    return [[[s * v for v in row] for row in ch] for s, ch in zip(gates, image)]


def slow_cbam(module, image):
    height, width = len(image[0]), len(image[0][0])
    layers = linear(module.channel.mlp[0]), linear(module.channel.mlp[2])
    means = slow_mlp(layers, [sum(map(sum, channel)) / (height * width) for channel in image])
    maxima = slow_mlp(layers, [max(map(max, channel)) for channel in image])
    gates = [slow_sigmoid(a + b) for a, b in zip(means, maxima)]
    image = [[[s * v for v in row] for row in ch] for s, ch in zip(gates, image)]

    def pooled(kind, y, x):
        if not (0 <= y < height and 0 <= x < width):
            return 0.0
        values = [channel[y][x] for channel in image]
        return max(values) if kind == 0 else sum(values) / len(values)

    kernel, bn = module.spatial.conv.weight.tolist()[0], module.spatial.bn  # kernel: (2, 7, 7)
    out = [[[0.0] * width for _ in range(height)] for _ in image]
    for y in range(height):
        for x in range(width):
            z = sum(
                kernel[kind][dy][dx] * pooled(kind, y + dy - 3, x + dx - 3)
                for kind in range(2)
                for dy in range(7)
                for dx in range(7)
            )
            z = (z - bn.running_mean.item()) / (bn.running_var.item() + bn.eps) ** 0.5
            gate = slow_sigmoid(bn.weight.item() * z + bn.bias.item())
            for c in range(len(image)):
                out[c][y][x] = gate * image[c][y][x]
    return out


def opened(module):
    """The module in float64 and evaluation mode, no parameter at a special value."""
    torch.manual_seed(0)
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.3, 1.5)
    return module


@pytest.mark.parametrize(("module", "slow"), [(SE(8, reduction=4), slow_se), (CBAM(8), slow_cbam)])
def test_modules_equal_a_slow_reference(module, slow):
    module = opened(module)
    images = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    expected = torch.tensor([slow(module, image.tolist()) for image in images], dtype=torch.float64)
    torch.testing.assert_close(module(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_of_modules_in_float64(name):
    module = opened(ATTENTION[name](4))
    images = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in module.named_parameters()]

    def function(images, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (images,))

    assert torch.autograd.gradcheck(function, (images, *module.parameters()))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 12)])
def test_modules_keep_the_shape_even_with_fewer_channels_than_the_reduction(name, size):
    images = torch.randn(3, 6, *size)
    module = ATTENTION[name](6)
    assert module(images).shape == images.shape
    assert module.eval()(images[:1]).shape == (1, 6, *size)


@pytest.mark.parametrize(("model", "module"), [("se", "se"), ("cbam_blocks", "cbam")])
def test_a_control_has_the_same_parameters_and_cannot_see_the_image(model, module):
    real, static = ATTENTION[module](32), ATTENTION[f"{module}_static"](32)
    for parameter in static.parameters():
        nn.init.normal_(parameter)  # CBAM's spatial gate starts shut to everything
    real.load_state_dict(static.state_dict())  # the same parameters
    a, b = torch.rand(2, 3, 32, 9, 9) + 1
    torch.testing.assert_close(static(a) / a, (static(b) / b)[[2, 0, 1]])
    assert (real(a) / a - real(b) / b).abs().max() > 0.01
    flops = []
    for name in (model, f"{model}_static"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build_model(name).eval()(torch.zeros(1, 1, 28, 28))
        flops.append((counter.get_total_flops(), count_parameters(build_model(name))))
    assert flops[0] == flops[1]


def test_the_gates_of_a_control_are_those_of_an_image_of_ones():
    static, se = ATTENTION["se_static"](32), SE(32)
    se.load_state_dict(static.state_dict())
    images = torch.rand(3, 32, 5, 5) + 1
    torch.testing.assert_close(static(images), images * se(torch.ones_like(images)))


def test_cbam_s_spatial_gate_opens_at_one_half():
    module = CBAM(16)
    images = torch.randn(4, 16, 9, 9)
    assert torch.equal(module(images), module.channel(images) * 0.5)
    assert module.spatial.bn.momentum == 0.01


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = build_model(name, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # CBAM's spatial one starts at 0 and stops what is behind
    model(torch.randn(8, 1, 28, 28)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    if name == "cbam_classifier":  # as published: on a 1x1 map the kernel's middle is all there is
        assert (model.attention.spatial.conv.weight.grad != 0).sum() == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one_image_trains(name):
    model = build_model(name, width=8)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(1, 1, 28, 28)).sum().backward()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert "layer1.0.bn1.running_mean" in changed
    assert "attention.spatial.bn.running_mean" not in changed


@pytest.mark.parametrize("name", MODELS)
def test_other_sizes_channels_and_classes(name):
    model = build_model(name, num_classes=7, in_channels=3, width=8).eval()
    assert model(torch.randn(1, 3, 33, 20)).shape == (1, 7)


def test_unknown_place_is_named(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", ("se", "block"))
    with pytest.raises(ValueError, match=r"'mine'.*'block'"):
        build_model("mine", width=4)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"'resnet'.*baseline, se"):
        build_model("resnet")
