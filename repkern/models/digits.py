"""The small residual convnet of `repkern quickstart`: 8x8 grey images of digits, ten classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from repkern.models.checkpoints.reading import read_state_dict
from repkern.models.files import replaced
from repkern.models.seal import notes_of, sealed

__all__ = ["DigitsNet", "load_digits_net", "save_digits_net"]

_FORMAT = "repkern.digits"


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016, figure 2); a 1x1 convolution where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, Ci, H, W] -> [N, Co, H/stride, W/stride]."""
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network with one stage per entry of `widths`; each stage after the first halves the image.

    Input [N, in_chans, 8, 8] floating, output [N, num_classes]. Raises ValueError for empty or non-positive sizes.
    """

    def __init__(
        self, widths: tuple[int, ...] = (32, 64), blocks: int = 2, num_classes: int = 10, in_chans: int = 1
    ) -> None:
        super().__init__()
        if not widths or min(*widths, blocks, num_classes, in_chans) < 1:
            raise ValueError(
                "DigitsNet: sizes must be positive, got "
                f"widths={widths}, blocks={blocks}, num_classes={num_classes}, in_chans={in_chans}"
            )
        self.arguments = {
            "widths": list(widths), "blocks": blocks, "num_classes": num_classes, "in_chans": in_chans,
        }  # fmt: skip
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        before = widths[0]
        for index, width in enumerate(widths):
            for block in range(blocks):
                stages.append(_ResidualBlock(before, width, stride=2 if index > 0 and block == 0 else 1))
                before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_chans, 8, 8] -> logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


def save_digits_net(model: DigitsNet, path: str | Path, **notes: object) -> None:
    """Write the weights of a plain DigitsNet as safetensors; sizes and `notes` (JSON values) go to its metadata."""
    # One entry: safetensors writes several in an order that changes from run to run, and equal runs give equal files.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {_FORMAT: sealed({"arguments": model.arguments, **notes}, weights)}
    with replaced(path) as temporary:
        save_file(weights, str(temporary), metadata=metadata)


def load_digits_net(path: str | Path) -> DigitsNet:
    """The network that `save_digits_net` wrote, in eval mode on the CPU.

    Raises FileNotFoundError, or ValueError when the file is damaged or holds something else.
    """
    weights = read_state_dict(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise ValueError(f"{path} was not written by `repkern quickstart`: its metadata has no {_FORMAT!r}")
        model = _made(notes_of(metadata[_FORMAT]).get("arguments"), sum(t.numel() for t in weights.values()))
        wrong = [f"{name} ({t.dtype})" for name, t in weights.items() if t.is_floating_point() == _counts(name)]
        if wrong:
            raise ValueError(f"tensors of another kind than the network has: {', '.join(wrong)}")
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return model.eval()


def _made(arguments: Any, numbers: int) -> DigitsNet:
    """numbers: as many as the file holds, which bounds what a network from its metadata may be."""
    sizes = arguments if isinstance(arguments, dict) else {}
    widths = sizes.get("widths")
    others = [value for name, value in sizes.items() if name != "widths"]
    if not isinstance(widths, list) or not all(type(size) is int and size <= numbers for size in [*widths, *others]):
        raise ValueError(f"the file's metadata describes no network of digits: {arguments!r:.200}")
    with torch.device("meta"):
        network = DigitsNet(**{**sizes, "widths": tuple(widths)})
    if sum(tensor.numel() for tensor in network.state_dict().values()) != numbers:
        raise ValueError("the file's metadata describes another network than it holds")
    return DigitsNet(**{**sizes, "widths": tuple(widths)})


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")
