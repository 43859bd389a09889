"""SE, CBAM and their ResNet-18 backbone, written from scratch, and the table of models.

    python models.py                    # every model with its parameter count

The backbone is torchvision's ResNet-18 adapted to small images (He, Zhang, Ren, Sun, CVPR 2016,
arXiv 1512.03385): `conv1` is 3x3 with stride 1, and there is no max-pooling, so on 28x28 images the
stages work at 28x28, 14x14, 7x7 and 4x4. `state_dict` keys are torchvision's: weights can be loaded
from a torchvision model adapted in the same way, and back.

To add a module: write a class `Module(channels)` that keeps the input shape (N, C, H, W), and add a
line to ATTENTION. This makes a model with the module in every block; a line in MODELS puts it
elsewhere. The other modules of ATTENTION are in kit/attention.py.
"""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from kit.attention import BAM, ECA, GC, GE, MHSA, Coordinate, SelectiveKernel, SimAM, Triplet
from kit.command_line import exit_code, make_parser

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Attention ------------------------------------------------------------------------------------


class SE(nn.Module):
    """Squeeze-and-Excitation (Hu, Shen, Sun, CVPR 2018, arXiv 1709.01507).

    s = sigmoid(W2 relu(W1 z + b1) + b2), z = mean of x over H and W (eq. 2, 3); x' = s x (eq. 4).
    (N, C, H, W) -> (N, C, H, W); one gate per image and channel. The hidden width is C / reduction,
    with biases, as in the authors' Caffe models; timm rounds the width to a multiple of 8.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def squeeze(self, x):
        return x.mean((2, 3))  # (N, C)

    def forward(self, x):
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(self.squeeze(x)))))  # (N, C)
        return x * gate[:, :, None, None]


class ChannelGate(nn.Module):
    """CBAM's channel attention: sigmoid(MLP(avg over H, W) + MLP(max over H, W)), eq. 2."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def squeeze(self, x):
        return x.mean((2, 3)), x.amax((2, 3))  # (N, C) both

    def forward(self, x):
        average, maximum = self.squeeze(x)
        gate = torch.sigmoid(self.mlp(average) + self.mlp(maximum))  # (N, C)
        return x * gate[:, :, None, None]


class SpatialGate(nn.Module):
    """CBAM's spatial attention: sigmoid(BN(conv7x7([max over C, mean over C]))), eq. 3.

    As in the authors' code: max comes first, the convolution has no bias, and the BatchNorm (not in
    the paper's formula) has momentum 0.01 and initial weight 0, so the gate starts at 0.5.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        nn.init.zeros_(self.bn.weight)

    def squeeze(self, x):
        return torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)  # (N, 2, H, W)

    def forward(self, x):
        gate = torch.sigmoid(self.bn(self.conv(self.squeeze(x))))  # (N, 1, H, W)
        return x * gate


class CBAM(nn.Module):
    """Convolutional Block Attention Module (Woo, Park, Lee, Kweon, ECCV 2018, arXiv 1807.06521).

    The channel gate, then the spatial gate (eq. 1). (N, C, H, W) -> (N, C, H, W). The MLP has
    biases, as in the authors' code. timm has none, mean before max, and a BatchNorm weight of 1.
    """

    channel_gate, spatial_gate = ChannelGate, SpatialGate

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.channel = self.channel_gate(channels, reduction)
        self.spatial = self.spatial_gate()

    def forward(self, x):
        return self.spatial(self.channel(x))


# --- Controls: gates with a constant input of 1 ---------------------------------------------------


class StaticSE(SE):
    """A control: SE with input-independent gates, z = 1.

    The same parameters, FLOPs and operations (the mean is computed and multiplied by 0), but the
    gate is a learned constant per channel. SE's gain over it is due to attention; a gain of both
    over the baseline is not.
    """

    def squeeze(self, x):
        return 1 + 0 * super().squeeze(x)  # (N, C)


class StaticChannelGate(ChannelGate):
    def squeeze(self, x):
        return [1 + 0 * pooled for pooled in super().squeeze(x)]


class StaticSpatialGate(SpatialGate):
    def squeeze(self, x):
        return 1 + 0 * super().squeeze(x)


class StaticCBAM(CBAM):
    """A control: CBAM with input-independent gates (see StaticSE).

    One learned constant per channel, and one per position, which depends only on the distance to
    the border (through the convolution's padding).
    """

    channel_gate, spatial_gate = StaticChannelGate, StaticSpatialGate


# name: channels -> module, (N, C, H, W) -> (N, C, H, W)
ATTENTION = {
    "se": SE,
    "cbam": CBAM,
    "eca": ECA,
    "ge": GE,
    "gc": GC,
    "bam": BAM,
    "simam": SimAM,
    "coord": Coordinate,
    "triplet": Triplet,
    "mhsa": MHSA,
    "se_static": StaticSE,
    "cbam_static": StaticCBAM,
}


# --- ResNet-18 ------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """relu(attention(BN(conv(relu(BN(conv(x)))))) + shortcut(x)), both convolutions 3x3."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention_before_bn2 = nn.Identity()
        self.attention = nn.Identity()
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.attention_before_bn2(self.conv2(out)))
        out = self.attention(out)
        return F.relu(out + self.downsample(x))


class ResNet18(nn.Module):
    """Four stages of two blocks; `width` channels in the first, doubled in each later one."""

    def __init__(self, num_classes: int, in_channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, stride=1)
        self.layer2 = self.stage(width, 2 * width, stride=2)
        self.layer3 = self.stage(2 * width, 4 * width, stride=2)
        self.layer4 = self.stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.attention = nn.Identity()
        self.fc = nn.Linear(8 * width, num_classes)
        # Kaiming fan-out as in torchvision, except for the stem, which keeps PyTorch's default, as
        # if swapped into torchvision's model. With fan-out its outputs are tiny relative to
        # BatchNorm's initial running variance of 1: 16% instead of 72% validation accuracy after 30
        # steps.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, stride=1)
        )

    @property
    def blocks(self) -> list[BasicBlock]:
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward(self, x):  # (N, in_channels, 28, 28)
        x = F.relu(self.bn1(self.conv1(x)))  # (N, width, 28, 28)
        x = self.layer1(x)  # (N, width, 28, 28)
        x = self.layer2(x)  # (N, 2 width, 14, 14)
        x = self.layer3(x)  # (N, 4 width, 7, 7)
        x = self.layer4(x)  # (N, 8 width, 4, 4)
        x = self.attention(self.avgpool(x))  # (N, 8 width, 1, 1)
        return self.fc(x.flatten(1))  # (N, num_classes)


# --- Models: which module, and where --------------------------------------------------------------


POSITIONS = (
    "blocks",  # in every block, after bn2 and before the shortcut is added
    "before_bn2",  # in every block, between conv2 and bn2
    "stages",  # after each of the first three stages
    "prepool",  # once, on the last 4x4 map
    # Once, after global pooling, as published. On this 1x1 map the mean is the max: CBAM's two
    # pooled descriptors coincide, and only the centre taps of its 7x7 kernel are ever used.
    "classifier",
)


def insert(model: ResNet18, position: str, module: Callable) -> None:
    """Inserts a module at one of POSITIONS, or replaces a convolution."""
    if position == "blocks":
        for block in model.blocks:
            block.attention = module(block.conv2.out_channels)
    elif position == "before_bn2":
        for block in model.blocks:
            block.attention_before_bn2 = module(block.conv2.out_channels)
    elif position == "stages":
        for stage in (model.layer1, model.layer2, model.layer3):
            append_to_stage(stage, module)
    elif position == "prepool":
        append_to_stage(model.layer4, module)
    elif position == "classifier":
        model.attention = module(model.fc.in_features)
    elif position == "replace_conv2":  # in both blocks of the last stage
        for block in model.layer4:
            block.conv2 = module(block.conv2.out_channels)
    elif position == "replace_conv1":  # and its BatchNorm, in every block
        for block in model.blocks:
            block.conv1, block.bn1 = module(block.conv1, block.bn1), nn.Identity()
    else:
        raise ValueError(f"no position {position!r}: choose from {', '.join(POSITIONS)}")


def append_to_stage(stage: nn.Sequential, module: Callable) -> None:
    attention = module(stage[-1].conv2.out_channels)
    stage.append(nn.Sequential(OrderedDict(attention=attention)))  # keys: layerS.2.attention.*


# name: (module, position)
MODELS = {
    "baseline": (None, None),
    "se": (SE, "blocks"),
    "cbam_blocks": (CBAM, "blocks"),
    "cbam_classifier": (CBAM, "classifier"),
    "cbam_prepool": (CBAM, "prepool"),  # as many parameters as cbam_classifier, on a 4x4 map
    "eca": (ECA, "blocks"),
    "ge": (GE, "blocks"),
    "gc": (GC, "blocks"),
    "bam": (BAM, "stages"),  # where its authors put it
    "simam": (SimAM, "before_bn2"),  # likewise
    "coord": (Coordinate, "blocks"),
    "triplet": (Triplet, "blocks"),
    "sk": (SelectiveKernel, "replace_conv1"),
    "bot": (MHSA, "replace_conv2"),
    "se_static": (StaticSE, "blocks"),
    "cbam_blocks_static": (StaticCBAM, "blocks"),
}
# A new module gets a model of its own name, in every block.
in_blocks = {m for m, position in MODELS.values() if position in ("blocks", "replace_conv2")}
for name, module in ATTENTION.items():
    if module not in in_blocks:
        MODELS.setdefault(name, (module, "blocks"))


def build_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    width: int = 64,
    seed: int | None = None,
    position: str | None = None,
    reduction: int | None = None,
) -> nn.Module:
    """The model `name` of MODELS: images (N, in_channels, H, W) -> logits (N, num_classes).

    With one `seed` every model starts from the same backbone weights: attention is added after
    they are drawn. A seed leaves the global random state unchanged; without one the weights come
    from it. `position` (of POSITIONS) and `reduction` override those of the model's attention.
    Raises ValueError for unknown names and for options that the model lacks.
    """
    module, position = find_module(name, position, reduction)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # Only the CPU's generator: torch.manual_seed would reseed the GPUs too.
            torch.default_generator.manual_seed(seed)
        model = ResNet18(num_classes, in_channels, width)
        if module:
            insert(model, position, module)
    return model


def find_module(name: str, position: str | None, reduction: int | None) -> tuple:
    """(module, position) for build_model. Raises ValueError."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    module, own_position = MODELS[name]
    if position and not (own_position in POSITIONS and position in POSITIONS):
        raise ValueError(f"model {name} has no attention that can be placed at {position!r}")
    if reduction:
        if not module or "reduction" not in inspect.signature(module).parameters:
            raise ValueError(f"model {name} has no reduction to set")
        module = partial(module, reduction=reduction)
    return module, position or own_position


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@exit_code
def main(argv: list[str] | None = None) -> None:
    """Runs the script with `argv` as its command line."""
    make_parser(__doc__).parse_args(argv)
    for name in MODELS:
        print(f"{name:18s} {count_parameters(build_model(name)):>12,}")


if __name__ == "__main__":
    sys.exit(main())
