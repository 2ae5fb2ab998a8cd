"""LPIPS against the lpips package with the same backbone weights."""

import lpips
import pytest
import torch
from accelerate import Accelerator
from torchvision.models import alexnet

from eval.perceptual import LpipsAlex


def test_lpips_equals_the_package_with_torchvisions_backbone(alexnet_file, pictures, degraded):
    images = pictures(3, 64)
    first, second = (
        torch.from_numpy(a).permute(0, 3, 1, 2).contiguous() for a in (images, degraded(images, 60))
    )
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    backbone = alexnet(weights=None)
    backbone.load_state_dict(torch.load(alexnet_file, weights_only=True))
    for piece in (reference.net.slice1, reference.net.slice2, reference.net.slice3):
        for name, layer in piece.named_children():
            layer.load_state_dict(backbone.features[int(name)].state_dict())
    for piece in (reference.net.slice4, reference.net.slice5):
        for name, layer in piece.named_children():
            layer.load_state_dict(backbone.features[int(name)].state_dict())
    with torch.no_grad():
        expected = reference(first / 255, second / 255, normalize=True).flatten()
    found = LpipsAlex(str(alexnet_file), Accelerator(cpu=True))(first, second)
    assert expected.min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_weights_are_refused_in_one_line(inception_file):
    with pytest.raises(
        ValueError, match="lpips_weights: these are not the weights of alexnet"
    ) as e:
        LpipsAlex(str(inception_file), Accelerator(cpu=True))
    assert "\n" not in str(e.value)


def test_the_protocol_names_weights_that_are_not_the_published_ones(alexnet_file):
    protocol = LpipsAlex(str(alexnet_file), Accelerator(cpu=True)).protocol
    assert protocol["name"] == "ours (custom weights)"
    assert protocol["extractor"] == "lpips 0.1 alex (custom weights)"


def test_pictures_too_small_for_alexnet_are_refused(alexnet_file):
    small = torch.zeros(1, 3, 30, 64, dtype=torch.uint8)
    meter = LpipsAlex(str(alexnet_file), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="30x64: LPIPS needs 31 pixels"):
        meter(small, small)
    assert meter(small.new_zeros(1, 3, 31, 31), small.new_zeros(1, 3, 31, 31)).item() == 0
