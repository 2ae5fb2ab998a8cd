"""How a codebook of 2^bits codes is used: share seen, entropy, perplexity, balance of each bit.

The state is one int64 count per code, so it is exact, merges by addition and does not depend on the
order of tokens. Usage and perplexity grow with the number of tokens (uniform use of 2^18 codes
measures a perplexity near 227,865 after a million tokens): read them beside `tokens`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

MAX_BITS = 28  # 2^28 counts take 2 GiB
FORMAT = "omv2-codebook-counts"
VERSION = "1"
# Of the records of every command that measures a codebook.
PROTOCOL = {"name": "ours"}
UNITS = {
    "codebook_usage": "fraction",
    "codebook_perplexity": "codes",
    "codebook_entropy_bits": "bits",
    "codebook_dead": "codes",
    "codebook_tokens": "tokens",
}


@dataclass(frozen=True)
class CodebookUse:
    """What the counts of a codebook say."""

    bits: int
    tokens: int  # tokens counted
    num_codes: int  # 2^bits
    used: int  # codes seen at least once
    dead: int  # codes never seen
    usage: float  # used / num_codes, in [0, 1]
    entropy_bits: float  # entropy of the measured code distribution, in [0, bits]
    perplexity: float  # exp(entropy) = 2^entropy_bits, in [1, num_codes]
    bit_ones: tuple[float, ...]  # [bits], share of tokens whose bit k is 1; 0.5 is balanced

    def facts(self) -> dict[str, int]:
        """Return what a record must say beside the numbers: they depend on it."""
        return {"codebook_bits": self.bits, "tokens": self.tokens}


class CodebookCounts:
    """Count the tokens of each of 2^bits codes; mergeable over batches, files and processes."""

    def __init__(self, bits: int) -> None:
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"codebook_bits={bits}: must be from 1 to {MAX_BITS}")
        self.bits = bits
        self.counts = torch.zeros(2**bits, dtype=torch.int64)  # [2^bits]

    def update(self, indices: torch.Tensor | np.ndarray) -> None:
        """Add `indices`, integers in [0, 2^bits) of any shape, integer type and device.

        Raises:
            ValueError: an index lies outside the codebook; nothing is counted then.
        """
        if isinstance(indices, np.ndarray):
            indices = torch.from_numpy(indices.astype(np.int64))
        flat = indices.detach().reshape(-1).to("cpu", torch.int64)
        if flat.numel() == 0:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= len(self.counts):
            wrong = low if low < 0 else high
            raise ValueError(
                f"token index {wrong}: codebook_bits={self.bits} allows 0 to {len(self.counts) - 1}"
            )
        self.counts += torch.bincount(flat, minlength=len(self.counts))

    def merge(self, other: "CodebookCounts") -> None:
        """Add the counts of `other`, which must have as many bits."""
        if other.bits != self.bits:
            raise ValueError(
                f"cannot merge counts: codebook bits {self.bits} and {other.bits} differ"
            )
        self.counts += other.counts

    def compute(self) -> CodebookUse:
        """Return usage, entropy, perplexity and the balance of each bit.

        Raises:
            ValueError: no token was counted.
        """
        tokens = int(self.counts.sum())
        if tokens == 0:
            raise ValueError("no tokens were counted: codebook use is undefined")
        used = int(torch.count_nonzero(self.counts))
        share = self.counts[self.counts > 0].double() / tokens  # [used]
        nats = float(-(share * share.log()).sum())
        # Seen as [high, bit k, low], the middle axis of the table is the value of bit k.
        ones = tuple(
            int(self.counts.view(-1, 2, 2**k)[:, 1].sum()) / tokens for k in range(self.bits)
        )
        return CodebookUse(
            bits=self.bits,
            tokens=tokens,
            num_codes=len(self.counts),
            used=used,
            dead=len(self.counts) - used,
            usage=used / len(self.counts),
            entropy_bits=max(nats, 0.0) / float(np.log(2)),
            perplexity=float(np.exp(max(nats, 0.0))),
            bit_ones=ones,
        )


def save_counts(path: Path, counts: CodebookCounts, tokens: str) -> None:
    """Write the counts of the index shards `tokens` as safetensors (docs/artifacts.md)."""
    facts = {"format": FORMAT, "version": VERSION, "tokens": tokens}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(save({"counts": counts.counts}, metadata=facts))
    os.replace(temporary, path)


def load_counts(path: Path) -> tuple[str, CodebookCounts]:
    """Return the name of the index shards and their counts, as written by `save_counts`."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
                raise ValueError(
                    f"{path}: {facts.get('format')} version {facts.get('version')}; "
                    f"expected {FORMAT} version {VERSION}"
                )
            table = file.get_tensor("counts")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    counts = CodebookCounts(len(table).bit_length() - 1)
    counts.counts += table
    return facts["tokens"], counts
