"""The Inception network of TensorFlow (2015-12-05, 1008 classes), which FID is defined on.

It differs from torchvision's Inception v3 (Szegedy et al. 2015) in two places: average pools do not
count the padding, and the last block pools with a maximum. Module names are torchvision's, so the
public state dict of pytorch-fid and torch-fidelity loads as it is.

Shape suffixes: B batch, C channels, H rows, W columns.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from eval.features.resize import tf1_bilinear
from eval.weights import INCEPTION, load_strictly, load_weights

POOL3_DIM = 2048
SPATIAL7_DIM = 17 * 17 * 7
NUM_CLASSES = 1008
EXTRACTOR = "inception-2015-12-05"
PREPROCESSING = "uint8 RGB, TF1 bilinear to 299x299 (no half-pixel centres), (x - 128) / 128"
INCEPTION_PROTOCOL = {"name": "ours", "preprocessing": PREPROCESSING, "extractor": EXTRACTOR}


@dataclass(frozen=True)
class InceptionFeatures:
    """What the metrics read from the network, float32."""

    pool3: torch.Tensor  # [B, 2048]: FID, precision, recall
    logits: torch.Tensor  # [B, 1008], without the bias, as in the reference graph: inception score
    spatial7: torch.Tensor  # [B, 2023]: sFID; 7 channels of mixed_6, flattened in the order H, W, C


class InceptionExtractor:
    """The network with its preprocessing and the identity of its weights."""

    def __init__(self, path: str | None, accelerator: Accelerator) -> None:
        """Load from `path`, or from the cache or the network; raises as `load_weights` does."""
        weights = load_weights(INCEPTION, path, accelerator)
        network = Inception()
        load_strictly(network, weights.state, INCEPTION)
        self._network = network.to(accelerator.device).eval().requires_grad_(False)
        self.protocol = INCEPTION_PROTOCOL | {"weights": weights.digest}
        if not weights.official:
            for part in ("name", "extractor"):
                self.protocol[part] += " (custom weights)"

    @torch.inference_mode()
    def __call__(self, images_BCHW: torch.Tensor) -> InceptionFeatures:
        """Return the features of uint8 RGB pictures, on the CPU."""
        # TF32 would change features in the third digit, benchmarking from run to run.
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact:
            features = self._network(preprocess(images_BCHW))
        return InceptionFeatures(
            features.pool3.cpu(), features.logits.cpu(), features.spatial7.cpu()
        )


def preprocess(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 RGB of any size to the network's input, float32 [B, 3, 299, 299]."""
    return (tf1_bilinear(images_BCHW.float(), 299) - 128) / 128


class Inception(nn.Module):
    """Preprocessed pictures [B, 3, 299, 299] to InceptionFeatures."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), padding=(0, 0))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), padding=(0, 0))
        self.Mixed_5b = _block_a(192, pool_channels=32)
        self.Mixed_5c = _block_a(256, pool_channels=64)
        self.Mixed_5d = _block_a(288, pool_channels=64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, inner=128)
        self.Mixed_6c = _block_c(768, inner=160)
        self.Mixed_6d = _block_c(768, inner=160)
        self.Mixed_6e = _block_c(768, inner=192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, pool="average")
        self.Mixed_7c = _block_e(2048, pool="max")
        self.fc = nn.Linear(POOL3_DIM, NUM_CLASSES)

    def forward(self, x_BCHW: torch.Tensor) -> InceptionFeatures:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCHW)))
        x = F.max_pool2d(x, 3, stride=2)  # [B, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        # The graph's tensor mixed_6/conv, the input branch of the third 17x17 block.
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :7]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        pool3 = x.mean((2, 3))
        return InceptionFeatures(
            pool3=pool3,
            logits=pool3 @ self.fc.weight.T,
            spatial7=spatial.permute(0, 2, 3, 1).flatten(1),
        )


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


@dataclass(frozen=True)
class Branch:
    """A chain of convolutions; module names are `name`, or `name_1`, `name_2`, ... if there are
    more.

    steps: output channels and kernel (rows, columns) of each.
    pair: the last step is two convolutions side by side, 1x3 and 3x1, `name_Na` and `name_Nb`.
    """

    name: str
    steps: list[tuple[int, int, int]]
    pair: bool = False

    def layers(self) -> list[list[tuple[str, int, tuple[int, int]]]]:
        """Return (module name, output channels, kernel) of the convolutions of each step."""
        names = [f"{self.name}_{i + 1}" for i in range(len(self.steps))]
        if len(names) == 1:
            names = [self.name]
        layers = [
            [(name, channels, (rows, columns))]
            for name, (channels, rows, columns) in zip(names, self.steps, strict=True)
        ]
        if self.pair:
            channels = self.steps[-1][0]
            layers[-1] = [(names[-1] + "a", channels, (1, 3)), (names[-1] + "b", channels, (3, 1))]
        return layers


class Mixed(nn.Module):
    """Parallel branches of convolutions and a pool, concatenated over channels.

    pool: "average", "max" (3x3, both keep the size) or "downsample" (maximum with stride 2; then
    the last convolution of each branch has stride 2 as well). pool_channels: output channels of the
    1x1 convolution after the pool; None: no convolution.
    """

    def __init__(
        self, in_channels: int, pool: str, pool_channels: int | None, branches: list[Branch]
    ) -> None:
        super().__init__()
        self._names: list[list[list[str]]] = []  # of each branch, of each step
        self._pool = pool
        self._pool_convolved = pool_channels is not None
        for branch in branches:
            channels = in_channels
            layers = branch.layers()
            for number, step in enumerate(layers):
                last = number == len(layers) - 1
                stride = 2 if pool == "downsample" and last else 1
                for name, out_channels, kernel in step:
                    self.add_module(name, ConvNorm(channels, out_channels, kernel, stride))
                channels = step[0][1]
            self._names.append([[name for name, _, _ in step] for step in layers])
        if pool_channels is not None:
            self.branch_pool = ConvNorm(in_channels, pool_channels, (1, 1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch in self._names:
            last = [x_BCHW]
            for names in branch:
                last = [self.get_submodule(name)(last[0]) for name in names]
            outputs += last
        pooled = self._pooled(x_BCHW)
        outputs.append(self.branch_pool(pooled) if self._pool_convolved else pooled)
        return torch.cat(outputs, dim=1)

    def _pooled(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if self._pool == "average":
            return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
        if self._pool == "max":
            return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
        return F.max_pool2d(x_BCHW, 3, stride=2)


def _block_a(in_channels: int, pool_channels: int) -> Mixed:
    """35x35"""
    branches = [
        Branch("branch1x1", [(64, 1, 1)]),
        Branch("branch5x5", [(48, 1, 1), (64, 5, 5)]),
        Branch("branch3x3dbl", [(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
    ]
    return Mixed(in_channels, "average", pool_channels, branches)


def _block_b(in_channels: int) -> Mixed:
    """35x35 to 17x17"""
    branches = [
        Branch("branch3x3", [(384, 3, 3)]),
        Branch("branch3x3dbl", [(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
    ]
    return Mixed(in_channels, "downsample", None, branches)


def _block_c(in_channels: int, inner: int) -> Mixed:
    """17x17, with 7x7 kernels factorised into rows and columns"""
    tall, wide = (inner, 7, 1), (inner, 1, 7)
    branches = [
        Branch("branch1x1", [(192, 1, 1)]),
        Branch("branch7x7", [(inner, 1, 1), wide, (192, 7, 1)]),
        Branch("branch7x7dbl", [(inner, 1, 1), tall, wide, tall, (192, 1, 7)]),
    ]
    return Mixed(in_channels, "average", 192, branches)


def _block_d(in_channels: int) -> Mixed:
    """17x17 to 8x8"""
    branches = [
        Branch("branch3x3", [(192, 1, 1), (320, 3, 3)]),
        Branch("branch7x7x3", [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)]),
    ]
    return Mixed(in_channels, "downsample", None, branches)


def _block_e(in_channels: int, pool: str) -> Mixed:
    """8x8, ending in pairs of 1x3 and 3x1"""
    branches = [
        Branch("branch1x1", [(320, 1, 1)]),
        Branch("branch3x3", [(384, 1, 1), (384, 3, 3)], pair=True),
        Branch("branch3x3dbl", [(448, 1, 1), (384, 3, 3), (384, 3, 3)], pair=True),
    ]
    return Mixed(in_channels, pool, 192, branches)
