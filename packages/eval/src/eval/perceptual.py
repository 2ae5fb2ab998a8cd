"""LPIPS (Zhang et al. 2018), version 0.1 with AlexNet, through the lpips package."""

import contextlib
import io
import warnings

import torch
from accelerate import Accelerator

from eval.weights import ALEXNET, Weights, load_strictly, load_weights

MIN_SIZE = 31  # below, AlexNet's second pool has no output


class LpipsAlex:
    """LPIPS of uint8 pictures."""

    def __init__(self, path: str | None, accelerator: Accelerator) -> None:
        """Load the backbone from `path`, the cache or the network; raises as `load_weights`."""
        weights = load_weights(ALEXNET, path, accelerator)
        self._network = _network(weights).to(accelerator.device)
        self.protocol = {
            "name": "ours" if weights.official else "ours (custom weights)",
            "preprocessing": "uint8 RGB to [-1, 1], no resize",
            "extractor": "lpips 0.1 alex"
            if weights.official
            else "lpips 0.1 alex (custom weights)",
            "weights": weights.digest,
        }

    @torch.inference_mode()
    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the distance of each pair, float [n], of uint8 [n, 3, h, w]."""
        if min(first.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"pictures of {first.shape[2]}x{first.shape[3]}: LPIPS needs {MIN_SIZE} pixels"
            )
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact:
            return self._network(_to_unit_range(first), _to_unit_range(second)).flatten()


def _to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1], the range that LPIPS is trained on."""
    return images.float() / 127.5 - 1


def _network(weights: Weights) -> torch.nn.Module:
    """Build the lpips network without its own download and put the backbone weights in."""
    # The package prints, and asks torchvision for the weights in a deprecated way.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    # The package cuts torchvision's `features` into slices and keeps the numbers of the layers.
    backbone = {
        name: weights.state.get("features." + name.split(".", 1)[1], torch.empty(0))
        for name in network.net.state_dict()
    }
    load_strictly(network.net, backbone, ALEXNET)
    return network.eval().requires_grad_(False)
