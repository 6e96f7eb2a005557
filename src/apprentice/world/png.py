"""The recorded picture as PNG: the same bytes on every machine."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image


def encode(image: np.ndarray, level: int = 4) -> bytes:
    """uint8 (height, width, 3) as PNG. Rows are unfiltered: for these pictures that is smaller and a third of the work.

    level: zlib's, 1 to 9. Arrow's own zlib does it, whose version the lock pins; Python's is the system's.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    data = rows.tobytes()
    deflated = pa.Codec("gzip", level).compress(data, asbytes=True)[10:-8]  # without gzip's own head and end
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    pixels = b"\x78\x5e" + deflated + struct.pack(">I", zlib.adler32(data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, read from its first 24 bytes. Raises ValueError on anything else."""
    if len(data) < 24 or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("a picture that is no PNG")
    return struct.unpack(">II", data[16:24])


def decode(data: bytes) -> np.ndarray:
    """The picture of a PNG: uint8 (height, width, 3)."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
