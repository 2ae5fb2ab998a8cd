"""Where weights come from, and that wrong ones never pass for the published ones."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from eval.weights import INCEPTION, PublicFile, WeightsUnavailable, cache_folder, load_weights


@pytest.fixture
def published(tmp_path):
    """A small published file behind a file:// address."""
    path = tmp_path / "server" / "toy.pth"
    path.parent.mkdir()
    torch.save({"w": torch.arange(3.0)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PublicFile("toy.pth", path.as_uri(), digest, "toy_weights", ("other-name.pth",))


def load(public, path=None):
    return load_weights(public, path, Accelerator(cpu=True))


def server_file(published):
    return Path(published.url.removeprefix("file://"))


def test_a_download_goes_to_the_cache_and_is_used_again(published):
    weights = load(published)
    assert weights.official and weights.state["w"].tolist() == [0, 1, 2]
    assert weights.digest == f"sha256:{published.sha256}"
    server_file(published).unlink()
    assert load(published).official
    assert [file.name for file in cache_folder().iterdir()] == ["toy.pth"]


def test_a_half_downloaded_file_in_the_cache_is_replaced(published):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "toy.pth").write_bytes(server_file(published).read_bytes()[:100])
    assert load(published).official


def test_the_hub_cache_of_other_tools_is_used(published):
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    hub.mkdir(parents=True)
    server_file(published).rename(hub / "other-name.pth")
    assert load(published).official


def test_downloaded_bytes_with_another_digest_are_never_used(published):
    wrong = dataclasses.replace(published, sha256="0" * 64)
    with pytest.raises(WeightsUnavailable, match="another sha256"):
        load(wrong)
    assert list(cache_folder().iterdir()) == []


def test_without_cache_and_network_the_message_says_what_to_do():
    with pytest.raises(WeightsUnavailable) as error:
        load(INCEPTION)
    message = str(error.value)
    assert INCEPTION.url in message and "weights=PATH" in message and "\n" not in message


def test_a_given_path_is_used_and_called_unofficial_if_it_is(published, tmp_path):
    assert load(published, str(server_file(published))).official
    save_file({"w": torch.ones(2)}, tmp_path / "mine.safetensors")
    weights = load(published, str(tmp_path / "mine.safetensors"))
    assert not weights.official and weights.state["w"].tolist() == [1, 1]


def test_a_given_path_that_is_wrong_is_a_user_error(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="toy_weights=/nowhere: no such file"):
        load(published, "/nowhere")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="toy_weights=.*junk.pth: not a readable state dict"):
        load(published, str(tmp_path / "junk.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a state dict of tensors"):
        load(published, str(tmp_path / "list.pth"))


def test_pickled_code_in_weights_is_not_run(published, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable state dict"):
        load(published, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()
