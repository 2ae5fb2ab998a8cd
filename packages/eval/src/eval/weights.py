"""Weights of the measuring networks: by path, from a cache, or downloaded once; always checked.

Looked for in this order: the path the user gives; the cache folder ($OMV2_CACHE, else
~/.cache/omv2); PyTorch's hub cache, where other tools may have left the same file; the network.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from tqdm import tqdm

DOWNLOAD_TIMEOUT_S = 10.0


class WeightsUnavailable(Exception):
    """There is no file of weights; the message says what to do. Metrics that need it are left
    out."""


@dataclass(frozen=True)
class PublicFile:
    """A published file of weights."""

    file: str  # name in the cache
    url: str
    sha256: str
    option: str  # the option that takes a path to it
    aliases: tuple[str, ...] = ()  # names of the same bytes in PyTorch's hub cache


@dataclass(frozen=True)
class Weights:
    """A state dict that was read, and where it came from."""

    state: dict[str, torch.Tensor]
    digest: str  # sha256:...
    official: bool  # whether these are the published bytes


# TensorFlow's Inception of 2015-12-05 (1008 classes), converted by pytorch-fid; torch-fidelity
# publishes the same bytes under another name.
INCEPTION = PublicFile(
    file="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    option="weights",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),
)
# The backbone of LPIPS "alex"; its linear layers come with the lpips package.
ALEXNET = PublicFile(
    file="alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    option="lpips_weights",
)


def load_weights(public: PublicFile, path: str | None, accelerator: Accelerator) -> Weights:
    """Read the weights from `path`, or from where `public` is found; every process must call it.

    Raises WeightsUnavailable, on all processes alike, if `path` is None and there is no such file;
    FileNotFoundError or ValueError if a file that was given is missing or cannot be read.
    """
    if path is not None:
        given = given_file(public, path)
        digest = file_sha256(given)
        return Weights(_read(given, public.option), f"sha256:{digest}", digest == public.sha256)
    found, failure = None, None
    with accelerator.local_main_process_first():
        try:
            found = _find(public) or _download(public)
        except WeightsUnavailable as error:
            failure = str(error)
    failures = [text for text in gather_object([failure]) if text is not None]
    if failures or found is None:
        raise WeightsUnavailable(failures[0])
    return Weights(_read(found, public.option), f"sha256:{public.sha256}", official=True)


def given_file(public: PublicFile, path: str) -> Path:
    """Return the file that the user gave for `public`; raise FileNotFoundError if it is absent."""
    given = Path(path).expanduser()
    if not given.is_file():
        raise FileNotFoundError(f"{public.option}={path}: no such file")
    return given


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the folder where downloaded weights are kept."""
    return Path(os.environ.get("OMV2_CACHE") or "~/.cache/omv2").expanduser()


def _find(public: PublicFile) -> Path | None:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    names = (public.file, *public.aliases)
    for candidate in [cache_folder() / public.file, *(hub / name for name in names)]:
        # A file that was cut short by an interrupted download is passed over, not believed.
        if candidate.is_file() and file_sha256(candidate) == public.sha256:
            return candidate
    return None


def _download(public: PublicFile) -> Path:
    """Download into the cache under a temporary name, check the digest, rename."""
    target = cache_folder() / public.file
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(public.url, timeout=DOWNLOAD_TIMEOUT_S) as reply:
            size = int(reply.headers.get("Content-Length", 0))
            bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=public.file)
            with temporary.open("wb") as stream, bar:
                while chunk := reply.read(1 << 20):
                    stream.write(chunk)
                    bar.update(len(chunk))
        if file_sha256(temporary) != public.sha256:
            raise OSError("the downloaded bytes have another sha256 than the published file")
        os.replace(temporary, target)
    # URLError and timeouts are OSErrors.
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise WeightsUnavailable(
            f"no weights: {public.file} is not in {target.parent} and could not be downloaded "
            f"({cause}); get {public.url} and give its path with {public.option}=PATH"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _read(path: Path, option: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise many kinds for a damaged file
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{option}={path}: not a readable state dict ({line})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{option}={path}: not a state dict of tensors")
    return state


def load_strictly(
    module: torch.nn.Module, state: dict[str, torch.Tensor], public: PublicFile
) -> None:
    """Load `state` into `module`; raise a one-line ValueError if names or shapes differ."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(
            f"{public.option}: these are not the weights of {public.file} ({details[:300]})"
        ) from None
