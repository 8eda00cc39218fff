"""Opens files of any place and compression as streams of bytes that hold little, end at bombs and at cut members.

Only regular files are opened. What is broken raises `BrokenError` when it is reached, so that what stands before it is
read.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.items import BrokenError, UnusableError

PIECE_BYTES = 2**16
ZSTD_PIECE_BYTES = 2**11  # a block of 4 bytes may hold 2**17, so that a piece holds 64 MiB at most
ZSTD_WINDOW_BYTES = 2**27  # what `zstd --long` writes
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def local_path(path: str) -> str | None:
    """Returns the path in the local file system, None for a URL of another one."""
    return path.removeprefix("file://") if path.startswith("file://") or "://" not in path else None


def open_source(path: str) -> Any:
    """Returns the file's own bytes as a stream. Raises BrokenError when it is no regular file, OSError when it cannot
    be opened."""
    local = local_path(path)
    if local is None:
        import fsspec

        return fsspec.open(path, "rb").open()
    if not stat.S_ISREG(os.stat(local).st_mode):  # to open a device or a pipe can do something, or wait
        raise BrokenError("not_a_file")
    descriptor = os.open(local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was exchanged since
        os.close(descriptor)
        raise BrokenError("not_a_file")
    return open(descriptor, "rb", buffering=PIECE_BYTES)


def open_bytes(path: str, config: CollectConfig) -> io.BufferedReader:
    """Returns the file's content as a stream, decompressed where its first bytes say so."""
    return io.BufferedReader(Unpacked(open_source(path), path, config.max_bytes, config.max_ratio), 2**18)


class Unpacked(io.RawIOBase):
    """Reads a stream, decompressed. Raises BrokenError("bomb") when it holds more than `free_bytes` and `max_ratio`
    times the bytes that were read of it."""

    def __init__(self, source: Any, path: str, free_bytes: int, max_ratio: int) -> None:
        super().__init__()
        self.source, self.free_bytes, self.max_ratio = source, free_bytes, max_ratio
        self.bytes_in, self.bytes_out, self.left = 0, 0, b""
        self.pieces = self.unpack(path)

    def unpack(self, path: str) -> Iterator[bytes]:
        """Yields the content in pieces."""
        head = self.take(4)
        if head.startswith(GZIP):
            yield from gzip_pieces(head, self.take)
        elif head == ZSTD:
            yield from zstd_pieces(head, self.take)
        elif head and path.endswith((".gz", ".zst")):
            raise BrokenError("not_compressed")
        else:
            yield head
            while piece := self.take(PIECE_BYTES):
                yield piece

    def take(self, count: int) -> bytes:
        """Returns the next bytes of the source."""
        data = self.source.read(count)
        self.bytes_in += len(data)
        return data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with what comes next; returns how many bytes that is, 0 at the end."""
        while not self.left:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.left = memoryview(piece)
        allowed = self.free_bytes + self.max_ratio * self.bytes_in - self.bytes_out
        if allowed <= 0:
            raise BrokenError("bomb")
        count = min(len(buffer), len(self.left), allowed)
        buffer[:count], self.left = self.left[:count], self.left[count:]
        self.bytes_out += count
        return count

    def close(self) -> None:
        self.source.close()
        super().close()


def gzip_pieces(data: bytes, take: Any) -> Iterator[bytes]:
    """Yields what gzip members hold, in pieces of PIECE_BYTES at most; zeros behind a member are padding."""
    while data := data or take(PIECE_BYTES):
        unpacker = zlib.decompressobj(wbits=31)
        while not unpacker.eof:
            try:
                piece = unpacker.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise BrokenError("gzip_broken") from None
            if not piece and not data:
                raise BrokenError("gzip_cut")
            yield piece
            data = unpacker.unconsumed_tail or (b"" if unpacker.eof else take(PIECE_BYTES))
        data = unpacker.unused_data.lstrip(b"\0")
        while not data and (padded := take(PIECE_BYTES)):
            data = padded.lstrip(b"\0")


def zstd_pieces(data: bytes, take: Any) -> Iterator[bytes]:
    """Yields what Zstandard frames hold."""
    import zstandard

    maker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    while data := data or take(ZSTD_PIECE_BYTES):
        unpacker = maker.decompressobj()
        while not unpacker.eof:
            if not data:
                raise BrokenError("zstd_cut")
            try:
                yield unpacker.decompress(data)
            except zstandard.ZstdError:
                raise BrokenError("zstd_broken") from None
            data = b"" if unpacker.eof else take(ZSTD_PIECE_BYTES)
        data = unpacker.unused_data


def unpacked(data: bytes, config: CollectConfig) -> bytes:
    """Returns what the compressed bytes of one document hold. Raises UnusableError when they are broken or hold more
    than max_bytes."""
    content = b""
    try:
        content = io.BufferedReader(Unpacked(io.BytesIO(data), "", config.max_bytes, config.max_ratio)).read(
            config.max_bytes + 1
        )
    except BrokenError as error:
        raise UnusableError(str(error)) from None
    if len(content) > config.max_bytes:
        raise UnusableError("too_large")
    return content


def whole(path: str, config: CollectConfig) -> bytes:
    """Returns the content of a file that is one document. Raises UnusableError when it is larger than max_bytes."""
    with open_bytes(path, config) as stream:
        data = stream.read(config.max_bytes + 1)
    if len(data) > config.max_bytes:
        raise UnusableError("too_large")
    return data


def bounded_lines(stream: io.BufferedReader, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line with its end); None for a line of more than max_bytes, which is never held."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(PIECE_BYTES)
        yield number, None
