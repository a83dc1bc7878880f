"""An S3 bucket as the scripts beside this one use it. Its address and credentials come from the environment, as the program has them."""

import os

import pyarrow as pa
import pyarrow.fs as fs

import published


def s3_filesystem() -> fs.S3FileSystem:
    """All buckets of the server."""
    return fs.S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=os.environ["AWS_ENDPOINT"],
        region=os.environ["AWS_REGION"],
    )


def names(prefix: str) -> list[str]:
    """The names of all objects below an s3:// URL."""
    selector = fs.FileSelector(prefix.removeprefix("s3://"), recursive=True, allow_not_found=True)
    return sorted(entry.path for entry in s3_filesystem().get_file_info(selector) if entry.is_file)


def read_delta(url: str) -> pa.Table:
    """All rows of the Delta table at an s3:// URL."""
    return published.read_delta(url, fs.SubTreeFileSystem(url.removeprefix("s3://"), s3_filesystem()))
