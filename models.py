"""The ResNet-18 that attention modules sit in, written out by hand, and the table of models.

    python models.py                    # every model with its parameter count

The backbone is torchvision's ResNet-18 adapted to small images (He, Zhang, Ren, Sun, CVPR 2016,
arXiv 1512.03385): `conv1` is 3x3 with stride 1, and there is no max-pooling, so the stages see 28,
14, 7 and 4 pixels of 28. Its `state_dict` has the same keys and shapes as torchvision's, so weights
load from one into the other.

To add a model: one line in MODELS, with a module of attention.py and its place.
"""

import argparse
import inspect
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import ATTENTION, SelectiveKernel


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
    """Four stages of two blocks; `width` channels in the first, doubled in each further one."""

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
        # As in torchvision. The stem keeps PyTorch's own start, as when it is swapped into
        # torchvision's model: scaled by fan-out, its outputs are so small beside BatchNorm's first
        # running variance of 1 that after 30 steps validation accuracy was 16 % instead of 72 %.
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


def in_blocks(model: ResNet18, module: Callable) -> None:
    for block in model.blocks:
        block.attention = module(block.conv2.out_channels)


def before_bn2(model: ResNet18, module: Callable) -> None:
    for block in model.blocks:
        block.attention_before_bn2 = module(block.conv2.out_channels)


def after_stages(model: ResNet18, module: Callable) -> None:
    for stage in (model.layer1, model.layer2, model.layer3):
        append_to_stage(stage, module)


def before_pooling(model: ResNet18, module: Callable) -> None:
    append_to_stage(model.layer4, module)


def append_to_stage(stage: nn.Sequential, module: Callable) -> None:
    attention = module(stage[-1].conv2.out_channels)
    stage.append(nn.Sequential(OrderedDict(attention=attention)))  # its keys: layerS.2.attention.*


def before_classifier(model: ResNet18, module: Callable) -> None:
    model.attention = module(model.fc.in_features)


def for_conv2_of_layer4(model: ResNet18, module: Callable) -> None:
    for block in model.layer4:
        block.conv2 = module(block.conv2.out_channels)


def for_conv1(model: ResNet18, module: Callable) -> None:
    for block in model.blocks:
        block.conv1, block.bn1 = module(block.conv1, block.bn1), nn.Identity()


PLACES = {
    "blocks": in_blocks,  # in every block, after bn2 and before the shortcut is added
    "before_bn2": before_bn2,  # in every block, between conv2 and bn2
    "stages": after_stages,  # after each of the first three stages
    "prepool": before_pooling,  # once, on the last 4x4 map
    # Once, after the global pooling, as published. On that 1x1 map the mean is the max: CBAM's two
    # pooled descriptors coincide, and only the middle taps of its 7x7 kernel are ever used.
    "classifier": before_classifier,
    "conv2_of_layer4": for_conv2_of_layer4,  # instead of the second convolution of its two blocks
    "conv1": for_conv1,  # instead of conv1 and bn1 in every block
}
REPLACING = ("conv2_of_layer4", "conv1")  # the places of modules that take over a convolution
MODULES = ATTENTION | {"sk": SelectiveKernel}  # which takes over a convolution and a BatchNorm

MODELS = {
    "baseline": (None, None),
    "se": ("se", "blocks"),
    "cbam_blocks": ("cbam", "blocks"),
    "cbam_classifier": ("cbam", "classifier"),
    "cbam_prepool": ("cbam", "prepool"),  # as many parameters, on a map that has positions
    "eca": ("eca", "blocks"),
    "ge": ("ge", "blocks"),
    "gc": ("gc", "blocks"),
    "bam": ("bam", "stages"),  # where its authors put it
    "simam": ("simam", "before_bn2"),  # likewise
    "coord": ("coord", "blocks"),
    "triplet": ("triplet", "blocks"),
    "sk": ("sk", "conv1"),
    "bot": ("mhsa", "conv2_of_layer4"),
    # Controls: as many parameters and operations as the model they are named after, blind gates.
    "se_static": ("se_static", "blocks"),
    "cbam_blocks_static": ("cbam_static", "blocks"),
}


def build_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    width: int = 64,
    seed: int | None = None,
    place: str | None = None,
    reduction: int | None = None,
) -> nn.Module:
    """The model `name` of MODELS: images (N, in_channels, H, W) -> logits (N, num_classes).

    With one `seed` every model starts from the same backbone weights: attention is added after
    they have been drawn. A seed leaves the global random state as it was; without one the weights
    come from it. `place` (of PLACES) and `reduction` replace those of the model's attention. Raises
    ValueError for unknown names and for what the model has not got.
    """
    module, place, options = resolve(name, place, reduction)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # The CPU's generator alone: torch.manual_seed would reseed the GPUs too.
            torch.default_generator.manual_seed(seed)
        model = ResNet18(num_classes, in_channels, width)
        if module:
            PLACES[place](model, partial(MODULES[module], **options))
    return model


def resolve(name: str, place: str | None, reduction: int | None) -> tuple[str, str, dict]:
    """(module, place, options of the module) that build_model takes."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    module, own_place = MODELS[name]
    if place is not None:
        if module is None or own_place in REPLACING:
            raise ValueError(f"model {name} has no attention that could be put elsewhere")
        if place in REPLACING:
            raise ValueError(f"model {name}: {place} is for modules that replace a convolution")
    place = place or own_place
    if module and place not in PLACES:
        raise ValueError(f"model {name}: no place {place!r}: choose from {', '.join(PLACES)}")
    if reduction is None:
        return module, place, {}
    if default_reduction(module) is None:
        raise ValueError(f"model {name} has no reduction that could be set")
    return module, place, {"reduction": reduction}


def default_reduction(module: str | None) -> int | None:
    """That of a module that has one."""
    parameters = inspect.signature(MODULES[module]).parameters if module else {}
    return parameters["reduction"].default if "reduction" in parameters else None


def name_of(name: str, place: str | None = None, reduction: int | None = None) -> str:
    """What a model is called: "se_r8", "eca_classifier"; its name in MODELS where it has one."""
    module, place, _ = resolve(name, place, reduction)
    if (module, place) != MODELS[name]:
        name = f"{module}_{place}"
        for other, module_and_place in MODELS.items():
            if module_and_place == (module, place):
                name = other
    return name if reduction in (None, default_reduction(module)) else f"{name}_r{reduction}"


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    for name in MODELS:
        print(f"{name:18s} {count_parameters(build_model(name)):>12,}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
