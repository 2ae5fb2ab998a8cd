"""Pictures of the page: reconstructions ranked by PSNR, samples by class, and PNG data URIs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.media import open_media
from eval.page.markup import Html, element
from eval.pixel import psnr
from eval.source import Batch

SHOWN_PIXELS = 256  # larger pictures are reduced to this many pixels on their longer side
CRISP_PIXELS = 96  # smaller pictures are enlarged without smoothing
ENLARGED_PIXELS = 96  # to at least this many pixels on the page, by a whole factor


@dataclass(frozen=True)
class Pair:
    """A picture, its reconstruction and the PSNR in dB between them."""

    key: str
    psnr: float
    original: Tensor  # uint8 [3, h, w]
    reconstruction: Tensor  # uint8 [3, h, w]


@dataclass
class Pairs:
    """A few pairs of a folder: the first ones, and those with the lowest and the highest PSNR."""

    name: str
    count: int  # pairs in the folder
    first: list[Pair] = field(default_factory=list)
    worst: list[Pair] = field(default_factory=list)  # the worst first
    best: list[Pair] = field(default_factory=list)  # the best first


@dataclass
class Samples:
    """A few samples of each class."""

    name: str
    count: int  # samples in the folder
    num_classes: int  # classes in the folder
    classes: dict[str, list[Tensor]] = field(default_factory=dict)  # label to uint8 [3, h, w]


def rank_pairs(folder: str, columns: int, batch_size: int = 256) -> Pairs:
    """Read every pair of `folder` once and keep `columns` pairs of each kind.

    Raises:
        ValueError: `folder` does not hold pair media shards.
    """
    originals = open_media(folder, "original")
    reconstructions = open_media(folder, "reconstruction")
    result = Pairs(originals.name, len(originals))
    batches = zip(originals.batches(batch_size), reconstructions.batches(batch_size), strict=True)
    with tqdm(total=len(originals), desc="pairs", unit=" images") as progress:
        for a, b in batches:
            quality = psnr(a.images, b.images)  # [n]
            ascending = quality.argsort(stable=True)[:columns]
            descending = quality.argsort(stable=True, descending=True)[:columns]
            missing = torch.arange(min(columns - len(result.first), len(quality)))
            result.first += pick(a, b, quality, missing)
            worst = result.worst + pick(a, b, quality, ascending)
            best = result.best + pick(a, b, quality, descending)
            result.worst = sorted(worst, key=lambda pair: pair.psnr)[:columns]
            result.best = sorted(best, key=lambda pair: -pair.psnr)[:columns]
            progress.update(len(quality))
    return result


def pick(
    originals: Batch, reconstructions: Batch, quality: Tensor, positions: Tensor
) -> list[Pair]:
    """Return the pairs at `positions` of a batch, copied: a kept pair must not hold its batch."""
    return [
        Pair(
            originals.keys[i],
            float(quality[i]),
            originals.images[i].clone(),
            reconstructions.images[i].clone(),
        )
        for i in positions.tolist()
    ]


def choose_samples(spec: str, columns: int, max_classes: int, batch_size: int = 256) -> Samples:
    """Keep the first `columns` samples of at most `max_classes` classes, evenly spaced by id."""
    source = open_media(spec, "images")
    kept: dict[int, list[Tensor]] = {}
    with tqdm(total=len(source), desc="samples", unit=" images") as progress:
        for batch in source.batches(batch_size):
            for image, cls in zip(batch.images, batch.cls.tolist(), strict=True):
                pictures = kept.setdefault(cls, [])
                if len(pictures) < columns:
                    pictures.append(image.clone())
            progress.update(len(batch.cls))
    result = Samples(source.name, len(source), len(kept.keys() - {-1}))
    names = source.class_names
    for cls in spread(sorted(kept), max_classes):
        result.classes[class_label(cls, names)] = kept[cls]
    return result


def class_label(cls: int, names: list[str] | None) -> str:
    """Return what to call a class: its name, and its id where the name is another word."""
    if cls < 0:
        return "no class"
    name = names[cls] if names and cls < len(names) else str(cls)
    return f"class {cls}" if name == str(cls) else f"{name} (class {cls})"


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` of `items`, evenly spaced, or all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def png_uri(image_CHW: Tensor) -> str:
    """Return a uint8 picture [3, h, w] as a PNG data URI, reduced to SHOWN_PIXELS if larger."""
    longer = max(image_CHW.shape[1:])
    if longer > SHOWN_PIXELS:
        size = [max(1, round(n * SHOWN_PIXELS / longer)) for n in image_CHW.shape[1:]]
        small = F.interpolate(image_CHW[None].float(), size, mode="bicubic", antialias=True)
        image_CHW = small[0].round().clamp(0, 255).byte()
    stream = io.BytesIO()
    pixels = image_CHW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def picture(image_CHW: Tensor, alt: str) -> Html:
    """Return an `img` element; small pictures are enlarged by a whole factor with crisp pixels."""
    height, width = image_CHW.shape[1:]
    longer = max(height, width)
    scale = min(1.0, SHOWN_PIXELS / longer)
    if longer < CRISP_PIXELS:
        scale = max(1, -(-ENLARGED_PIXELS // longer))
    return element(
        "img",
        src=png_uri(image_CHW),
        alt=alt,
        width=round(width * scale),
        height=round(height * scale),
        class_="crisp" if longer < CRISP_PIXELS else None,
        decoding="async",
    )


def draw_pairs(title: str, pairs: list[Pair]) -> Html:
    """Return a row of pairs, each original above its reconstruction with key and PSNR."""
    figures = []
    for pair in pairs:
        quality = "identical" if pair.psnr == float("inf") else f"{pair.psnr:.2f} dB"
        caption = element("figcaption", element("b", quality), element("span", pair.key))
        original = picture(pair.original, f"original of {pair.key}")
        made = picture(pair.reconstruction, f"reconstruction of {pair.key}, {quality}")
        figures.append(element("figure", original, made, caption, title=pair.key))
    return element("div", element("h3", title), element("div", figures, class_="strip"))


def draw_samples(samples: Samples) -> Html:
    """Return the samples as one labelled row per class."""
    rows = []
    for label, images in samples.classes.items():
        pictures = [
            picture(image, f"generated sample {i} of {label}")
            for i, image in enumerate(images, start=1)
        ]
        strip = element("div", pictures, class_="strip")
        rows.append(element("div", element("h3", label), strip, class_="class"))
    return element("div", rows, class_="classes")
