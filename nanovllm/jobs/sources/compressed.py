"""Files and pipes that are compressed with gzip or Zstandard, read as what they hold."""

from __future__ import annotations

import io
import zlib
from typing import Any

GZIP = b"\x1f\x8b"
ZSTANDARD = b"\x28\xb5\x2f\xfd"
SKIPPABLE = (
    b"\x2a\x4d\x18"  # behind a byte from 0x50 on: a frame without data; pzstd begins with one
)
# Bytes that are decompressed at once, for all that they stand for is held in memory. That is seldom
# more than ten times as much, but 4 bytes of Zstandard can be 128 KiB of zeros.
PIECE = 2**10


def open_decompressed(name: str, file: io.BufferedReader) -> io.BufferedReader:
    """A file as what it holds; the same file if its first bytes do not say that it is compressed.

    The names of files say less: some programs leave ".gz" there when they decompress.

    Raises:
        ImportError: without the library for Zstandard.
        ValueError: while it is read, if it is damaged or ends too early.
    """
    head = file.peek(4)
    if head.startswith(GZIP):
        return io.BufferedReader(GzipStream(name, file), 2**16)
    if head.startswith(ZSTANDARD) or (head[1:4] == SKIPPABLE and head[0] >> 4 == 5):
        return io.BufferedReader(ZstandardStream(name, file), 2**16)
    return file


class DecompressedStream(io.RawIOBase):
    """What a compressed file holds: one frame or several, one after the other.

    The libraries' own file objects would do but for two things: the one for Zstandard takes a file
    that was cut off for one that ends there, and they call an error by different names.
    """

    kind: str  # the name of the format
    errors: type[Exception]  # what the library raises for damaged data

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        super().__init__()
        self.name = name
        self.file = file
        self.frame: Any = None  # decompresses the frame that is being read; None between two
        self.ready = memoryview(b"")  # decompressed, and not yet taken

    def new_frame(self) -> Any:
        """Something with `decompress`, `eof` and `unused_data`, as zlib's objects have them."""
        raise NotImplementedError

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, in part if that is what there is; returns 0 at the end."""
        while not self.ready:
            piece = self.file.read(PIECE)
            if not piece:
                if self.frame is not None:
                    raise ValueError(f"{self.name} ends in the middle of its {self.kind} data")
                return 0
            self.ready = memoryview(self.decompress(piece))
        number = min(len(buffer), len(self.ready))
        buffer[:number] = self.ready[:number]
        self.ready = self.ready[number:]
        return number

    def decompress(self, piece: bytes) -> bytes:
        """What the next bytes of the file stand for."""
        parts = []
        while piece:
            if self.frame is None:
                piece = self.without_padding(piece)
                if not piece:
                    break
                self.frame = self.new_frame()
            try:
                parts.append(self.frame.decompress(piece))
            except self.errors as error:
                raise ValueError(f"{self.name} has damaged {self.kind} data: {error}") from error
            piece = b""
            if self.frame.eof:
                piece = self.frame.unused_data
                self.frame = None
        return b"".join(parts)

    def without_padding(self, piece: bytes) -> bytes:
        """What follows a frame, without bytes that mean nothing."""
        return piece


class GzipStream(DecompressedStream):
    """What a gzip file holds."""

    kind = "gzip"
    errors = zlib.error

    def new_frame(self) -> Any:
        """A member of the file, with its header and its checksum."""
        return zlib.decompressobj(16 + zlib.MAX_WBITS)

    def without_padding(self, piece: bytes) -> bytes:
        """Files from tapes are filled up with zeros."""
        return piece.lstrip(b"\0")


class ZstandardStream(DecompressedStream):
    """What a Zstandard file holds."""

    kind = "Zstandard"

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        super().__init__(name, file)
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(
                f"{name} is compressed with Zstandard, and the package zstandard is not installed: "
                "pip install 'nano-vllm[jobs]'"
            ) from error
        self.errors = zstandard.ZstdError
        self.library = zstandard.ZstdDecompressor()

    def new_frame(self) -> Any:
        """A frame of the file."""
        return self.library.decompressobj()
