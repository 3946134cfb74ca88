from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from support.datasets import encoded, jpeg, picture

from sp_yolo.data.images import ImageFault, read_image, read_size


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_holds_for_size_and_pixels(tmp_path: Path, orientation: int, order: str) -> None:
    image = picture(30, 50)
    path = _write(tmp_path, "a.jpg", jpeg(image, orientation, order))
    # the eight rotations, written down from the EXIF standard: what brings the stored picture upright
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: image.transpose(1, 0, 2)[:, ::-1],
        7: image.transpose(1, 0, 2)[::-1, ::-1],
        8: image.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert read_size(path) == (upright.shape[1], upright.shape[0])
    assert np.abs(read_image(path).astype(int) - upright).mean() < 3


def test_every_kind_of_pixel_becomes_8_bit_bgr(tmp_path: Path) -> None:
    color = picture(20, 30)
    gray = color[..., 0]
    kinds = {
        "gray.png": (gray, np.repeat(gray[..., None], 3, 2)),
        "sixteen.png": (color.astype(np.uint16) * 257, color),
        "alpha.png": (np.dstack((color, np.full_like(gray, 9))), color),
        "plain.bmp": (color, color),
        "sixteen.tif": (color.astype(np.uint16) * 257, color),
        "lossless.webp": (color, color),
    }
    for name, (stored, expected) in kinds.items():
        options = [cv2.IMWRITE_WEBP_QUALITY, 101] if name.endswith("webp") else []
        path = _write(tmp_path, name, cv2.imencode(Path(name).suffix, stored, options)[1].tobytes())
        image = read_image(path)
        assert image.dtype == np.uint8 and image.shape == (20, 30, 3), name
        assert np.abs(image.astype(int) - expected).max() <= 1, name
        assert read_size(path) == (30, 20), name


def test_cmyk_jpeg_is_read_as_color(tmp_path: Path) -> None:
    # Pillow comes with torchvision; OpenCV cannot write CMYK
    from PIL import Image

    rgb = np.zeros((32, 48, 3), np.uint8)
    rgb[:] = (200, 30, 40)
    path = tmp_path / "cmyk.jpg"
    Image.fromarray(rgb).convert("CMYK").save(path, quality=95)
    image = read_image(path)
    assert image.shape == (32, 48, 3) and read_size(path) == (48, 32)
    blue, green, red = image.reshape(-1, 3).mean(0)
    assert red > 150 and blue < 110 and green < 110


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_file_cut_anywhere_is_refused_by_size_and_by_pixels(tmp_path: Path, suffix: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
    data = cv2.imencode(suffix, image)[1].tobytes()
    for length in (1, 9, 30, len(data) // 2, len(data) - 14):
        path = _write(tmp_path, "cut" + suffix, data[:length])
        with pytest.raises(ImageFault):
            read_size(path)
        with pytest.raises(ImageFault):
            read_image(path)


def test_a_thumbnail_does_not_hide_a_cut(tmp_path: Path) -> None:
    data = encoded(picture(24, 36))
    thumbnail = encoded(picture(12, 12))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = data[:2] + segment + data[2:]
    assert read_size(_write(tmp_path, "whole.jpg", whole)) == (36, 24)
    with pytest.raises(ImageFault, match="truncated"):
        read_size(_write(tmp_path, "cut.jpg", whole[:-20]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"hello, I am a text\n" * 20, "not an image"), (b"\xff\xd8\xff\xe0", "truncated")],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    path = _write(tmp_path, "a.jpg", content)
    with pytest.raises(ImageFault, match=reason):
        read_size(path)
    with pytest.raises(ImageFault, match=reason):
        read_image(path)


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageFault, match="no such file"):
        read_size(tmp_path / "none.jpg")
    with pytest.raises(ImageFault, match="cannot be read"):
        read_image(tmp_path)


def test_one_pixel_is_too_small_and_20000_are_not_too_many(tmp_path: Path) -> None:
    with pytest.raises(ImageFault, match="1 x 1 px is below 10"):
        read_size(_write(tmp_path, "one.png", cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()))
    wide = _write(tmp_path, "wide.png", cv2.imencode(".png", np.zeros((12, 20000, 3), np.uint8))[1].tobytes())
    assert read_size(wide) == (20000, 12)
    assert read_image(wide).shape == (12, 20000, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_follows_exif_and_keeps_the_longer_side(tmp_path: Path, orientation: int) -> None:
    path = _write(tmp_path, "a.jpg", jpeg(picture(300, 500), orientation))
    whole = read_image(path)
    for at_least, divisor in ((501, 1), (251, 1), (250, 2), (126, 2), (125, 4), (63, 4), (62, 8), (1, 8)):
        reduced = read_image(path, at_least)
        height, width = (-(-side // divisor) for side in whole.shape[:2])
        assert reduced.shape == (height, width, 3)
        exact = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(reduced - exact).mean() < 3


def test_only_a_jpeg_is_decoded_reduced(tmp_path: Path) -> None:
    color = picture(100, 150).astype(np.uint16) * 257
    path = _write(tmp_path, "a.png", cv2.imencode(".png", color)[1].tobytes())
    np.testing.assert_array_equal(read_image(path, 10), read_image(path))
    cut = _write(tmp_path, "cut.jpg", jpeg(picture(100, 150), 1)[:-100])
    with pytest.raises(ImageFault, match="truncated"):
        read_image(cut, 10)
