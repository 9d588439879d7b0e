"""The networks in PyTorch, for their speed alone: what a user of the original's code would wait.

HRNetV2-W48 as the original builds it, and torchvision's DeepLabV3 on ResNet-101, each with the
projection head and the contrast within the batch, written for `benchmarks/networks.py` because
torchvision's wheels go with one build of PyTorch alone. Layers, widths and strides are the point:
weights are random, and DeepLabV3 lacks its auxiliary head, a few percent of a step.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

torch: Any = importlib.import_module("torch")
nn, F = torch.nn, torch.nn.functional

CLASSES, PROJ_DIM = 19, 256


def conv_bn(
    channels: int, width: int, size: int, *, stride: int = 1, dilation: int = 1, relu: bool = True
) -> Any:
    """Convolution, BatchNorm and, with `relu`, ReLU."""
    conv = nn.Conv2d(channels, width, size, stride, dilation * (size // 2), dilation, bias=False)
    layers = [conv, nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class Residual(nn.Module):
    """A block around a shortcut, which is projected where the shape changes."""

    def __init__(self, block: Any, shortcut: Any) -> None:
        super().__init__()
        self.block, self.shortcut = block, shortcut

    def forward(self, x: Any) -> Any:
        """ReLU of the sum."""
        return F.relu(self.block(x) + self.shortcut(x))


def basic(width: int) -> Residual:
    """Two 3x3 convolutions."""
    return Residual(
        nn.Sequential(conv_bn(width, width, 3), conv_bn(width, width, 3, relu=False)),
        nn.Identity(),
    )


def bottleneck(channels: int, width: int, *, stride: int = 1, dilation: int = 1) -> Residual:
    """1x1, 3x3 and 1x1 convolution."""
    out = 4 * width
    block = nn.Sequential(
        conv_bn(channels, width, 1),
        conv_bn(width, width, 3, stride=stride, dilation=dilation),
        conv_bn(width, out, 1, relu=False),
    )
    same = channels == out and stride == 1
    return Residual(
        block, nn.Identity() if same else conv_bn(channels, out, 1, stride=stride, relu=False)
    )


# --- HRNetV2-W48 ---------------------------------------------------------------------------------

WIDTHS = (48, 96, 192, 384)


class Exchange(nn.Module):
    """Four blocks on every branch, then each branch receives the sum of all."""

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        widths = WIDTHS[:num_branches]
        self.branches = nn.ModuleList(nn.Sequential(*(basic(w) for _ in range(4))) for w in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self.path(source, target) for source in range(num_branches))
            for target in range(num_branches)
        )

    @staticmethod
    def path(source: int, target: int) -> Any:
        """From one branch to another; upsampling follows in `forward`."""
        if source == target:
            return nn.Identity()
        if source > target:
            return conv_bn(WIDTHS[source], WIDTHS[target], 1, relu=False)
        width, steps = WIDTHS[source], target - source
        inner = [conv_bn(width, width, 3, stride=2) for _ in range(steps - 1)]
        return nn.Sequential(*inner, conv_bn(width, WIDTHS[target], 3, stride=2, relu=False))

    def forward(self, xs: list[Any]) -> list[Any]:
        """Of as many branches as many."""
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        return [
            F.relu(sum(resized(path(x), own) for path, x in zip(paths, xs, strict=True)))
            for paths, own in zip(self.fuse, xs, strict=True)
        ]


class HRNet(nn.Module):
    """Stem, layer1, three stages of exchanges; the branches joined."""

    channels = sum(WIDTHS)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, 64, 3, stride=2),
            conv_bn(64, 64, 3, stride=2),
            *(bottleneck(64 if i == 0 else 256, 64) for i in range(4)),
        )
        self.first = conv_bn(256, WIDTHS[0], 3)
        self.new = nn.ModuleList(
            conv_bn(channels, width, 3, stride=2)
            for channels, width in itertools.pairwise((256, *WIDTHS[1:]))
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Exchange(branches) for _ in range(number)))
            for branches, number in ((2, 1), (3, 4), (4, 3))
        )

    def forward(self, image: Any) -> Any:
        """At stride 4."""
        x = self.stem(image)
        xs = self.stages[0]([self.first(x), self.new[0](x)])
        for new, stage in zip(self.new[1:], self.stages[1:], strict=True):
            xs = stage([*xs, new(xs[-1])])
        return torch.cat([resized(x, xs[0]) for x in xs], 1)


def resized(x: Any, like: Any) -> Any:
    """Bilinear, to the size of another map."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


# --- DeepLabV3 on ResNet-101, output stride 8 -----------------------------------------------------


class ResNet101(nn.Module):
    """With dilations in layers 3 and 4."""

    channels = 2048

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [conv_bn(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for i, (blocks, stride, dilation) in enumerate(
            ((3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4))
        ):
            for j in range(blocks):
                first = {"stride": stride, "dilation": max(dilation // 2, 1)}
                settings = first if j == 0 else {"dilation": dilation}
                layers.append(bottleneck(channels, 64 * 2**i, **settings))
                channels = 4 * 64 * 2**i
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Any) -> Any:
        """At stride 8."""
        return self.layers(image)


class DeepLabHead(nn.Module):
    """ASPP of 256 channels with rates 12, 24 and 36, a 3x3 convolution, logits."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn(channels, 256, 1),
                *(conv_bn(channels, 256, 3, dilation=rate) for rate in (12, 24, 36)),
            ]
        )
        self.mean = conv_bn(channels, 256, 1)
        self.last = nn.Sequential(
            *(conv_bn(5 * 256, 256, 1), nn.Dropout(0.5), conv_bn(256, 256, 3)),
            nn.Conv2d(256, CLASSES, 1),
        )

    def forward(self, x: Any) -> Any:
        """At the stride of `x`."""
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.last(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


def fcn_head(channels: int) -> Any:
    """The original's head of an HRNet."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        *(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Dropout2d(0.1)),
        nn.Conv2d(channels, CLASSES, 1, bias=False),
    )


# --- With contrast -------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Logits, and embeddings of unit length."""

    def __init__(self, backbone: Any, head: Any) -> None:
        super().__init__()
        width = backbone.channels
        self.backbone, self.head = backbone, head(width)
        self.projection = nn.Sequential(
            *(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            nn.Conv2d(width, PROJ_DIM, 1),
        )

    def forward(self, image: Any) -> tuple[Any, Any]:
        """Of images (n, 3, h, w)."""
        x = self.backbone(image)
        return self.head(x), F.normalize(self.projection(x), dim=1)


def build(name: str) -> Any:
    """The network of this name, or None where it is not written here."""
    makers = {
        "hrnet_w48": lambda: Segmenter(HRNet(), fcn_head),
        "deeplabv3_r101_torchvision": lambda: Segmenter(ResNet101(), DeepLabHead),
    }
    return makers[name]() if name in makers else None


def programs(name: str, size: tuple[int, int]) -> Iterator[tuple[Any, Any]]:
    """Forward of one image and step of two, with maps stored by channel and by pixel."""
    torch.set_num_threads(os.cpu_count() or 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        network = build(name)
        if network is None:
            return
        network = network.to(memory_format=layout)
        image = torch.randn(2, 3, *size).to(memory_format=layout)
        label = torch.randint(CLASSES, (2, size[0] // 16, size[1] // 16))
        label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        yield (
            functools.partial(predict, network, image[:1]),
            functools.partial(train_step, network, optimizer, image, label),
        )


def predict(network: Any, image: Any) -> None:
    """Logits in evaluation, where nothing is kept for a gradient."""
    network.eval()
    with torch.no_grad():
        network.head(network.backbone(image))


def contrast_in_batch(embedding: Any, label: Any, prediction: Any) -> Any:
    """The original's way: a loop over images and classes, then whole matrices and autograd.

    Of embeddings (n, h, w, d), labels and predicted classes (n, h, w).
    """
    flat = embedding.reshape(len(label), -1, embedding.shape[-1])
    label, prediction = label.reshape(len(label), -1), prediction.reshape(len(label), -1)
    present = [
        (image, int(c))
        for image, labels in enumerate(label)
        for c in torch.unique(labels)
        if (labels == c).sum() > 100
    ]
    views = min(512 * len(label) // len(present), 100)
    rows, classes = [], []
    for image, c in present:
        hard = ((label[image] == c) & (prediction[image] != c)).nonzero()[:, 0]
        easy = ((label[image] == c) & (prediction[image] == c)).nonzero()[:, 0]
        num_hard = min(len(hard), max(views // 2, views - len(easy)))
        hard = hard[torch.randperm(len(hard))[:num_hard]]
        easy = easy[torch.randperm(len(easy))[: views - num_hard]]
        rows.append(flat[image, torch.cat([hard, easy])])
        classes += [c] * len(rows[-1])
    rows, classes = torch.cat(rows), torch.tensor(classes)
    similarity = rows @ rows.T / 0.1
    similarity = similarity - similarity.max(1, keepdim=True).values.detach()
    same = (classes[:, None] == classes).float()
    positive = same - torch.eye(len(rows))
    negatives = (similarity.exp() * (1 - same)).sum(1, keepdim=True)
    log_prob = similarity - (similarity.exp() + negatives).log()
    return -0.1 / 0.07 * ((positive * log_prob).sum(1) / positive.sum(1)).mean()


def train_step(network: Any, optimizer: Any, image: Any, label: Any) -> float:
    """Forward, cross entropy at the size of the label, contrast at the network's stride; SGD."""
    network.train()
    logits, embedding = network(image)
    size = embedding.shape[2:]
    small = F.interpolate(label[:, None].float(), size, mode="nearest")[:, 0].long()
    contrast = contrast_in_batch(embedding.permute(0, 2, 3, 1), small, logits.detach().argmax(1))
    large = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=True)
    loss = F.cross_entropy(large, label) + 0.1 * contrast
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
