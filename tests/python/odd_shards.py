"""Writes WebDataset shards that are hard to read.

    odd_shards.py OUT

`names` holds the same members in three dialects of tar, partitioned by `form`; what they come to is printed as JSON: for each key
its status and the text of its member `txt`, or null. `twice` has one key in two shards. In `bombs`, members of 300 MB come out of
files of 300 KB. `cut` has a whole shard.
"""

import gzip
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

MEBIBYTE = 1 << 20
BOMB_MEBIBYTES = 300

# How webdataset splits names (`base_plus_ext` in webdataset/tariterators.py), without its names that begin with a dot.
SPLIT = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(shard: tarfile.TarFile, name: str, content: bytes = b"", **kind) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in kind.items():
        setattr(member, attribute, value)
    shard.addfile(member, io.BytesIO(content))


def write_names(out: Path) -> dict:
    members = [
        ("a/", None),
        ("a/b.c.jpg", picture(1)),  # the image of `a/b` is its member `c.jpg`
        ("a/b.txt", b"text of a/b"),
        ("a.x/b.PNG", picture(2)),  # dots in folders are no part of it
        ("./d.seg.png", picture(3)),
        ("./d.webp", picture(4)),
        ("only_text.TXT", "ohne Bild, für immer".encode()),
        ("empty.png", b""),
        ("README", b"no sample"),
        ("._e.png", b"what macOS adds"),
        ("e.png", picture(5)),
        ("folder/._e.png", b"what macOS adds"),
        ("folder/.hidden", b""),
        ("folder/" + "n" * 90 + ".png", picture(6)),
        ("f" * 90 + "/" + "n" * 95 + ".png", picture(7)),
        ("schön/größe.png", picture(8)),
        ("large.png", bytes(2 * MEBIBYTE)),
        ("last.txt", b""),
        ("last.png", picture(9)),
    ]
    expected = {}
    for name, content in members:
        match = SPLIT.match(name)
        if match is None or content is None:
            continue
        key, extension = match.groups()
        row = expected.setdefault(key, {"status": "missing", "txt": None})
        if extension.lower() == "txt":
            row["txt"] = content.decode()
        elif extension.lower().endswith(("png", "jpg", "webp")):
            row["status"] = "empty" if not content else "ok" if len(content) < MEBIBYTE else "image_too_large"
    for form, number in {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}.items():
        file = out / "names" / f"form={form}" / "shard.tar"
        file.parent.mkdir(parents=True)
        with tarfile.open(file, "w", format=number, encoding="utf-8") as shard:
            for name, content in members:
                if content is None:
                    add(shard, name.rstrip("/"), type=tarfile.DIRTYPE)
                else:
                    add(shard, name, content)
                    add(shard, "linked.png", type=tarfile.SYMTYPE, linkname=name[:50])
                    add(shard, "linked.png", type=tarfile.LNKTYPE, linkname=name[:50])
    return expected


def write_bomb(file: Path, pack) -> None:
    """A picture, members of zeros for the image, for a text and for nothing, and another picture."""
    file.parent.mkdir(parents=True)
    zeros = pack(bytes(MEBIBYTE))
    with file.open("wb") as stream:
        for name in ("bomb.png", "bomb.txt", "bomb.bin"):
            member = tarfile.TarInfo(name)
            member.size = BOMB_MEBIBYTES * MEBIBYTE
            stream.write(pack(member.tobuf()))
            for _ in range(BOMB_MEBIBYTES):
                stream.write(zeros)
        stream.write(pack(small_archive(["x", "y", "z"])))


def small_archive(keys: list[str]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as shard:
        for number, key in enumerate(keys):
            add(shard, f"{key}.png", picture(100 + number))
            add(shard, f"{key}.txt", f"text of {key}".encode())
    return archive.getvalue()


def main(out: Path) -> str:
    expected = write_names(out)
    for folder, file, keys in (
        ("twice", "1.tar", ["a", "b", "same", "too"]),
        ("twice", "2.tar", ["c", "same", "d", "too"]),
        ("cut", "whole.tar", [f"k{number}" for number in range(8)]),
        ("small", "small.tar", ["x", "y", "z"]),
    ):
        (out / folder).mkdir(exist_ok=True)
        (out / folder / file).write_bytes(small_archive(keys))
    write_bomb(out / "bombs" / "form=gz" / "bomb.tar.gz", gzip.compress)
    write_bomb(out / "bombs" / "form=zst" / "bomb.tar.zst", lambda data: pa.compress(data, "zstd", asbytes=True))
    return json.dumps(expected)


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
