"""Further attention modules, as in their papers and the authors' code; SE and CBAM: models.py.

Initialisation is PyTorch's default unless a module says otherwise; some authors set biases to 0.
C / reduction is rounded down, hidden widths are at least 1, and all modules accept 1x1 maps.
`mean` and `amax` replace adaptive pooling: same values, deterministic backward passes on CUDA.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class ECA(nn.Module):
    """Efficient Channel Attention (Wang et al., CVPR 2020, arXiv 1910.03151).

    sigmoid(conv1d_k(mean of x over H and W)) x: a channel's gate depends on the means of k adjacent
    channels. k is (log2 C + 1) / 2, truncated, made odd, and at least 3, as in timm: 3, 5, 5, 5 for
    64 to 512 channels. The authors' ECA-Net18 was trained with 3, 5, 7, 7.
    """

    def __init__(self, channels: int):
        super().__init__()
        k = max(3, int((math.log2(channels) + 1) / 2) | 1)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        gate = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))  # (N, 1, C)
        return x * gate[:, 0, :, None, None]


class GC(nn.Module):
    """Global Context block (Cao et al., ICCV Workshops 2019, arXiv 1904.11492).

    x' = x + W2 relu(LN(W1 z)): one vector is added to all positions. z is the mean of x over H and
    W, weighted by a softmax over positions. W2 starts at 0, so x' = x, as in the authors' code.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.fc1 = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        weights = self.mask(x).flatten(2).softmax(2)  # (N, 1, HW)
        context = (x.flatten(2) @ weights.transpose(1, 2)).flatten(1)  # (N, C)
        return x + self.fc2(F.relu(self.norm(self.fc1(context))))[:, :, None, None]


class BAM(nn.Module):
    """Bottleneck Attention Module (Park, Woo, Lee, Kweon, BMVC 2018, arXiv 1807.06514).

    (1 + sigmoid(channel(x) + spatial(x))) x, eq. 1 and 2. channel: mean over H and W, two layers.
    spatial: 1x1, two 3x3 with dilation 4, 1x1 to one channel. The two are added as in the paper;
    the authors' code multiplies them. BatchNorm and ReLU are between the layers as in that code;
    the paper has a BatchNorm at the end.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel = nn.ModuleList(
            [nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)]
        )
        self.channel_bns = nn.ModuleList([nn.BatchNorm2d(hidden)])
        dilated = [nn.Conv2d(hidden, hidden, 3, 1, dilation, dilation) for _ in range(2)]
        self.spatial = nn.ModuleList(
            [nn.Conv2d(channels, hidden, 1), *dilated, nn.Conv2d(hidden, 1, 1)]
        )
        self.spatial_bns = nn.ModuleList(nn.BatchNorm2d(hidden) for _ in range(3))

    @staticmethod
    def run(x, convs, bns):
        for conv, bn in zip(convs, bns, strict=False):  # no BatchNorm after the last
            x = F.relu(bn(conv(x)))
        return convs[-1](x)

    def forward(self, x):
        channel = self.run(x.mean((2, 3), keepdim=True), self.channel, self.channel_bns)
        spatial = self.run(x, self.spatial, self.spatial_bns)  # (N, 1, H, W)
        return x * (1 + torch.sigmoid(channel + spatial))


class PositionGate(nn.Module):
    """Triplet's gate, as CBAM's spatial gate: sigmoid(BN(conv7x7([max over C, mean over C])))."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x):
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.bn(self.conv(pooled)))  # the gate is (N, 1, H, W)


class Triplet(nn.Module):
    """Triplet attention (Misra, Nalamada, Arasanipalai, Hou, WACV 2021, arXiv 2010.03045).

    The mean of three gated copies of x, with gates over (H, W) and, rotated, over (C, W) and
    (H, C), so channels and positions interact. As in the authors' triplet_attention.py.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.height_width = PositionGate()
        self.channel_width = PositionGate()
        self.height_channel = PositionGate()

    def forward(self, x):
        without_height = self.channel_width(x.transpose(1, 2)).transpose(1, 2)
        without_width = self.height_channel(x.transpose(1, 3)).transpose(1, 3)
        return (self.height_width(x) + without_height + without_width) / 3


class Coordinate(nn.Module):
    """Coordinate attention (Hou, Zhou, Feng, CVPR 2021, arXiv 2103.02907).

    sigmoid(row gate) sigmoid(column gate) x, eq. 4 to 9: means over W and over H share one 1x1
    convolution, BatchNorm and h-swish; then each has its own 1x1 convolution. The hidden width is
    C / reduction, at least 8, as in the authors' code.
    """

    def __init__(self, channels: int, reduction: int = 32):
        super().__init__()
        hidden = max(8, channels // reduction)
        self.conv = nn.Conv2d(channels, hidden, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv_rows = nn.Conv2d(hidden, channels, 1)
        self.conv_columns = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        rows = x.mean(3, keepdim=True)  # (N, C, H, 1)
        columns = x.mean(2, keepdim=True)  # (N, C, 1, W)
        both = torch.cat([rows, columns.transpose(2, 3)], dim=2)  # (N, C, H + W, 1)
        both = F.hardswish(self.bn(self.conv(both)))
        rows, columns = both.split([height, width], dim=2)
        row_gate = torch.sigmoid(self.conv_rows(rows))  # (N, C, H, 1)
        column_gate = torch.sigmoid(self.conv_columns(columns.transpose(2, 3)))  # (N, C, 1, W)
        return x * column_gate * row_gate


class GE(nn.Module):
    """Gather-Excite with learned gathering, GE-theta (Hu et al., NeurIPS 2018, arXiv 1810.12348).

    sigmoid(up(gather(x))) x: depthwise 3x3 convolutions of stride 2, each with BatchNorm and all
    but the last with ReLU, shrink the map by `extent`; up is nearest-neighbour. This is the paper's
    E8. Its other variants have a kernel of the map's size (which depends on the images), no
    parameters, or SE's two layers after the gather. On a 4x4 map the last conv sees one pixel.
    """

    def __init__(self, channels: int, extent: int = 8):
        super().__init__()
        steps = range(int(math.log2(extent)))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 2, padding=1, groups=channels, bias=False)
            for _ in steps
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in steps)

    def forward(self, x):
        context = x
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            context = bn(conv(F.relu(context) if i else context))
        return x * torch.sigmoid(F.interpolate(context, x.shape[2:]))


class SimAM(nn.Module):
    """A Simple, Parameter-Free Attention Module (Yang et al., ICML 2021).

    sigmoid(y) x, y = d^2 / (4 (v + lambda)) + 1/2, with d = x - mean and v = sum d^2 / (HW - 1)
    over a channel's positions: the inverse of eq. 5. lambda is 1e-4, the authors' for CIFAR. On a
    1x1 map d = v = 0: a constant gate.
    """

    def __init__(self, channels: int, regularizer: float = 1e-4):
        super().__init__()
        self.regularizer = regularizer

    def forward(self, x):
        squares = (x - x.mean((2, 3), keepdim=True)).square()
        others = max(1, x.shape[2] * x.shape[3] - 1)
        variance = squares.sum((2, 3), keepdim=True) / others
        return x * torch.sigmoid(squares / (4 * (variance + self.regularizer)) + 0.5)


# --- Replacements for a convolution ---------------------------------------------------------------


class MHSA(nn.Module):
    """Multi-head self-attention over positions, replacing a convolution (BoTNet, Srinivas et al.,
    CVPR 2021, arXiv 2101.11605).

    softmax((q k^T + q r^T) / sqrt(d)) v per head, figure 4; one 1x1 convolution without bias gives
    q, k, v. r is a row embedding plus a column embedding of the key's offset from the query, shared
    by all heads. Offsets are clipped to `reach` (Shaw et al. 2018), so maps may have any size; up
    to 8x8 it is the paper's (smaller maps leave embeddings unused). In BoTNet's bottleneck blocks
    BatchNorm and ReLU follow; here only BatchNorm.
    """

    def __init__(self, channels: int, heads: int = 4, reach: int = 7):
        super().__init__()
        heads = math.gcd(heads, channels)
        self.heads, self.reach, depth = heads, reach, channels // heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(2 * reach + 1, depth) * depth**-0.5)
        self.columns = nn.Parameter(torch.randn(2 * reach + 1, depth) * depth**-0.5)

    def relative(self, embedding: torch.Tensor, length: int) -> torch.Tensor:
        """(length, length, depth): the embedding of key j's offset from query i."""
        i = torch.arange(length, device=embedding.device)
        distance = (i[None] - i[:, None]).clamp(-self.reach, self.reach)
        distances = torch.arange(-self.reach, self.reach + 1, device=embedding.device)
        # One-hot product, not indexing: its backward sums in a fixed order.
        return (distance[..., None] == distances).to(embedding.dtype) @ embedding

    def forward(self, x):
        n, channels, height, width = x.shape
        depth, positions = channels // self.heads, height * width
        qkv = self.qkv(x).view(n, 3, self.heads, depth, positions).transpose(3, 4)
        q, k, v = qkv.unbind(1)  # (N, heads, HW, depth) each
        q = q * depth**-0.5
        grid = q.reshape(n, self.heads, height, width, depth)
        # (N, heads, H, W of the query, then H or W of the key)
        rows = torch.einsum("nahwd,hid->nahwi", grid, self.relative(self.rows, height))
        columns = torch.einsum("nahwd,wjd->nahwj", grid, self.relative(self.columns, width))
        position = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        weights = (q @ k.transpose(2, 3) + position).softmax(3)  # (N, heads, HW, HW)
        return (weights @ v).transpose(2, 3).reshape(n, channels, height, width)


class SelectiveKernel(nn.Module):
    """Selective kernel unit (SKNet, Li, Wang, Hu, Yang, CVPR 2019, arXiv 1903.06586).

    Two branches replace a 3x3 convolution: the original one, and a 3x3 with dilation 2, which sees
    5x5, each with BatchNorm and ReLU. Their sum, averaged over H and W, determines each channel's
    softmax weights of the branches, eq. 1 to 6; no biases. SKNet's convolutions have 32 groups.
    These have one, like the rest of the backbone: about twice the weights of a 3x3.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, reduction: int = 16):
        super().__init__()
        channels = conv.out_channels
        hidden = max(32, channels // reduction)
        self.conv3, self.bn3 = conv, bn
        self.conv5 = nn.Conv2d(
            conv.in_channels, channels, 3, conv.stride, padding=2, dilation=2, bias=False
        )
        nn.init.kaiming_normal_(self.conv5.weight, mode="fan_out", nonlinearity="relu")
        self.bn5 = nn.BatchNorm2d(channels)
        self.fc = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.select = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, x):
        branches = F.relu(self.bn3(self.conv3(x))), F.relu(self.bn5(self.conv5(x)))
        context = (branches[0] + branches[1]).mean((2, 3), keepdim=True)
        scores = self.select(F.relu(self.bn(self.fc(context))))  # (N, 2C, 1, 1)
        weights = scores.unflatten(1, (2, -1)).softmax(1)  # (N, 2, C, 1, 1)
        return weights[:, 0] * branches[0] + weights[:, 1] * branches[1]
