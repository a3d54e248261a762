import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vr.data.image_error import UnsuitableImageError
from lightning_vr.data.image_formats import open_image
from lightning_vr.data.pixels import is_transparent, parse_colour, scaled, to_pixels, to_tensor
from tests.support.images import random_picture

RED = (200, 30, 0)


def with_alpha(seed=0, size=10):
    """A colour image whose alpha takes all values, 0 and 255 often."""
    source = np.random.default_rng(seed)
    alpha = source.integers(-200, 456, (size, size)).clip(0, 255).astype(np.uint8)
    image = random_picture(seed, size, size)
    image.putalpha(Image.fromarray(alpha))
    return image


def composited(rgba, background):
    """A second formula: ``round(alpha * colour + (1 - alpha) * background)`` as (3, H, W)."""
    rgba = np.asarray(rgba.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.rint(alpha * rgba[..., :3] + (1 - alpha) * np.array(background)).transpose(2, 0, 1)


def saved(image, kind, **options):
    """An image as it is opened from a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return open_image(file, None)


def png(depth, colour_type, row, transparent=b"", width=4):
    """A PNG of one row, as Pillow does not write it."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    chunks = [
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(b"\0" + row)),
        chunk(b"IEND", b""),
    ]
    if transparent:
        chunks.insert(1, chunk(b"tRNS", transparent))
    return open_image(BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)), None)


class TestOpaque:
    def test_pixels_of_an_image_of_the_right_size_are_scaled_exactly(self):
        image = random_picture(0, 10, 10)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        actual = to_tensor(image, 10, 3)
        assert torch.equal(actual, expected)
        assert actual.dtype == torch.float32
        assert actual.min() >= -1
        assert actual.max() <= 1

    @pytest.mark.parametrize(("width", "height"), [(10, 4), (4, 10), (5, 4)])
    def test_center_square_is_what_remains(self, width, height):
        pixels = np.array(random_picture(1, width, height))
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        expected = torch.from_numpy(pixels[top : top + side, left : left + side] / 127.5 - 1)
        torch.testing.assert_close(
            to_tensor(Image.fromarray(pixels), side, 3), expected.permute(2, 0, 1).float()
        )

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_shrinking_averages(self, dtype):
        stripes = np.zeros((64, 64), dtype=dtype)
        stripes[:, ::2] = np.iinfo(dtype).max
        shrunk = to_tensor(Image.fromarray(stripes), 8, 3)
        assert shrunk.shape == (3, 8, 8)
        assert shrunk.abs().max() < 0.1

    def test_a_constant_image_stays_constant_when_it_grows(self):
        grown = to_tensor(Image.new("RGB", (3, 3), (0, 51, 255)), 9, 3)
        expected = torch.tensor([-1.0, -0.6, 1.0])[:, None, None].expand(3, 9, 9)
        torch.testing.assert_close(grown, expected)

    def test_grey_from_colour_and_colour_from_grey(self):
        assert to_tensor(random_picture(2), 10, 1).shape == (1, 10, 10)
        grey = to_tensor(random_picture(2, 10, 10).convert("L"), 10, 3)
        assert torch.equal(grey[0], grey[1])
        assert torch.equal(grey[0], grey[2])
        assert torch.equal(grey[:1], to_tensor(random_picture(2, 10, 10), 10, 1))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_every_mode_becomes_the_colours_that_it_shows(self, mode, channels):
        colours = random_picture(3, 8, 8)
        if mode == "LAB":
            colours = Image.new("LAB", (8, 8), (120, 128, 128))
        image = colours if mode == "LAB" else colours.convert(mode)
        shown = image.convert("RGB")
        expected = {1: shown.convert("L"), 3: shown, 4: shown.convert("RGBA")}[channels]
        pixels = np.asarray(expected).reshape(8, 8, channels).transpose(2, 0, 1)
        assert np.array_equal(to_pixels(image, 8, channels, RED), pixels)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_image_is_turned_as_its_exif_record_says(self, kind, orientation):
        quarters = np.zeros((16, 16, 3), dtype=np.uint8)
        quarters[:8, :8], quarters[:8, 8:], quarters[8:, :8] = 250, 170, 90
        exif = Image.new("L", (1, 1)).getexif()
        exif[0x0112] = orientation
        image = saved(Image.fromarray(quarters), kind, exif=exif)
        found = to_pixels(image, 16, 1)[0][4::8, 4::8].astype(int).tolist()
        upright = {
            1: [[250, 170], [90, 0]],
            2: [[170, 250], [0, 90]],
            3: [[0, 90], [170, 250]],
            4: [[90, 0], [250, 170]],
            5: [[250, 90], [170, 0]],
            6: [[90, 250], [0, 170]],
            7: [[0, 170], [90, 250]],
            8: [[170, 0], [250, 90]],
        }[orientation]
        np.testing.assert_allclose(found, upright, atol=6)

    def test_broken_exif_record_turns_nothing(self):
        image = saved(random_picture(4, 8, 8), "JPEG", exif=b"Exif\0\0no record", quality=100)
        assert to_pixels(image, 8, 3).shape == (3, 8, 8)

    def test_animation_gives_its_first_frame(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, "blue", "lime")]
        for kind in ("GIF", "PNG", "WEBP"):
            options = {"save_all": True, "append_images": frames[1:]}
            options |= {"lossless": True} if kind == "WEBP" else {}
            found = to_pixels(saved(frames[0], kind, **options), 8, 3)
            assert np.array_equal(found, np.array(RED)[:, None, None].repeat(8, 1).repeat(8, 2))


class TestTransparent:
    @pytest.mark.parametrize("background", [(255, 255, 255), RED])
    def test_colour_is_composited_on_the_background(self, background):
        image = with_alpha()
        expected = composited(image, background)
        assert np.array_equal(to_pixels(image, 10, 3, background), expected)

    def test_white_is_the_default(self):
        hidden = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
        for channels in (1, 3):
            assert torch.equal(to_tensor(hidden, 4, channels), torch.ones(channels, 4, 4))

    def test_what_lies_under_the_transparency_changes_nothing(self):
        one, other = with_alpha(0), with_alpha(0)
        colours = np.array(other)
        colours[colours[..., 3] == 0, :3] = 77
        other = Image.fromarray(colours)
        assert not np.array_equal(np.array(one), colours)
        for channels in (1, 3, 4):
            for size in (5, 10):
                first, second = (to_pixels(x, size, channels, RED) for x in (one, other))
                assert np.array_equal(first, second)

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa"])
    def test_other_modes_with_alpha_are_what_they_show(self, mode, channels):
        image = {"PA": lambda: with_alpha().quantize(16).convert("PA")}.get(mode)
        image = with_alpha() if image is None else image()
        for step in {"LA": ["LA"], "La": ["LA", "La"], "PA": [], "RGBa": ["RGBa"]}[mode]:
            image = image.convert(step)
        shown = image.convert("LA") if mode == "La" else image
        shown = shown.convert("RGBA")
        assert image.mode == mode
        assert np.array_equal(to_pixels(image, 10, channels), to_pixels(shown, 10, channels))

    @pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
    def test_files_with_transparency_are_composited(self, kind):
        half = np.zeros((8, 8, 4), dtype=np.uint8)
        half[:, :4] = (0, 0, 255, 255)
        options = {"lossless": True} if kind == "WEBP" else {}
        found = to_pixels(saved(Image.fromarray(half), kind, **options), 8, 3, RED)
        assert np.array_equal(found[:, 0, 0], (0, 0, 255))
        assert np.array_equal(found[:, 0, 7], RED)

    @pytest.mark.parametrize("transparency", [1, bytes([255, 0, 100])])
    def test_palette_with_transparency_is_composited_without_a_warning(self, transparency):
        image = Image.new("P", (4, 4))
        image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
        image.putdata([0, 1, 2, 0] * 4)
        image = saved(image, "PNG", transparency=transparency)
        assert image.mode == "P"
        found = to_pixels(image, 4, 3, RED)
        third = transparency[2] if isinstance(transparency, bytes) else 255
        expected = [
            (250, 0, 0),
            RED,
            np.rint(np.array([0, 0, 250]) * third / 255 + np.array(RED) * (1 - third / 255)),
        ]
        np.testing.assert_array_equal(found[:, 0, :3].T, expected)

    @pytest.mark.parametrize(
        ("image", "shown"),
        [
            (lambda: png(1, 0, bytes([0b01010000]), b"\0\1"), [0, None, 0, None]),
            (lambda: png(2, 0, bytes([0b00011011]), b"\0\2"), [0, 85, None, 255]),
            (lambda: png(4, 0, bytes([0x0F, 0x3F]), b"\0\3"), [0, 255, None, 255]),
            (lambda: png(8, 0, bytes([0, 3, 200, 255]), b"\0\3"), [0, None, 200, 255]),
        ],
        ids=["1 bit", "2 bits", "4 bits", "8 bits"],
    )
    def test_transparent_value_of_grey_is_found_whatever_its_bits(self, image, shown):
        image = image()
        red = to_pixels(image.crop((0, 0, 4, 1)).resize((4, 4), 0), 4, 3, RED)
        assert is_transparent(image)
        expected = [RED if value is None else (value,) * 3 for value in shown]
        np.testing.assert_array_equal(red[:, 0].T, expected)

    def test_transparent_colour_of_16_bits_is_found(self):
        row = struct.pack(">6H", 0, 0, 0, 60000, 257, 65535)
        image = png(16, 2, row, struct.pack(">3H", 60000, 257, 65535), width=2)
        found = to_pixels(image.crop((1, 0, 2, 1)), 1, 3, RED)
        assert found.reshape(3).tolist() == list(RED)

    def test_four_channels_keep_colour_and_alpha(self):
        image = with_alpha()
        found, expected = to_pixels(image, 10, 4, RED), np.array(image).transpose(2, 0, 1)
        seen = expected[3] > 0
        assert 0 < seen.sum() < seen.size
        assert np.array_equal(found[3], expected[3])
        assert np.array_equal(found[:, seen], expected[:, seen])
        assert (found[:3, ~seen] == np.array(RED)[:, None]).all()
        assert (to_pixels(random_picture(1, 8, 8), 8, 4)[3] == 255).all()

    def test_averages_of_four_channels_weight_colours_by_alpha(self):
        image = Image.new("RGBA", (16, 16), (0, 0, 255, 0))
        image.paste((200, 0, 0, 255), (0, 0, 16, 4))
        shrunk = to_pixels(image, 2, 4)
        top = shrunk[:, 0, 0].astype(int)
        assert 0 < top[3] < 255
        np.testing.assert_allclose(top[:3], (200, 0, 0), atol=3)

    def test_opaque_images_are_not_called_transparent(self):
        assert is_transparent(with_alpha())
        assert not is_transparent(random_picture(0).convert("RGBA"))
        assert not is_transparent(random_picture(0))


class TestDeep:
    GREY = np.arange(0, 65536, 257 * 16 + 3, dtype=np.uint16)[:16].reshape(4, 4)

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_16_bits_are_scaled_by_65535_and_kept(self, kind, channels):
        found = to_tensor(saved(Image.fromarray(self.GREY), kind), 4, channels)
        expected = torch.from_numpy(self.GREY / 32767.5 - 1).float()
        for plane in found[:3]:
            torch.testing.assert_close(plane, expected, rtol=0, atol=1e-6)
        assert channels < 4 or (found[3] == 1).all()

    def test_big_endian_values_are_the_same(self):
        image = saved(Image.fromarray(self.GREY), "TIFF")
        swapped = Image.frombytes("I;16B", (4, 4), self.GREY.byteswap().tobytes())
        assert np.array_equal(to_pixels(swapped, 4, 1), to_pixels(image, 4, 1))

    def test_resizing_agrees_with_that_of_8_bits(self):
        grey = random_picture(5, 32, 32).convert("L")
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        for size in (8, 50):
            torch.testing.assert_close(
                to_tensor(deep, size, 1), to_tensor(grey, size, 1), rtol=0, atol=2 / 127.5
            )

    def test_image_is_turned(self):
        exif = Image.new("L", (1, 1)).getexif()
        exif[0x0112] = 3
        image = saved(Image.fromarray(self.GREY), "PNG", exif=exif)
        assert np.array_equal(to_pixels(image, 4, 1)[0], self.GREY[::-1, ::-1])

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_transparent_value_is_composited(self, channels):
        image = png(16, 0, struct.pack(">4H", 0, 1000, 60000, 65535), struct.pack(">H", 60000))
        assert is_transparent(image)
        found = to_pixels(image.crop((2, 0, 3, 1)), 1, channels, RED).reshape(channels)
        shown = Image.new("RGB", (1, 1), RED).convert("L" if channels == 1 else "RGB")
        expected = [*np.asarray(shown, dtype=int).reshape(-1) * 257, 0][:channels]
        assert found.tolist() == expected

    def test_fewer_bits_and_white_as_zero_of_a_tiff_are_heeded(self):
        for tags, expected in (({258: (12,)}, [0, 65535]), ({262: 0}, [65535, 61440])):
            image = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
            image.tag_v2 = tags
            values = [to_pixels(_cropped(image, left), 1, 1).item() for left in (0, 1)]
            assert values == expected

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_numbers_of_unknown_range_are_refused(self, dtype):
        for kind in (None, "TIFF"):
            image = Image.fromarray(np.zeros((4, 4), dtype=dtype))
            image = image if kind is None else saved(image, kind)
            with pytest.raises(UnsuitableImageError, match="whose black and white are not known"):
                to_tensor(image, 4, 1)


def _cropped(image, left):
    part = image.crop((left, 0, left + 1, 1))
    part.tag_v2 = image.tag_v2
    return part


def test_both_depths_span_the_same_range():
    for dtype in (np.uint8, np.uint16):
        ends = np.array([0, np.iinfo(dtype).max], dtype=dtype)
        assert scaled(ends).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("white", (255, 255, 255)),
        ("#0a141e", (10, 20, 30)),
        ([10, 20, 30], (10, 20, 30)),
        ((np.uint8(10), 20, 30), (10, 20, 30)),
        ("rgb(10, 20, 30)", (10, 20, 30)),
    ],
)
def test_colours_are_names_codes_and_numbers(value, expected):
    assert parse_colour("background", value) == expected


@pytest.mark.parametrize(
    "value", ["whit", "#00000000", [1, 2], [1.0, 1.0, 1.0], [0, 0, 256], [-1, 0, 0], None, 3, ""]
)
def test_other_colours_are_refused(value):
    with pytest.raises(ValueError, match="`background` must be the name of a colour, '#rrggbb'"):
        parse_colour("background", value)
