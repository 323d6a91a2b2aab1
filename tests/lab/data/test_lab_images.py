"""Images: what the loaders give for each format, and what they say of files that are broken."""

import gzip
import zlib
from importlib import import_module

import numpy as np
import pytest
import torch
from data_files import readers_folder, write_idx, write_mnist, write_picture
from PIL import Image

from keelnorm.engine import optional_imports
from keelnorm.lab.data import DataError, digits, discover, images, limits, pictures, table
from keelnorm.lab.data.data_folder import reading_from
from keelnorm.lab.data.idx import read_idx, read_mnist
from keelnorm.lab.data.images import all_images
from keelnorm.lab.data.pictures import read_pictures


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_give_what_was_written(tmp_path, packed):
    written = [write_mnist(tmp_path, part, packed=packed, seed=seed) for seed, part in enumerate(("t10k", "train"))]
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        x, y = all_images(identity)
    assert x.shape == (80, 1, 28, 28)
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert torch.equal(x[:, 0], torch.tensor(np.concatenate([each[0] for each in written])).byte())
    assert torch.equal(y, torch.tensor(np.concatenate([each[1] for each in written])))


def test_a_division_of_the_readers_images(tmp_path):
    write_mnist(tmp_path)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        split, again, other = (images(identity, seed, centered=False) for seed in (0, 0, 1))
        assert images(identity, 0, train=7).train_x.shape[0] == 7
    parts = [len(part) for part in (split.train_x, split.validation_x, split.test_x)]
    assert parts == [20, 10, 10]  # a quarter each where there are few
    every = torch.cat([split.train_x, split.validation_x, split.test_x]).flatten(1)
    assert len(every.unique(dim=0)) == 40
    assert torch.equal(split.test_x, again.test_x)
    assert not torch.equal(split.test_x, other.test_x)
    assert 0 <= float(every.min()) < float(every.max()) <= 1


def test_images_that_were_read_once_are_not_read_again(tmp_path):
    write_mnist(tmp_path)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        first = images(identity, 0)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(images(identity, 0).train_x, first.train_x)


def test_the_digits_are_centered_by_their_training_part():
    split = digits(0)
    assert [len(part) for part in (split.train_y, split.validation_y, split.test_y)] == [1297, 200, 300]
    assert split.train_x.mean(dim=0).abs().max() < 1e-5
    assert float(split.train_x.square().mean()) == pytest.approx(1, rel=1e-4)
    raw = digits(0, centered=False)
    assert raw.train_x.shape[1:] == (1, 8, 8)
    assert float(raw.train_x.max()) == 1.0


@pytest.mark.parametrize("name", ["mist", "speech@00000000.6"])
def test_no_such_images(name):
    with pytest.raises(ValueError, match="there are digits, mnist, images"):
        images(name, 0)


def broken(tmp_path, change):
    write_mnist(tmp_path, packed=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    return [path, tmp_path / "t10k-labels-idx1-ubyte"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw[:-1], r"has 31375 bytes, and by its header 31376 \(40 x 28 x 28 values\); fetch it again"),
        (lambda raw: raw + b"\0", "has 31377 bytes, and by its header 31376"),
        (lambda raw: raw[:9], "has 9 bytes, and by its header"),
        (lambda raw: b"", "begins with nothing, and an IDX file"),
        (
            lambda raw: b"\0\0\x0d\x03" + raw[4:],
            "begins with 00000d03, and an IDX file of bytes in 3 dimensions .*00000803",
        ),
        (lambda raw: b"<html>no such file", "begins with 3c68746d"),
        (lambda raw: gzip.compress(raw)[:-20], r"can't be read \(.*\); fetch it again"),
        (lambda raw: b"\x1f\x8b" + raw, "can't be read"),
    ],
    ids=["short", "long", "header", "empty", "floats", "a page", "half packed", "badly packed"],
)
def test_a_broken_idx_file_is_named(tmp_path, change, says):
    with pytest.raises(DataError, match=f"t10k-images-idx3-ubyte {says}"):
        read_mnist(broken(tmp_path, change))


def packed_zeros(path, count):
    """A gzipped file of so many zeros, made piece by piece."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes([0, 0, 8, 3, 0, 0, 0, 40, 0, 0, 0, 28, 0, 0, 0, 28]))
        for _ in range(count >> 20):
            file.write(bytes(2**20))


def test_a_header_that_claims_too_much_is_refused_before_anything_is_unpacked(tmp_path, peak_bytes):
    header = bytes([0, 0, 8, 3]) + 3 * b"\0\0\x80\0"
    for content in (header, gzip.compress(header)):
        path = tmp_path / "t10k-images-idx3-ubyte"
        path.write_bytes(content)
        said = "has 32768 x 32768 x 32768 values by its header, and at most 1073741824 values are read; put a smaller"
        with pytest.raises(DataError, match=f"idx3-ubyte {said}"):
            read_idx(path, 3)
    assert peak_bytes() < 2**22


def test_what_is_packed_is_unpacked_no_further_than_its_header_says(tmp_path, peak_bytes):
    packed_zeros(tmp_path / "a-images-idx3-ubyte.gz", 2**26)
    with pytest.raises(DataError, match="has 31377 bytes or more, and by its header 31376 "):
        read_idx(tmp_path / "a-images-idx3-ubyte.gz", 3)
    assert peak_bytes() < 2**22


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent can't be read .*fetch it again"):
        read_idx(tmp_path / "absent", 1)


def test_images_and_labels_of_different_numbers(tmp_path):
    write_mnist(tmp_path, packed=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(39))
    with pytest.raises(DataError, match=r"has 40 images, and t10k-labels-idx1-ubyte 39 labels; fetch both again"):
        read_mnist(sorted(tmp_path.iterdir()))


def test_images_of_different_sizes(tmp_path):
    write_mnist(tmp_path, packed=False)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 8, 8)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte has images of 8 x 8 pixels, and t10k-.* of 28 x 28"):
        read_mnist(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif"])
def test_pictures_have_their_colours_and_their_folders_classes(tmp_path, suffix):
    colours = {"cat": (255, 0, 0), "dog": (0, 255, 51), "emu": (0, 0, 255)}
    for name, colour in colours.items():
        for number in range(2):
            write_picture(tmp_path / name / f"{number}.{suffix}", colour, side=50)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        x, y = all_images(identity)
    assert x.shape == (6, 3, 32, 32)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.tensor(list(colours.values()), dtype=torch.uint8)
    assert torch.equal(x, expected[y][:, :, None, None].expand_as(x))


def test_a_photograph_and_a_grey_picture_have_the_same_shape(tmp_path):
    large = Image.fromarray(np.linspace(0, 255, 300 * 400).reshape(300, 400).astype(np.uint8))
    (tmp_path / "a").mkdir()
    large.save(tmp_path / "a" / "grey.png")
    large.convert("RGB").save(tmp_path / "a" / "photo.jpg", quality=95)
    x = read_pictures(sorted((tmp_path / "a").iterdir()))[0].float() / 255
    assert x.shape == (2, 3, 32, 32)
    assert float((x[0] - x[1]).abs().max()) < 0.03  # JPEG is not exact
    rows = x[0, 0].mean(dim=1)  # it gets brighter from top to bottom
    assert bool((rows.diff() > 0).all())


def test_a_limit_on_classes_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_CLASSES", 2)
    monkeypatch.setattr(pictures, "MOST_PER_CLASS", 3)
    for place, name in enumerate(("a", "b", "c")):
        for number in range(2 + 2 * place):
            write_picture(tmp_path / name / f"{number}.png", (place, 0, 0))
    _, y = read_pictures(sorted(tmp_path.glob("*/*.png")))
    assert y.tolist() == [0, 0, 1, 1, 1]


def test_what_is_left_out_is_said(tmp_path, monkeypatch):
    for place in range(3):
        for number in range(2):
            write_picture(tmp_path / f"{place}" / f"{number}.png", (place, 0, 0))
    found = discover(tmp_path)
    assert limits(tmp_path, found) == []
    monkeypatch.setattr(import_module("keelnorm.lab.data.limits"), "MOST_CLASSES", 2)  # the function has its name
    [said] = limits(tmp_path, found)
    assert (
        said
        == f"{found[0]}: 4 of 6 pictures in 3 classes are used: the first 2 classes by name, the first 1000 of each"
    )


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut"])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, content):
    write_picture(tmp_path / "a" / "0.png", (9, 9, 9))
    path = tmp_path / "a" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(DataError, match=r"1\.png can't be decoded as a picture .*replace it, or remove it"):
        read_pictures(sorted((tmp_path / "a").iterdir()))


def png_that_claims(width, height):
    """The beginning of a picture, up to its first pixels."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return start + b"\0\0\0\x10IDAT"


@pytest.mark.parametrize(
    ("side", "says"), [(9000, "9000 x 9000 pixels"), (12000, "12000 x 12000 pixels"), (60000, "far more pixels")]
)
def test_a_picture_that_claims_too_many_pixels_is_not_decoded(tmp_path, side, says, peak_bytes):
    path = tmp_path / "big.png"
    path.write_bytes(png_that_claims(side, side))
    with pytest.raises(DataError, match=f"big.png has {says} by its header, and at most 67108864 pixels are read"):
        read_pictures([path])
    assert peak_bytes() < 2**22


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    write_picture(tmp_path / "a" / "0.png", (9, 9, 9))
    write_picture(tmp_path / "b" / "0.png", (9, 9, 9))
    monkeypatch.setattr(optional_imports, "find_spec", lambda name: None)
    for look in (lambda: read_pictures([tmp_path / "a" / "0.png"]), lambda: discover(tmp_path)):
        with pytest.raises(DataError, match=r"pictures need PIL: .*pip install .*'pillow>="):
            look()


def test_tables_come_raw_and_divided():
    for name, samples, columns, classes in (("wine", 178, 13, 3), ("cancer", 569, 30, 2)):
        split = table(name, 0)
        x = torch.cat([split.train_x, split.validation_x, split.test_x])
        assert x.shape == (samples, columns)
        assert len(x.unique(dim=0)) == samples
        assert split.classes == classes
        deviations = x.std(dim=0)
        assert float(deviations.max() / deviations.min()) > 1000
        assert not torch.equal(split.test_x, table(name, 1).test_x)
    with pytest.raises(ValueError, match="no table is called 'iris'; there are wine, cancer"):
        table("iris", 0)


def test_real_mnist():
    folder = readers_folder("mnist")
    [identity] = [each for each in discover(folder) if each.startswith("mnist@")]
    with reading_from(folder):
        split = images(identity, 0, centered=False)
    assert split.train_x.shape == (6000, 1, 28, 28)
    assert len(split.validation_y) == len(split.test_y) == 1000
    assert split.classes == 10
    # Ink lies in the middle, and the corners are empty.
    average = split.train_x.mean(dim=(0, 1))
    assert float(average[:3].max()) < 0.02 < 0.3 < float(average[12:16, 12:16].mean())
