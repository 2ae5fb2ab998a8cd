"""PSNR and SSIM of uint8 RGB pictures, one number per picture."""

import math

import torch
import torch.nn.functional as F

K1, K2 = 0.01, 0.03  # the constants of Wang et al. 2004


class ImageMean:
    """The mean of a number per picture; mergeable."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self.infinite = 0  # PSNR of pictures that are reproduced exactly
        self.undefined = 0  # not a number, as networks with odd weights give

    def update(self, values: torch.Tensor) -> None:
        """Add values [n]."""
        values = values.double().cpu()
        self.total += float(values[values.isfinite()].sum())
        self.count += len(values)
        self.infinite += int(values.isinf().sum())
        self.undefined += int(values.isnan().sum())

    def merge(self, other: "ImageMean") -> None:
        """Add the values that `other` has seen."""
        self.total += other.total
        self.count += other.count
        self.infinite += other.infinite
        self.undefined += other.undefined

    def compute(self) -> float:
        """Return the mean; raises ValueError where it is infinite or undefined."""
        if self.undefined:
            raise ValueError(f"not a number for {self.undefined} of {self.count} pictures")
        if self.infinite:
            raise ValueError(
                f"{self.infinite} of {self.count} pictures are reproduced exactly, which makes the "
                "mean infinite"
            )
        return self.total / self.count


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB, float64 [n] on the CPU; infinite for equal pictures.

    first, second: uint8 [n, c, h, w]. The sum of squares is an exact integer.
    """
    difference = first.to(torch.int32) - second.to(torch.int32)
    squares = difference.square().flatten(1).sum(1, dtype=torch.int64).cpu().double()
    return 10 * torch.log10(255.0**2 * difference[0].numel() / squares)


def ssim(
    first: torch.Tensor,
    second: torch.Tensor,
    window: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the structural similarity (Wang et al. 2004), float [n]: 1 for equal pictures.

    first, second: uint8 [n, c, h, w]; each channel is compared by itself, over the positions where
    the window fits, and averaged.
    window: "gaussian11", the paper's (sigma 1.5, weighted moments), or "uniform7", scikit-image's
    default (7x7 mean, sample covariance).
    """
    kernel, bias = _window(window)
    if min(first.shape[2:]) < len(kernel):
        raise ValueError(
            f"pictures of {first.shape[2]}x{first.shape[3]} are smaller than the "
            f"{len(kernel)}x{len(kernel)} window of SSIM"
        )
    # Centred values: variances are differences of moments, which would lose digits around 128.
    x = first.to(dtype) / 255 - 0.5
    y = second.to(dtype) / 255 - 0.5
    moments = torch.stack([x, y, x * x, y * y, x * y])  # [5, n, c, h, w]
    # TF32, the default of convolutions on GPUs that have it, would keep three digits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = _filter(moments, kernel.to(moments))
    var_x = bias * (mean_xx - mean_x * mean_x)
    var_y = bias * (mean_yy - mean_y * mean_y)
    covariance = bias * (mean_xy - mean_x * mean_y)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = K1**2, K2**2  # the range of values is 1
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _window(name: str) -> tuple[torch.Tensor, float]:
    """Return the separable window, float64 [size], and the factor on (co)variances."""
    if name == "uniform7":
        return torch.full((7,), 1 / 7, dtype=torch.float64), 49 / 48
    if name != "gaussian11":
        raise ValueError(f"window={name!r}; allowed: gaussian11, uniform7")
    weights = [math.exp(-0.5 * (offset / 1.5) ** 2) for offset in range(-5, 6)]
    kernel = torch.tensor(weights, dtype=torch.float64)
    return kernel / kernel.sum(), 1.0


def _filter(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Filter rows and columns of [..., h, w] where the kernel fits: [..., h - size + 1, ...]."""
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return flat.reshape(*images.shape[:-2], *flat.shape[-2:])
