"""Fetches the pictures of a Debian package: `fetch` downloads it, checks its hash and unpacks one of its folders."""

import hashlib
import io
import lzma
import shutil
import sys
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

POOL = "http://deb.debian.org/debian/pool/main/"


@dataclass(frozen=True)
class Package:
    path: str  # below POOL
    sha256: str
    folder: str  # in the package, from its root on


# Photographs of plants, animals and landscapes: twelve, of 1 to 5 million pixels.
NATURE = Package(
    "m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "usr/share/backgrounds/mate/nature/",
)


def fetch(package: Package, to: Path) -> None:
    """Fetches and unpacks the files of the package's folder, unless they are there."""
    if to.exists():
        return
    url = POOL + package.path
    print(f"fetching {url}", file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as answer:
        deb = answer.read()
    if (found := hashlib.sha256(deb).hexdigest()) != package.sha256:
        sys.exit(f"error: {url} has sha256 {found}, and must have {package.sha256}")
    temporary = to.with_name(to.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(_data_of(deb))) as files:
        for file in files:
            if file.isfile() and file.name.removeprefix("./").startswith(package.folder):
                (temporary / Path(file.name).name).write_bytes(files.extractfile(file).read())
    temporary.rename(to)


def _data_of(deb: bytes) -> bytes:
    """The tar archive of files in a Debian package, which is an `ar` archive: headers of 60 bytes, contents at even places."""
    place = 8
    while place < len(deb):
        name, size = deb[place : place + 16].decode().strip(), int(deb[place + 48 : place + 58])
        content = deb[place + 60 : place + 60 + size]
        if name.rstrip("/") == "data.tar.xz":
            return lzma.decompress(content)
        place += 60 + size + size % 2
    sys.exit("error: the Debian package has no data.tar.xz")
