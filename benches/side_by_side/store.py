"""Object storage on loopback: SeaweedFS, which speaks S3, and a network in front of it that is as slow as one is told."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pyarrow import fs

from data import BENCH
from runs import ROOT, Failed

KEY, SECRET, BUCKET, REGION = "lookalike-bench", "secret-of-the-bench", "lake", "us-east-1"
START_SECS = 60

# Bytes that pass the slow network at a time.
CHUNK_BYTES = 256 * 1024

# A sleep ends late by about this; what the line could have passed meanwhile is not lost.
SLACK_SECS = 0.005


@dataclass(frozen=True)
class Store:
    port: int

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def env(self) -> dict[str, str]:
        """The variables by which the program finds it."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def client(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(access_key=KEY, secret_key=SECRET, endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region=REGION)

    def upload(self, file: Path, to: str) -> None:
        with self.client().open_output_stream(f"{BUCKET}/{to}") as stream:
            stream.write(file.read_bytes())


@contextlib.contextmanager
def seaweedfs(*options: str) -> Iterator[Store]:
    """A server with an empty bucket, whose files are removed at the end; `options` are further ones of its own."""
    ports = free_ports(10)
    arguments = ["mini", "-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", *options]
    for number, name in enumerate(("s3", "master", "filer", "volume", "admin")):
        arguments += [f"-{name}.port={ports[2 * number]}", f"-{name}.port.grpc={ports[2 * number + 1]}"]
    folder, weed = BENCH / "seaweedfs", Path(sys.executable).with_name("weed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log"
    env = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "S3_BUCKET": BUCKET, "TMPDIR": str(folder)}
    # It ends when its standard input does, so that none outlives this process, however that ends.
    server = subprocess.Popen([sys.executable, ROOT / "tests/python/serve.py", log, weed, *arguments], stdin=subprocess.PIPE, env=env)
    try:
        store, deadline = Store(ports[0]), time.monotonic() + START_SECS
        while not is_ready(store):
            if time.monotonic() > deadline:
                raise Failed(f"SeaweedFS did not start; see {log}")
            time.sleep(0.2)
        yield store
    finally:
        server.stdin.close()
        server.wait()


def is_ready(store: Store) -> bool:
    with contextlib.suppress(OSError):
        # Where nothing listens, the client would try again for a long time.
        socket.create_connection(("127.0.0.1", store.port)).close()
        return store.client().get_file_info(BUCKET).type == fs.FileType.Directory
    return False


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextlib.contextmanager
def slow_network(store: Store, latency_secs: float, bytes_per_sec: float) -> Iterator[Store]:
    """The store behind a proxy: the first byte of every answer comes later by `latency_secs`, and all connections together pass so
    many bytes a second, in both directions."""
    loop = asyncio.new_event_loop()
    network = SlowNetwork(store.port, latency_secs, bytes_per_sec)
    server = loop.run_until_complete(asyncio.start_server(network.serve, "127.0.0.1", 0, limit=CHUNK_BYTES))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield replace(store, port=server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


class SlowNetwork:
    """Passes HTTP on without reading it: on a connection, requests and answers take turns."""

    def __init__(self, server_port: int, latency_secs: float, bytes_per_sec: float):
        self.server_port, self.latency_secs, self.bytes_per_sec = server_port, latency_secs, bytes_per_sec
        self.free_at = 0.0  # when the line has passed all that it was given

    async def serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server_port, limit=CHUNK_BYTES)
        is_asked = asyncio.Event()
        ways = [self.requests(from_client, to_server, is_asked), self.answers(from_server, to_client, is_asked)]
        ways = [asyncio.ensure_future(way) for way in ways]
        # When one end closes, there is nothing more to pass; at the end of it all, this is cancelled.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        to_client.close()
        to_server.close()

    async def requests(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_asked: asyncio.Event) -> None:
        while data := await source.read(CHUNK_BYTES):
            is_asked.set()
            await self.passed(data, sink)

    async def answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_asked: asyncio.Event) -> None:
        while data := await source.read(CHUNK_BYTES):
            if is_asked.is_set():
                is_asked.clear()
                await asyncio.sleep(self.latency_secs)
            await self.passed(data, sink)

    async def passed(self, data: bytes, sink: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time()
        self.free_at = max(now - SLACK_SECS, self.free_at) + len(data) / self.bytes_per_sec
        await asyncio.sleep(max(0, self.free_at - now))
        sink.write(data)
        await sink.drain()
