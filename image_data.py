"""A data set in memory, and the error that says why there is none."""

from dataclasses import dataclass

import torch


class DataError(RuntimeError):
    """The data cannot be had, or are not what they should be. The message says what to do."""


@dataclass
class ImageData:
    """A data set in memory."""

    train_images: torch.Tensor  # uint8 (N, C, H, W)
    train_labels: torch.Tensor  # int64 (N,)
    test_images: torch.Tensor  # uint8 (N, C, H, W)
    test_labels: torch.Tensor  # int64 (N,)
    classes: list[str]
    mean: tuple[float, ...]  # of the training images, per channel, pixels in [0, 1]
    std: tuple[float, ...]
    source: str  # where the files came from, for people to read
    key: str | None = None  # of the content, where the name does not say what it is

    def moments_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, std), each (C, 1, 1). Images of one value have no std, which is divided by."""
        std = [max(value, 1 / 255) for value in self.std]
        return tuple(torch.tensor(m, device=device)[:, None, None] for m in (self.mean, std))


def moments(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel of uint8 (N, C, H, W), pixels in [0, 1].

    From the counts of the 256 values: exact, and in little memory.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        means.append(mean.item())
        deviations.append((share @ (values - mean).square()).sqrt().item())
    return tuple(means), tuple(deviations)
