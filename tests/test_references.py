"""Pictures in every form a user has them: the right result, or one sentence."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from klein_cns.klein.references import load_picture, prepare_reference, to_image, to_pixels
from PIL import Image

RAMP = np.linspace(0, 255, 64 * 96).reshape(64, 96)


def save(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_modes(tmp_path, photo):
    assert np.array_equal(load_picture(save(tmp_path, photo)), photo)
    gray = Image.fromarray(RAMP.astype(np.uint8))
    assert np.array_equal(load_picture(save(tmp_path, gray)), gray.convert("RGB"))
    sixteen = Image.fromarray((RAMP * 257).astype(np.uint16))
    assert sixteen.mode.startswith("I;16")
    found = np.asarray(load_picture(save(tmp_path, sixteen)), dtype=int)
    assert np.abs(found - RAMP[..., None]).max() <= 1
    dim = Image.fromarray(np.full((8, 8), 200, dtype=np.int32))
    assert np.asarray(load_picture(save(tmp_path, dim, "dim.tif"))).max() == 200
    with pytest.raises(ValueError, match="beyond 16 bits"):
        load_picture(save(tmp_path, Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), "deep.tif"))
    cmyk = np.asarray(load_picture(save(tmp_path, photo.convert("CMYK"), "picture.tif")), dtype=int)
    assert np.abs(cmyk - np.asarray(photo, dtype=int)).mean() < 2
    palette = np.asarray(load_picture(save(tmp_path, photo.quantize(256))), dtype=int)
    assert np.abs(palette - np.asarray(photo, dtype=int)).mean() < 10
    with pytest.raises(ValueError, match="floating-point values"):
        load_picture(save(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "picture.tif"))


def test_transparency_is_laid_on_white(tmp_path, photo):
    rgba = photo.convert("RGBA")
    rgba.putalpha(0)
    assert np.asarray(load_picture(save(tmp_path, rgba))).min() == 255
    rgba.putalpha(255)
    assert np.array_equal(load_picture(save(tmp_path, rgba)), photo)
    half = Image.new("LA", (8, 8), (0, 128))
    assert np.asarray(load_picture(save(tmp_path, half))).mean() == pytest.approx(127, abs=1)


def test_exif_rotation_is_applied(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned = load_picture(save(tmp_path, photo, exif=exif))
    assert turned.size == (300, 451)
    assert np.array_equal(turned, photo.transpose(Image.Transpose.ROTATE_270))


def test_data_uri(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert np.array_equal(load_picture(uri), photo)
    for broken, says in (
        (uri[:40] + "!", "no valid base64"),
        ("data:image/png,abc", "no base64 part"),
        (uri[: 22 + 200], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=says):
            load_picture(broken)


def test_unreadable_files_are_named(tmp_path, photo):
    whole = save(tmp_path, photo).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name, says in (
        ("cut.png", "cannot be read"),
        ("empty.png", "is empty"),
        ("text.png", r"cannot be read \(its content is not a known picture format\); give a whole"),
        ("missing.png", "does not exist"),
    ):
        with pytest.raises(ValueError, match=rf"picture .*{name} {says}.*(PNG|again)"):
            load_picture(tmp_path / name)
    with pytest.raises(ValueError, match="is a web address; download it"):
        load_picture("https://example.com/cat.png")


@pytest.mark.parametrize("size", [(451, 300), (1, 1), (16, 16), (3000, 300), (1025, 1024), (5000, 3333)])
def test_references_shrink_keep_their_aspect_and_are_padded_at_the_far_edges(size, seed):
    width, height = size
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    out = prepare_reference(pixels, 1.0)
    assert out.shape[-1] % 16 == 0 and out.shape[-2] % 16 == 0
    assert out.shape[-1] * out.shape[-2] <= 1024 * 1024 + 16 * sum(out.shape[-2:])
    if width * height <= 1024 * 1024:
        assert torch.equal(out[..., :height, :width], pixels)  # nothing is resized or moved
        assert out.shape[-2:] == (-(-height // 16) * 16, -(-width // 16) * 16)
        assert torch.equal(out[..., -1, :width], pixels[..., -1, :])
        assert torch.equal(out[..., :height, -1], pixels[..., :, -1])
    else:
        assert out.shape[-1] / out.shape[-2] == pytest.approx(width / height, rel=0.03)


def test_pixels_and_back(photo):
    assert np.array_equal(to_image(to_pixels(photo)[0]), photo)
