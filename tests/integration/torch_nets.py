"""PyTorch modules of the conversion tests; imported by workers, and by tests that run where torch is installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or planes_in != planes:
            self.around = nn.Sequential(nn.Conv2d(planes_in, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


class ResNet18(nn.Module):
    """He et al., 2015, table 1."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                                  nn.MaxPool2d(3, 2, 1))  # fmt: skip
        layers: list[nn.Module] = []
        planes_in = 64
        for planes, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [BasicBlock(planes_in, planes, stride), BasicBlock(planes, planes, 1)]
            planes_in = planes
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(512, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(image)).mean((2, 3)))


class TransformerBlock(nn.Module):
    """Embedding, masked self-attention and a feed-forward layer; two outputs."""

    def __init__(self, width: int = 64, heads: int = 4, words: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids)
        ignored = torch.zeros_like(mask).masked_fill(mask < 0.5, -1e4)
        attended, _ = self.attention(x, x, x, key_padding_mask=ignored, need_weights=False)
        x = self.first(x + attended)
        x = self.second(x + self.feed(x))
        return {"hidden": x, "pooled": (x * mask.unsqueeze(-1)).sum(1)}


def seeded(module: type[nn.Module]) -> nn.Module:
    """With weights of its own, the same every time, and batch statistics as after training."""
    torch.manual_seed(7)
    made = module()
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return made.eval()


def resnet18() -> nn.Module:
    return seeded(ResNet18)


def transformer() -> nn.Module:
    return seeded(TransformerBlock)


class Gated(nn.Module):
    """With control flow that tracing loses and TorchScript keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return torch.relu(self.one(x))
        return self.other(x)


def gated() -> nn.Module:
    return seeded(Gated)


def not_a_module() -> int:
    return 7
