"""Every odd kind of picture, and the views that are cut from a good one."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.data.pictures import UnreadablePicture, decode_picture
from tokenizer.data.views import CENTER, FLIP, View, cut, parse_views


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(decode_picture(data, exif_orientation=True))


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_rgb_is_unchanged():
    image = noise(5, 7)
    assert np.array_equal(decode(encoded(image, "PNG")), np.asarray(image))


def test_grey_and_one_bit_become_rgb():
    grey = Image.new("L", (4, 3), 77)
    assert (decode(encoded(grey, "PNG")) == 77).all()
    assert decode(encoded(grey, "PNG")).shape == (3, 4, 3)
    assert (decode(encoded(Image.new("1", (4, 3), 1), "PNG")) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(mode):
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black on white is 204
    assert decode(encoded(image.convert(mode), "PNG"))[0].tolist() == [[255] * 3, [204] * 3]


def test_a_transparent_palette_colour_is_put_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    plain = decode(encoded(image, "PNG"))
    assert plain[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    keyed = decode(encoded(image, "PNG", transparency=0))
    assert keyed[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow make red
    red, green, blue = decode(encoded(image, "JPEG"))[4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    pixels = decode(encoded(Image.fromarray(values), "PNG"))
    assert pixels[0, :, 0].tolist() == [0, 1, 100, 255]
    assert pixels.shape == (1, 4, 3)


def test_exif_orientation_is_followed_only_where_asked():
    image = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    data = encoded(image, "PNG", exif=exif)
    assert np.array_equal(decode(data), np.rot90(np.asarray(image), k=-1))
    plain = decode_picture(data, exif_orientation=False)
    assert np.array_equal(np.asarray(plain), np.asarray(image))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_content_counts_rather_than_name():
    assert decode(encoded(noise(3, 3), "WEBP", lossless=True)).shape == (3, 3, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not a picture"),
        (encoded(noise(64, 64), "JPEG")[:2000], "truncated"),
        (encoded(noise(64, 64), "PNG")[:6000], "truncated"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point pixels"),
        (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "more than 16 bits per pixel"),
        (encoded(Image.new("RGB", (330, 10)), "PNG"), "longer than 32 times its width"),
    ],
)
def test_what_cannot_be_used_has_a_reason(data, reason):
    with pytest.raises(UnreadablePicture, match=reason):
        decode(data)


def test_more_pixels_than_pillow_allows_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UnreadablePicture, match="too many pixels"):
        decode(encoded(noise(10, 10), "PNG"))


def resized_by_pillow(image: Image.Image, side: int) -> np.ndarray:
    scale = side / min(image.size)
    size = (int(image.width * scale), int(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def channels_last(view: torch.Tensor) -> np.ndarray:
    return view.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (7, 5), (1, 1)])
def test_the_centre_view_is_pillows_resize_and_crop(size):
    image = noise(*size)
    whole = resized_by_pillow(image, 32)
    top, left = (round((side - 32) / 2) for side in whole.shape[:2])
    view = cut(image, CENTER, resolution=32, resize=32, seed=0)
    assert view.dtype == torch.uint8 and view.is_contiguous()
    assert np.array_equal(channels_last(view), whole[top : top + 32, left : left + 32])
    mirrored = cut(image, FLIP, resolution=32, resize=32, seed=0)
    assert torch.equal(mirrored, view.flip(2))


def test_random_views_are_windows_that_depend_on_the_seed_alone():
    image = noise(50, 60)
    whole = resized_by_pillow(image, 40)
    random = View("random", random_crop=True)
    places = set()
    for seed in range(300):
        view = channels_last(cut(image, random, resolution=32, resize=40, seed=seed))
        found = [
            (top, left)
            for top in range(9)
            for left in range(17)
            if np.array_equal(whole[top : top + 32, left : left + 32], view)
        ]
        assert len(found) == 1
        places.update(found)
        again = channels_last(cut(image, random, resolution=32, resize=40, seed=seed))
        assert np.array_equal(view, again)
    assert {top for top, _ in places} == set(range(9))
    assert {left for _, left in places} == set(range(17))


def test_half_of_the_training_views_are_mirrored_where_asked():
    image = noise(8, 8)
    view = View("train", mirror=0.5)
    plain = cut(image, CENTER, resolution=8, resize=8, seed=0)
    views = [cut(image, view, resolution=8, resize=8, seed=seed) for seed in range(400)]
    mirrored = sum(torch.equal(view, plain.flip(2)) for view in views)
    assert 160 < mirrored < 240
    assert all(torch.equal(v, plain) or torch.equal(v, plain.flip(2)) for v in views)


def test_views_are_parsed_with_consecutive_seeds():
    views = parse_views(["center", "random:2", "flip", "random"], seed=5)
    assert [view.to_json() for view in views] == [
        {"name": "center"},
        {"name": "random", "seed": 5},
        {"name": "random", "seed": 6},
        {"name": "flip"},
        {"name": "random", "seed": 7},
    ]


@pytest.mark.parametrize(
    "names", [["centre"], ["random:0"], ["random:x"], [], ["center", "center"], ["flip:2"]]
)
def test_unknown_views_are_refused(names):
    with pytest.raises(ValueError, match="views"):
        parse_views(names, seed=0)
