"""Each module against its paper's formula, written out slowly, and against timm where it agrees."""

import math

from kit.attention import ECA, GC, GE, MHSA, SelectiveKernel
from models import ATTENTION, CBAM, SE, build_model, count_parameters

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# --- The formulas, for one image (C, H, W), in evaluation mode ------------------------------------


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def relu(z):
    return np.maximum(z, 0)


def weights(layer):
    bias = np.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias


def dense(layer, values):
    """A linear layer or a 1x1 convolution of a 1x1 map."""
    weight, bias = weights(layer)
    return weight.reshape(len(weight), -1) @ values + bias


def convolve(layer, image):
    """A convolution, product by product."""
    weight, bias = weights(layer)
    stride, dilation, groups = layer.stride[0], layer.dilation[0], layer.groups
    k = weight.shape[2]
    pad = dilation * (k - 1) // 2
    of_group, from_group = len(weight) // groups, weight.shape[1]
    height = (image.shape[1] - 1) // stride + 1
    width = (image.shape[2] - 1) // stride + 1
    out = np.zeros((len(weight), height, width))
    for o, y, x in np.ndindex(out.shape):
        out[o, y, x] = bias[o]
        for i, dy, dx in np.ndindex(from_group, k, k):
            row, column = y * stride + dy * dilation - pad, x * stride + dx * dilation - pad
            if layer.padding == (0, 0):  # 1x1
                row, column = y * stride, x * stride
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                out[o, y, x] += (
                    weight[o, i, dy, dx] * image[o // of_group * from_group + i][row, column]
                )
    return out


def normalized(bn, image):
    """BatchNorm with running statistics; image (C, ...)."""
    mean, variance, scale, shift = (
        t.detach().numpy().reshape(-1, *[1] * (image.ndim - 1))
        for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (image - mean) / np.sqrt(variance + bn.eps) * scale + shift


def slow_se(module, image):
    gates = sigmoid(dense(module.fc2, relu(dense(module.fc1, image.mean((1, 2))))))
    return np.array([gate * channel for gate, channel in zip(gates, image)])


def slow_eca(module, image):
    means, kernel = image.mean((1, 2)), module.conv.weight.detach().numpy()[0, 0]
    out = np.zeros_like(image)
    for c in range(len(image)):
        z = 0
        for i, w in enumerate(kernel):
            neighbour = c + i - len(kernel) // 2
            z += w * means[neighbour] if 0 <= neighbour < len(means) else 0
        out[c] = sigmoid(z) * image[c]
    return out


def slow_gc(module, image):
    scores = np.exp(convolve(module.mask, image)[0])
    context = np.array([(channel * scores).sum() / scores.sum() for channel in image])
    hidden = dense(module.fc1, context)
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + module.norm.eps)
    scale, shift = weights(module.norm)
    added = dense(module.fc2, relu(hidden * scale + shift))
    return np.array([channel + number for channel, number in zip(image, added)])


def slow_spatial_gate(module, image):
    pooled = np.stack([image.max(0), image.mean(0)])
    return image * sigmoid(normalized(module.bn, convolve(module.conv, pooled)))


def slow_cbam(module, image):
    first, _, second = module.channel.mlp
    z = sum(dense(second, relu(dense(first, p((1, 2))))) for p in (image.mean, image.max))
    image = np.array([gate * channel for gate, channel in zip(sigmoid(z), image)])
    return slow_spatial_gate(module.spatial, image)


def slow_triplet(module, image):
    by_position = slow_spatial_gate(module.height_width, image)
    by_column = slow_spatial_gate(module.channel_width, image.transpose(1, 0, 2))
    by_row = slow_spatial_gate(module.height_channel, image.transpose(2, 1, 0))
    return (by_position + by_column.transpose(1, 0, 2) + by_row.transpose(2, 1, 0)) / 3


def slow_bam(module, image):
    first, second = module.channel
    hidden = normalized(module.channel_bns[0], dense(first, image.mean((1, 2))))
    channel = dense(second, relu(hidden))
    maps = image
    for conv, bn in zip(module.spatial[:3], module.spatial_bns):
        maps = relu(normalized(bn, convolve(conv, maps)))
    spatial = convolve(module.spatial[3], maps)[0]
    out = np.zeros_like(image)
    for c, y, x in np.ndindex(image.shape):
        out[c, y, x] = image[c, y, x] * (1 + sigmoid(channel[c] + spatial[y, x]))
    return out


def slow_coord(module, image):
    def hidden(values):  # (C, length)
        z = normalized(module.bn, np.array([dense(module.conv, v) for v in values.T]).T)
        return z * np.clip(z + 3, 0, 6) / 6

    rows, columns = hidden(image.mean(2)), hidden(image.mean(1))
    out = np.zeros_like(image)
    for c, y, x in np.ndindex(image.shape):
        row_gate = sigmoid(dense(module.conv_rows, rows[:, y])[c])
        out[c, y, x] = image[c, y, x] * row_gate
        out[c, y, x] *= sigmoid(dense(module.conv_columns, columns[:, x])[c])
    return out


def slow_ge(module, image):
    context = image
    for i, (conv, bn) in enumerate(zip(module.convs, module.bns)):
        context = normalized(bn, convolve(conv, relu(context) if i else context))
    out = np.zeros_like(image)
    for c, y, x in np.ndindex(image.shape):
        row = y * context.shape[1] // image.shape[1]
        column = x * context.shape[2] // image.shape[2]
        out[c, y, x] = image[c, y, x] * sigmoid(context[c, row, column])
    return out


def slow_simam(module, image):
    out = np.zeros_like(image)
    for c, channel in enumerate(image):
        mean = channel.mean()
        variance = ((channel - mean) ** 2).sum() / max(1, channel.size - 1)
        energy = 4 * (variance + 1e-4) / ((channel - mean) ** 2 + 2 * variance + 2e-4)  # eq. 5
        out[c] = sigmoid(1 / energy) * channel
    return out


def slow_mhsa(module, image):
    channels, height, width = image.shape
    depth, reach = channels // module.heads, module.reach
    qkv = convolve(module.qkv, image).reshape(3, module.heads, depth, height, width)
    rows, columns = module.rows.detach().numpy(), module.columns.detach().numpy()
    out = np.zeros((module.heads, depth, height, width))
    for head, y, x in np.ndindex(module.heads, height, width):
        q = qkv[0, head, :, y, x]
        scores = np.zeros((height, width))
        for i, j in np.ndindex(height, width):
            dy, dx = np.clip([i - y, j - x], -reach, reach)
            key = qkv[1, head, :, i, j] + rows[dy + reach] + columns[dx + reach]
            scores[i, j] = q @ key / math.sqrt(depth)
        share = np.exp(scores) / np.exp(scores).sum()
        out[head, :, y, x] = (qkv[2, head] * share).sum((1, 2))
    return out.reshape(image.shape)


def slow_selective_kernel(module, image):
    small = relu(normalized(module.bn3, convolve(module.conv3, image)))
    large = relu(normalized(module.bn5, convolve(module.conv5, image)))
    hidden = relu(normalized(module.bn, dense(module.fc, (small + large).mean((1, 2)))))
    a, b = np.split(np.exp(dense(module.select, hidden)), 2)
    return np.array([(a[c] * small[c] + b[c] * large[c]) / (a[c] + b[c]) for c in range(len(a))])


SLOW = {
    "se": slow_se,
    "cbam": slow_cbam,
    "eca": slow_eca,
    "ge": slow_ge,
    "gc": slow_gc,
    "bam": slow_bam,
    "simam": slow_simam,
    "coord": slow_coord,
    "triplet": slow_triplet,
    "mhsa": slow_mhsa,
}
FURTHER = {  # other than by default
    "se, reduction 4": (lambda channels: SE(channels, reduction=4), slow_se),
    "mhsa, reach 2": (lambda channels: MHSA(channels, reach=2), slow_mhsa),
    "ge, extent 2": (lambda channels: GE(channels, extent=2), slow_ge),
}
CASES = {name: (ATTENTION[name], slow) for name, slow in SLOW.items()} | FURTHER


def sk(channels, stride=1):
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
    return SelectiveKernel(conv, nn.BatchNorm2d(channels))


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


def assert_as_slow(module, slow, *size):
    images = torch.randn(2, *size, dtype=torch.float64)
    expected = torch.tensor(np.stack([slow(module, image.numpy()) for image in images]))
    torch.testing.assert_close(module(images), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(5, 6), (1, 1)])
def test_modules_equal_a_slow_reference(case, size):
    make, slow = CASES[case]
    assert_as_slow(opened(make(8)), slow, 8, *size)


@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernel_equals_a_slow_reference(stride):
    assert_as_slow(opened(sk(6, stride)), slow_selective_kernel, 6, 5, 6)


@pytest.mark.parametrize("name", [*ATTENTION, "sk"])
def test_gradients_of_modules_in_float64(name):
    module = opened(ATTENTION[name](4) if name != "sk" else sk(4))
    images = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in module.named_parameters()]

    def function(images, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (images,))

    assert torch.autograd.gradcheck(function, (images, *module.parameters()), fast_mode=True)


# --- Against timm, with the same weights ----------------------------------------------------------


def with_weights_of(ours, theirs):
    """`theirs` with the parameters and buffers of `ours`, which come in the same order."""
    theirs = theirs.double().eval()
    values = [v for v in ours.state_dict().values() if v.is_floating_point()]
    keys = [k for k, v in theirs.state_dict().items() if v.is_floating_point()]
    shapes = theirs.state_dict()
    state = {key: value.reshape(shapes[key].shape) for key, value in zip(keys, values, strict=True)}
    theirs.load_state_dict(state, strict=False)
    return theirs


def assert_as_timm(ours, theirs, size=(16, 7, 9), **tolerance):
    ours = opened(ours)
    theirs = with_weights_of(ours, theirs)
    images = torch.randn(3, *size, dtype=torch.float64, requires_grad=True)
    outputs = [module(images) for module in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, images, direction)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_modules_equal_timm_s():
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    assert_as_timm(SE(16), layers.SEModule(16, rd_channels=1))
    assert_as_timm(ECA(16), layers.EcaModule(16))
    assert_as_timm(ECA(128), layers.EcaModule(128), (128, 2, 2))
    context = layers.GlobalContext(16, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
    assert_as_timm(GC(16), context)


def test_gather_excite_equals_timm_s():
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    try:
        theirs = layers.GatherExcite(16, extra_params=True, extent=8, use_mlp=False)
    except TypeError:
        pytest.skip("this timm cannot build GatherExcite")
    ours = opened(GE(16))
    state = {
        f"gather.{kind}{i + 1}.{key}": value
        for kind, part in (("conv", ours.convs), ("norm", ours.bns))
        for i, module in enumerate(part)
        for key, value in module.state_dict().items()
    }
    theirs.double().eval().load_state_dict(state)
    images = torch.randn(3, 16, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-12)


def test_self_attention_equals_timm_s():
    bottleneck_attn = pytest.importorskip("timm.layers.bottleneck_attn", reason="needs timm")
    theirs = bottleneck_attn.BottleneckAttn(
        16, feat_size=(4, 4), num_heads=4, qk_ratio=1.0, scale_pos_embed=True
    )
    ours = opened(MHSA(16, reach=3))
    state = {
        "qkv.weight": ours.qkv.weight,
        "pos_embed.height_rel": ours.rows,
        "pos_embed.width_rel": ours.columns,
    }
    theirs.double().eval().load_state_dict(state)
    images = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-12)


def test_selective_kernel_equals_timm_s():
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    ours = opened(sk(64))
    theirs = layers.SelectiveKernel(64, split_input=False, rd_channels=32)
    state = {
        "paths.0.conv.weight": ours.conv3.weight,
        "paths.1.conv.weight": ours.conv5.weight,
        "attn.fc_reduce.weight": ours.fc.weight,
        "attn.fc_select.weight": ours.select.weight,
    }
    for prefix, bn in (("paths.0.bn", ours.bn3), ("paths.1.bn", ours.bn5), ("attn.bn", ours.bn)):
        state |= {f"{prefix}.{key}": value for key, value in bn.state_dict().items()}
    theirs.double().eval().load_state_dict(state)
    images = torch.randn(2, 64, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-12)


# --- Every shape, number format and way to run ----------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (28, 28), (33, 17), (40, 40)])
def test_every_module_takes_every_map(name, size):
    images = torch.randn(2, 6, *size)  # fewer channels than the reduction
    module = ATTENTION[name](6)
    assert module(images).shape == images.shape  # in training
    module.eval()
    alone = module(images[:1])
    torch.testing.assert_close(alone, module(images)[:1], rtol=1e-4, atol=1e-5)
    last = module(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_modules_under_bf16_autocast(name):
    torch.manual_seed(0)
    module, images = ATTENTION[name](16), torch.randn(4, 16, 7, 7)
    expected = module.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(images)
    assert ((out - expected).norm() / expected.norm()).item() < 0.02
    module.train()
    with torch.autocast("cpu", torch.bfloat16):
        module(images.requires_grad_()).float().square().sum().backward()
    grads = {key: parameter.grad for key, parameter in module.named_parameters()}
    assert not [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()]


@pytest.mark.parametrize("name", [*ATTENTION, "sk"])
def test_modules_are_one_graph_without_breaks(name):
    """All that torch.compile needs; the compiler behind it is tried on whole models."""
    torch.compiler.reset()
    module = ATTENTION[name](8) if name != "sk" else sk(8)
    images = torch.randn(2, 8, 7, 7)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    module.eval()
    torch.testing.assert_close(compiled(images), module(images))


# --- What is special about some -------------------------------------------------------------------


@pytest.mark.parametrize(("model", "module"), [("se", "se"), ("cbam_blocks", "cbam")])
def test_a_control_has_the_same_parameters_and_cannot_see_the_image(model, module):
    real, static = (ATTENTION[name](32, reduction=2) for name in (module, f"{module}_static"))
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


def test_kernel_sizes_of_eca():
    sizes = {c: ECA(c).conv.kernel_size[0] for c in (1, 8, 16, 64, 128, 256, 512, 2048)}
    assert sizes == {1: 3, 8: 3, 16: 3, 64: 3, 128: 5, 256: 5, 512: 5, 2048: 7}


def test_gc_and_selective_kernel_start_as_if_they_were_not_there():
    images = torch.randn(2, 16, 5, 5)
    assert torch.equal(GC(16)(images), images)
    module = sk(16)
    nn.init.zeros_(module.select.weight)  # both branches alike
    expected = (
        F.relu(module.bn3(module.conv3(images))) + F.relu(module.bn5(module.conv5(images)))
    ) / 2
    torch.testing.assert_close(module(images), expected)


def test_simam_on_a_1x1_map_is_a_constant_gate():
    images = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(ATTENTION["simam"](4)(images), images * torch.tensor(0.5).sigmoid())
