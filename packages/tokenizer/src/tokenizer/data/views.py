"""The square view of a picture that a model sees: resized, then a centre or a random crop."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tokenizer.data.order import mix


@dataclass(frozen=True)
class View:
    """How a view is cut out of a picture."""

    name: str  # center, flip, random (as in the manifest of index shards) or train
    random_crop: bool = False
    mirror: float = 0.0  # probability of mirroring left and right
    seed: int | None = None  # of a random view that is made once; training seeds each sample itself

    def to_json(self) -> dict[str, str | int]:
        """Return the entry of the manifest's `views`."""
        return {"name": self.name} if self.seed is None else {"name": self.name, "seed": self.seed}


CENTER = View("center")
FLIP = View("flip", mirror=1.0)


def parse_views(names: Sequence[str], seed: int) -> list[View]:
    """Expand `center`, `flip`, `random` and `random:4`; random views are seeded from `seed` up."""
    views: list[View] = []
    for name in names:
        kind, _, count = name.partition(":")
        if name in ("center", "flip"):
            views.append(CENTER if name == "center" else FLIP)
        elif kind == "random" and (not count or (count.isdecimal() and int(count) > 0)):
            start = seed + sum(view.name == "random" for view in views)
            seeds = range(start, start + int(count or 1))
            views += [View("random", random_crop=True, seed=view_seed) for view_seed in seeds]
        else:
            raise ValueError(f"views: {name!r} is not one of center, flip, random, random:COUNT")
    if not views or len(set(views)) < len(views):
        raise ValueError(f"views={list(names)}: name at least one view, and none twice")
    return views


def cut(image: Image.Image, view: View, *, resolution: int, resize: int, seed: int) -> Tensor:
    """Return `view` of an RGB picture as uint8 [3, resolution, resolution].

    Args:
        image: RGB of any size; a small one is enlarged.
        resize: the shorter side before the crop, at least `resolution`.
        seed: decides what is random in the view, and nothing else does.
    """
    # Pillow's bilinear filter with antialiasing, as in the published pipeline.
    image = F.resize(image, [resize], interpolation=InterpolationMode.BILINEAR, antialias=True)
    if view.random_crop:
        top = int(mix(seed, 0)[0]) % (image.height - resolution + 1)
        left = int(mix(seed, 1)[0]) % (image.width - resolution + 1)
        image = F.crop(image, top, left, resolution, resolution)
    else:
        image = F.center_crop(image, [resolution, resolution])
    if view.mirror > int(mix(seed, 2)[0]) / 2**64:
        image = F.horizontal_flip(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
