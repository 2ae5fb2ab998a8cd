"""Every kind of source gives the same pictures, once each, for any number of processes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from eval.media import open_index_shards, open_media


def read(source, batch_size=3, rank=0, world=1):
    batches = list(source.batches(batch_size, rank, world))
    images = [image.permute(1, 2, 0).numpy() for batch in batches for image in batch.images]
    keys = [key for batch in batches for key in batch.keys]
    labels = [int(label) for batch in batches for label in batch.cls]
    return images, keys, labels


def write_folder(root, images, names):
    for image, name in zip(images, names, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def test_folder_is_read_recursively_with_sub_folders_as_classes(tmp_path, pictures):
    images = pictures(3)
    names = ["b/2.png", "a/deep/1.png", "b/0.PNG"]
    source = open_media(str(write_folder(tmp_path, images, names)))
    assert source.class_names == ["a", "b"] and len(source) == 3
    found, keys, labels = read(source)
    assert keys == ["a/deep/1.png", "b/0.PNG", "b/2.png"] and labels == [0, 1, 1]
    np.testing.assert_array_equal(np.stack(found), images[[1, 2, 0]])


def test_pictures_of_several_sizes_are_batched_by_size_in_order(tmp_path, pictures):
    images = [*pictures(2, 32), *pictures(1, 40), *pictures(1, 32)]
    root = write_folder(tmp_path, images, [f"{i}.png" for i in range(4)])
    batches = list(open_media(str(root)).batches(4))
    assert [tuple(batch.images.shape) for batch in batches] == [
        (2, 3, 32, 32),
        (1, 3, 40, 40),
        (1, 3, 32, 32),
    ]
    assert [batch.start for batch in batches] == [0, 2, 3]


def test_grey_alpha_palette_and_cmyk_are_converted_and_counted(tmp_path, pictures):
    image = Image.fromarray(pictures(1)[0])
    for mode, name in [("L", "a.png"), ("RGBA", "b.png"), ("P", "c.png"), ("CMYK", "d.jpg")]:
        image.convert(mode).save(tmp_path / name)
    image.save(tmp_path / "e.png")
    source = open_media(str(tmp_path))
    found, _, _ = read(source)
    assert source.converted == {"L": 1, "RGBA": 1, "P": 1, "CMYK": 1}
    assert all(picture.shape == (32, 32, 3) for picture in found)
    np.testing.assert_array_equal(found[1], np.asarray(image))
    assert (found[0][..., 0] == found[0][..., 2]).all()


def test_linked_class_folders_are_read_and_hidden_files_are_not(tmp_path, pictures):
    write_folder(tmp_path / "elsewhere", pictures(2), ["0.png", "1.tif"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "set", pictures(2), ["dog/0.png", ".cache/0.png"])
    (tmp_path / "set" / "dog" / "._0.png").write_bytes(b"of another system")
    source = open_media(str(tmp_path / "set"))
    assert source.class_names == ["cat", "dog"]
    assert read(source)[1] == ["cat/0.png", "cat/1.tif", "dog/0.png"]


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_pictures_of_16_bits_are_refused_by_name(tmp_path, shape):
    path = tmp_path / "deep.png"
    if len(shape) == 2:
        Image.fromarray(np.full(shape, 40000, np.uint16)).save(path)
    else:  # PIL cannot write 16-bit colour, and reads it as 8-bit without a word
        path.write_bytes(_png_rgb16(shape))
    with pytest.raises(ValueError, match=r"deep\.png: more than 8 bits"):
        read(open_media(str(tmp_path)))
    path.unlink()
    kind = "P6" if len(shape) == 3 else "P5"
    (tmp_path / "deep.ppm").write_bytes(f"{kind} 8 8 65535\n".encode() + bytes(8 * 8 * 6))
    with pytest.raises(ValueError, match=r"deep\.ppm: more than 8 bits"):
        read(open_media(str(tmp_path)))


def _png_rgb16(shape):
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + b"\x9c\x40" * shape[1] * 3 for _ in range(shape[0]))
    header = struct.pack(">IIBBBBB", shape[1], shape[0], 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_broken_picture_is_named(tmp_path, pictures, content):
    write_folder(tmp_path, pictures(2), ["a.png", "b.png"])
    data = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as a picture"):
        read(open_media(str(tmp_path)))


def test_missing_and_empty_and_foreign_inputs_are_one_line_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        open_media(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no images"):
        open_media(str(tmp_path))
    with pytest.raises(ValueError, match="not a folder, an .npz file or a .tar file"):
        open_media(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="no field 'original'"):
        open_media(str(tmp_path), "original")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_in_ranges_with_its_labels(tmp_path, pictures, compressed):
    images = pictures(7)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "s.npz", images, np.arange(7) * 2)
    source = open_media(str(tmp_path / "s.npz"))
    assert len(source) == 7
    for rank in (1, 0):  # backwards as well
        found, _, labels = read(source, 2, rank, 2)
        expected = [i for i in range(7) if (i // 2) % 2 == rank]
        np.testing.assert_array_equal(np.stack(found), images[expected])
        assert labels == [2 * i for i in expected]


def test_wrong_npz_files_are_refused(tmp_path, pictures):
    np.savez(tmp_path / "float.npz", pictures(2).astype(np.float32))
    with pytest.raises(ValueError, match="arr_0 is float32"):
        open_media(str(tmp_path / "float.npz"))
    np.savez(tmp_path / "named.npz", images=pictures(2))
    with pytest.raises(ValueError, match="not an .npz file with an array arr_0"):
        open_media(str(tmp_path / "named.npz"))
    np.savez(tmp_path / "labels.npz", pictures(2), np.arange(3))
    with pytest.raises(ValueError, match="arr_1"):
        open_media(str(tmp_path / "labels.npz"))


def test_webdataset_is_read_like_the_webdataset_library_writes_it(tmp_path, pictures):
    images = pictures(5)
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(shard, 5, 2):
                writer.write({"__key__": f"d/{i:03d}", "png": Image.fromarray(images[i]), "cls": i})
    found, keys, labels = read(open_media(str(tmp_path)))
    assert keys == [f"d/{i:03d}.png" for i in (0, 2, 4, 1, 3)] and labels == [0, 2, 4, 1, 3]
    np.testing.assert_array_equal(np.stack(found), images[[0, 2, 4, 1, 3]])
    assert len(open_media(str(tmp_path / "1.tar"))) == 2


def test_webdataset_samples_without_one_image_are_refused(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "only_text", "txt": "x"})
    with pytest.raises(ValueError, match="sample only_text has 0 images"):
        open_media(str(tmp_path))


def test_a_sample_twice_in_a_tar_is_refused(tmp_path, pictures):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for image in pictures(2):
            writer.write({"__key__": "same", "png": Image.fromarray(image)})
    with pytest.raises(ValueError, match="holds same.png more than once"):
        open_media(str(tmp_path))


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_media_shards_give_each_field_with_classes_keys_and_indices(
    tmp_path, pictures, degraded, write_media, encoding
):
    images = pictures(11)
    folder = str(write_media(tmp_path, images, degraded(images), encoding=encoding))
    original, reconstruction = (open_media(folder, f) for f in ("original", "reconstruction"))
    found, keys, labels = read(original, 5)  # batches cross blocks and shards
    np.testing.assert_array_equal(np.stack(found), images)
    np.testing.assert_array_equal(np.stack(read(reconstruction, 5)[0]), degraded(images))
    assert labels == [i % 3 for i in range(11)] and keys[4] == "c1/00000004"
    assert open_media(folder).field == "original"
    expected = np.random.default_rng(5).integers(0, 2**10, (11, 1, 4, 4), dtype=np.uint32)[:, 0]
    indices = torch.cat([batch.indices for batch in original.batches(4)])
    assert indices.dtype == torch.int64
    np.testing.assert_array_equal(indices.numpy(), expected.astype(np.int64))


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_generated_media_shards_have_the_field_images(tmp_path, pictures, write_media, encoding):
    images = pictures(9)
    source = open_media(str(write_media(tmp_path, images, encoding=encoding)))
    np.testing.assert_array_equal(np.stack(read(source)[0]), images)
    assert next(iter(source.batches(2))).indices is None
    with pytest.raises(ValueError, match="no field 'original'; images have images"):
        open_media(str(tmp_path), "original")


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_all_pictures_without_duplicates(tmp_path, pictures, write_media, world):
    source = open_media(str(write_media(tmp_path, pictures(13))))
    shares = [read(source, 2, rank, world)[1] for rank in range(world)]
    together = [key for share in shares for key in share]
    assert sorted(together) == sorted(read(source)[1]) and len(set(together)) == 13


def test_a_batch_has_the_same_pictures_for_any_number_of_ranks(tmp_path, pictures, write_media):
    source = open_media(str(write_media(tmp_path, pictures(13))))
    alone = {batch.start: batch.keys for batch in source.batches(3)}
    shared = {b.start: b.keys for rank in range(4) for b in source.batches(3, rank, 4)}
    assert shared == alone


def test_unfinished_damaged_and_incomplete_shards_are_refused(tmp_path, pictures, write_media):
    folder = write_media(tmp_path / "m", pictures(12))
    shard = folder / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: \d+ bytes; the manifest says"):
        open_media(str(folder))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar: listed in the manifest"):
        open_media(str(folder))
    (folder / "manifest.json").unlink()
    (folder / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished"):
        open_media(str(folder))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 9, "version 9 is not known"),
        ("format", "other", "format 'other'"),
        ("source", None, "has no 'source'"),
        ("encoding", "jpg", "encoding 'jpg' is not one of"),
        ("num_samples", 5, "12 samples; the manifest says 5"),
    ],
)
def test_wrong_manifests_are_refused_by_name(
    tmp_path, pictures, write_media, field, value, message
):
    folder = write_media(tmp_path, pictures(12))
    manifest = json.loads((folder / "manifest.json").read_text()) | {field: value}
    if value is None:
        del manifest[field]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        open_media(str(folder))


def test_a_class_that_is_no_number_is_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        image = Image.new("RGB", (8, 8))
        writer.write({"__key__": "x", "png": image, "cls": b"cat"})
    with pytest.raises(ValueError, match="sample x has the class 'cat'"):
        read(open_media(str(tmp_path)))


def test_a_missing_member_of_a_png_sample_is_named(tmp_path, pictures, degraded, write_media):
    images = pictures(2)
    folder = write_media(tmp_path, images, degraded(images), encoding="png")
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar if "1.reconstruction" not in m.name]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["size"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"000000-000001 has no reconstruction\.png"):
        read(open_media(str(folder), "reconstruction"))


def test_index_shards_iterate_over_their_blocks(tmp_path):
    blocks = [np.arange(8, dtype=np.uint32).reshape(2, 1, 2, 2), np.full((1, 1, 2, 2), 2**18 - 1)]
    path = tmp_path / "shard-000000.tar"
    entries = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            stream = io.BytesIO()
            np.save(stream, block.astype(np.uint32))
            member = tarfile.TarInfo(f"{number:08d}.indices.npy")
            member.size = stream.tell()
            offset = tar.offset + 512
            stream.seek(0)
            tar.addfile(member, stream)
            entries.append({"num_samples": len(block), "offsets": {"indices": offset}})
    manifest = {
        "format": "omv2-index-shards",
        "version": 1,
        "tokenizer": {"id": "tokenizer", "digest": "sha256:" + "0" * 64},
        "source": {"name": "test"},
        "views": [{"name": "center"}],
        "codebook_bits": 18,
        "num_samples": 3,
        "class_names": None,
        "shards": [{"file": path.name, "size": path.stat().st_size, "blocks": entries}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shards = open_index_shards(str(tmp_path))
    assert len(shards) == 3 and shards.codebook_bits == 18
    for found, expected in zip(shards, blocks, strict=True):
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="token indices, not pictures"):
        open_media(str(tmp_path))


def test_media_shards_are_not_taken_for_index_shards(tmp_path, pictures, write_media):
    with pytest.raises(ValueError, match="not token indices"):
        open_index_shards(str(write_media(tmp_path, pictures(2))))
