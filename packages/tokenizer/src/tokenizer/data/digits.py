"""The built-in data set: scikit-learn's 1,797 handwritten digits, as 32 x 32 RGB pictures."""

import numpy as np
from PIL import Image

from tokenizer.data.source import PackedStrings, Skipped, choose_split

VAL_FRACTION = 0.2  # 360 of 1,797
SIZE = 32


class Digits:
    """One split (train 1,437, val 360, all 1,797) of the digits; class ids are the digits."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = digits.target.astype(np.int64)
        keys = [f"{label}/{i:04d}" for i, label in enumerate(labels)]
        chosen = choose_split(keys, labels, split, VAL_FRACTION)
        self.keys = PackedStrings(keys[i] for i in chosen)
        self.labels = labels[chosen]
        self.class_names: list[str] | None = [str(digit) for digit in range(10)]
        self.ignored = Skipped()
        # [n, 8, 8] from 0..16 to 0..255
        self._pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, enlarged smoothly to 32 x 32."""
        small = Image.fromarray(self._pixels[i])
        return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
