"""Makes a folder of images that break careless readers, and says what must become of each.

    hostile_images.py OUT

OUT is a source of format `directory`. OUT/expected.json maps each image (its path, which is its id) to the `status` that its
row in `latents` must have: `ok`, or the code of a reject. What is `ok` must also have the pixels that Pillow reads; that is
what reference_scores.py compares. OUT/notes.txt and OUT/.hidden.png must not become rows at all.
"""

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
ORIENTATION = 0x0112


def picture(seed: int) -> Image.Image:
    """A smooth color picture without symmetry, so that any turn or swap of it is another picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x / random.uniform(5, 20) + y / random.uniform(5, 20)) for _ in range(3)]
    pixels = np.stack(waves, axis=-1) * 60 + 120 + x[..., None] / 2 - y[..., None] / 3
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels: a decompression bomb before it goes off."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def turned(orientation: int) -> bytes:
    """A JPEG with an EXIF orientation: 1 is upright, 2 to 8 are the other turns and mirrorings."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(picture(1), "JPEG", quality=95, subsampling=0, exif=exif)


def good_images() -> dict[str, bytes]:
    rgb = picture(0)
    gray = rgb.convert("L")
    gray16 = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    with_alpha = rgb.copy()
    with_alpha.putalpha(gray.rotate(180))
    palette = rgb.quantize(64)
    return {
        "plain.png": encode(rgb, "PNG"),
        "gray.png": encode(gray, "PNG"),
        "gray_16_bit.png": encode(gray16, "PNG"),
        "gray_16_bit.tiff": encode(gray16, "TIFF"),
        "bilevel.png": encode(rgb.convert("1"), "PNG"),
        "gray_alpha.png": encode(with_alpha.convert("LA"), "PNG"),
        "rgb_alpha.png": encode(with_alpha, "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(palette, "PNG", transparency=3),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "progressive.jpg": encode(rgb, "JPEG", quality=95, progressive=True),
        "gray.jpg": encode(gray, "JPEG", quality=95),
        "bytes_after_the_end.jpg": encode(rgb, "JPEG", quality=95) + bytes(100),
        "animated.gif": encode(palette, "GIF", save_all=True, append_images=[picture(2).quantize(64)], duration=100),
        "lossless.webp": encode(rgb, "WEBP", lossless=True),
        "lossy.webp": encode(rgb, "WEBP", quality=90),
        "plain.bmp": encode(rgb, "BMP"),
        "deflate.tiff": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "lzw.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "one_pixel.png": encode(rgb.crop((0, 0, 1, 1)), "PNG"),
        "one_row.png": encode(rgb.crop((0, 0, WIDTH, 1)).resize((20_000, 1)), "PNG"),
        "png_named.jpg": encode(rgb, "PNG"),
        "UPPER.PNG": encode(rgb, "PNG"),
        "folder/deeper/nested.png": encode(rgb, "PNG"),
        "späte Zelle 100%+#1.png": encode(rgb, "PNG"),
    } | {f"exif_orientation_{orientation}.jpg": turned(orientation) for orientation in range(1, 9)}


def bad_images() -> dict[str, tuple[str, bytes]]:
    rgb = picture(0)
    jpeg, png = encode(rgb, "JPEG", quality=95), encode(rgb, "PNG")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        "truncated.jpg": ("truncated_image", jpeg[: len(jpeg) * 2 // 3]),
        "truncated.png": ("truncated_image", png[: len(png) * 2 // 3]),
        "header_only.jpg": ("truncated_image", jpeg[:20]),
        "damaged.png": ("corrupt_image", bytes(damaged)),
        "no_bytes.jpg": ("empty", b""),
        "text.jpg": ("unknown_format", b"404 Not Found: the page you are looking for has moved.\n"),
        "vector.png": ("unknown_format", b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'),
        "bomb.png": ("too_many_pixels", png_of_size(50_000, 50_000)),
        "long.png": ("side_too_long", png_of_size(2**24, 1)),
        "float.tiff": ("unsupported_image", encode(rgb.convert("L").convert("F"), "TIFF")),
    }


def main(out: Path) -> str:
    good, bad = good_images(), bad_images()
    files = good | {name: image for name, (_, image) in bad.items()}
    files |= {"notes.txt": b"not an image\n", ".hidden.png": good["plain.png"]}
    for name, image in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    expected = dict.fromkeys(good, "ok") | {name: status for name, (status, _) in bad.items()}
    (out / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False))
    return f"{len(good)} good and {len(bad)} bad images in {out}"


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1])))
