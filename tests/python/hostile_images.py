"""Makes images that break careless readers, and says what must become of each.

    hostile_images.py hard OUT
    hostile_images.py bombs OUT

`hard` makes OUT a source of format `directory`, of images that are broken or odd. What is `ok` must also have the pixels that
Pillow reads; that is what reference_scores.py compares. OUT/notes.txt and OUT/.hidden.png must not become rows at all.

`bombs` makes OUT/images.parquet, a source of format `parquet`, of small files that mean a lot of memory or time.

OUT/expected.json maps each image by its id to the `status` that its row in `latents` must have: `ok`, or the code of a reject.
"""

import functools
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def png_of_size(width: int, height: int, ancillary: bytes = b"", pixels: bytes = bytes(1000)) -> bytes:
    """A gray PNG that claims a size, and has next to no pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + ancillary + data + png_chunk(b"IEND", b"")


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


@functools.cache
def deflated_zeros(num_bytes: int) -> bytes:
    """As many zeros, a thousandth of their size."""
    packer, block = zlib.compressobj(9), bytes(1 << 24)
    parts = [packer.compress(block) for _ in range(num_bytes >> 24)]
    return b"".join([*parts, packer.flush()])


def apng(num_frames: int) -> bytes:
    pixels = zlib.compress(bytes(2 * 3))
    frame = struct.pack(">IIIIHHBB", 2, 2, 0, 0, 1, 10, 0, 0)
    chunks = [png_chunk(b"acTL", struct.pack(">II", num_frames, 0)), png_chunk(b"fcTL", struct.pack(">I", 0) + frame)]
    chunks.append(png_chunk(b"IDAT", pixels))
    for number in range(1, num_frames):
        chunks.append(png_chunk(b"fcTL", struct.pack(">I", 2 * number - 1) + frame))
        chunks.append(png_chunk(b"fdAT", struct.pack(">I", 2 * number) + pixels))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def gif(canvas: tuple[int, int], frame: tuple[int, int], num_frames: int) -> bytes:
    palette = bytes([0, 0, 0, 255, 255, 255])
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + palette + image * num_frames + b";"


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    content = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


def animated_webp(num_frames: int) -> bytes:
    still = encode(picture(0).crop((0, 0, 2, 2)), "WEBP", lossless=True)
    frame = bytes(6) + (1).to_bytes(3, "little") * 2 + (10).to_bytes(3, "little") + b"\0" + still[12:]
    canvas = bytes([0x02, 0, 0, 0]) + (1).to_bytes(3, "little") * 2
    return riff((b"VP8X", canvas), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * num_frames)


def vp8(width: int, height: int) -> bytes:
    """The header of a lossy WebP frame."""
    return b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(100)


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 1078, 0, 1078, 40, width, height, 1, 8, 0, 0, 0, 0, 0, 0) + bytes(1024)


def tiff(width: int, height: int, compression: int, strip: bytes, **more: int) -> bytes:
    """A gray TIFF of one strip, or, with `tile=`, of one square tile."""
    place = 8
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    if "tile" in more:
        tags |= {322: more["tile"], 323: more["tile"], 324: place, 325: len(strip)}
    else:
        tags |= {273: place, 278: height, 279: len(strip)}
    entries = [struct.pack("<HHII", tag, 4, more.get(f"count_{tag}", 1), value) for tag, value in sorted(tags.items())]
    first_directory = place + len(strip)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", more.get("next_directory", 0))
    return b"II*\0" + struct.pack("<I", first_directory) + strip + directory


def jpeg(width: int, height: int, num_scans: int) -> bytes:
    """A gray progressive JPEG without coded data. Where there is none, decoders read zeros, which stand here for 63 coefficients of
    each block: every scan is work for the whole frame."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    one_code = bytes([1] + [0] * 15)
    tables = segment(0xDB, bytes(1) + bytes([1] * 64))
    tables += segment(0xC4, b"\x00" + one_code + b"\x00") + segment(0xC4, b"\x10" + one_code + b"\x01")
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    scans = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(8)
    scans += (segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + bytes(2)) * (num_scans - 1)
    return b"\xff\xd8" + tables + frame + scans + b"\xff\xd9"


def bombs() -> dict[str, tuple[str, bytes]]:
    profile = png_chunk(b"iCCP", b"icc\0\0" + deflated_zeros(2 << 30))
    text = png_chunk(b"zTXt", b"Comment\0\0" + deflated_zeros(2 << 30))
    nested = b"PK\x03\x04"
    for _ in range(5):
        nested = zlib.compress(nested * 1000, 9)
    return {
        # Larger than anybody has room for, by the header.
        "png_50000_x_50000": ("too_many_pixels", png_of_size(50_000, 50_000, pixels=bytes(5 << 20))),
        "png_2^32-1_x_1": ("too_many_pixels", png_of_size(2**32 - 1, 1)),
        "gif_65535_x_65535": ("too_many_pixels", gif((65_535, 65_535), (65_535, 65_535), 1)),
        "webp_65536_x_65535": ("too_many_pixels", riff((b"VP8X", bytes(4) + b"\xff\xff\0\xfe\xff\0"), (b"VP8 ", vp8(1, 1)))),
        "webp_16383_x_16383": ("too_many_pixels", riff((b"VP8 ", vp8(16_383, 16_383)))),
        "bmp_50000_x_50000": ("too_many_pixels", bmp(50_000, 50_000)),
        "bmp_2^31-1_x_1": ("corrupt_image", bmp(2**31 - 1, 1)),
        "tiff_50000_x_50000": ("too_many_pixels", tiff(50_000, 50_000, 8, zlib.compress(bytes(1000)))),
        "tiff_2^32-1_x_1": ("too_many_pixels", tiff(2**32 - 1, 1, 8, zlib.compress(bytes(1000)))),
        "jpeg_65500_x_65500": ("too_many_pixels", jpeg(65_500, 65_500, 2)),
        # Small by the header, and large within.
        "gif_frame_larger_than_canvas": ("too_much_memory", gif((1, 1), (65_535, 65_535), 1)),
        "webp_frame_larger_than_canvas": ("too_many_pixels", riff((b"VP8X", bytes(10)), (b"VP8 ", vp8(16_383, 16_383)))),
        "webp_chunk_of_4_gb": ("truncated_image", riff((b"VP8X", b"\x08" + bytes(9)), (b"VP8 ", vp8(1, 1))) + b"EXIF\xff\xff\xff\xff"),
        "webp_lossless_of_1_mb_for_16_pixels": ("corrupt_image", riff((b"VP8L", b"\x2f" + struct.pack("<I", 3 | 3 << 14) + bytes(1 << 20)))),
        "tiff_of_a_jpeg_of_16000_x_16000": ("corrupt_image", tiff(8, 8, 7, jpeg(16_000, 16_000, 1))),
        "tiff_tile_of_65536_x_65536": ("truncated_image", tiff(8, 8, 8, zlib.compress(bytes(1000)), tile=65_536)),
        "tiff_of_a_billion_strips": ("too_much_memory", tiff(8, 8, 8, zlib.compress(bytes(64)), count_273=10**9, count_279=10**9)),
        "tiff_directories_in_a_circle": ("corrupt_image", tiff(8, 8, 1, bytes(64), next_directory=72)),
        "png_profile_of_2_gb": ("ok", png_of_size(2, 2, profile, bytes(6))),
        "png_text_of_2_gb": ("ok", png_of_size(2, 2, text, bytes(6))),
        # No image, however often it is unpacked.
        "zeros_200_mb": ("image_too_large", bytes(200_000_000)),
        "zeros_60_mb": ("unknown_format", bytes(60_000_000)),
        "archive_in_archive": ("unknown_format", nested),
        # Work for hours that is not asked for: of an animation, the first frame.
        "apng_of_100000_frames": ("ok", apng(100_000)),
        "gif_of_100000_frames": ("ok", gif((2, 2), (1, 1), 100_000)),
        "webp_of_100000_frames": ("ok", animated_webp(100_000)),
        # Work that is.
        "jpeg_of_98_scans": ("decode_timeout", jpeg(8_192, 8_192, 98)),
    }


def write_expected(out: Path, expected: dict[str, str]) -> None:
    (out / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False))


def write_hard(out: Path) -> str:
    good, bad = good_images(), bad_images()
    files = good | {name: image for name, (_, image) in bad.items()}
    files |= {"notes.txt": b"not an image\n", ".hidden.png": good["plain.png"]}
    for name, image in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    write_expected(out, dict.fromkeys(good, "ok") | {name: status for name, (status, _) in bad.items()})
    return f"{len(good)} good and {len(bad)} bad images in {out}"


def write_bombs(out: Path) -> str:
    images = bombs()
    out.mkdir(parents=True)
    table = pa.table({"image_id": list(images), "image": pa.array([image for _, image in images.values()], pa.binary())})
    pq.write_table(table, out / "images.parquet", compression="zstd")
    write_expected(out, {name: status for name, (status, _) in images.items()})
    return f"{len(images)} bombs in {out}"


if __name__ == "__main__":
    write = {"hard": write_hard, "bombs": write_bombs}[sys.argv[1]]
    print("ok:", write(Path(sys.argv[2])))
