"""Inception score (Salimans et al. 2016): exp of the mean divergence of p(y|x) from p(y)."""

import torch

from eval.features.inception import NUM_CLASSES


class InceptionScore:
    """Streaming inception score, the mean over splits.

    Picture i belongs to split i % splits. Splits of consecutive pictures, as in older code, give
    another number once the files are sorted by class; interleaved ones need no shuffling.
    """

    def __init__(self, splits: int) -> None:
        self.count = torch.zeros(splits, dtype=torch.int64)  # [splits]
        self.sum_p = torch.zeros(splits, NUM_CLASSES, dtype=torch.float64)  # [splits, classes]
        self.sum_p_log_p = torch.zeros(splits, dtype=torch.float64)  # [splits]

    def update(self, logits: torch.Tensor, start: int) -> None:
        """Add logits without bias, float [n, 1008], of the pictures start, start + 1, ..."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = (start + torch.arange(len(logits))) % len(self.count)
        self.count.index_add_(0, split, torch.ones_like(split))
        self.sum_p.index_add_(0, split, p)
        self.sum_p_log_p.index_add_(0, split, (p * log_p).sum(1))

    def merge(self, other: "InceptionScore") -> None:
        """Add the pictures that `other` has seen."""
        self.count += other.count
        self.sum_p += other.sum_p
        self.sum_p_log_p += other.sum_p_log_p

    def compute(self) -> float:
        """Return the score; every split needs at least one picture."""
        if int(self.count.min()) == 0:
            raise ValueError(
                f"{int(self.count.sum())} pictures cannot fill splits={len(self.count)}"
            )
        mean_p = self.sum_p / self.count[:, None]
        entropy_of_mean = -torch.xlogy(mean_p, mean_p).sum(1)
        return float((self.sum_p_log_p / self.count + entropy_of_mean).exp().mean())
