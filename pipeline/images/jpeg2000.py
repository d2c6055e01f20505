"""JPEG 2000 in a process of its own.

Pillow decodes it without giving up the interpreter lock, so nothing inside this process could hold
a time limit over it; a child can be killed. This file is also the child's program, and therefore
imports nothing of the pipeline.
"""

import io
import subprocess
import sys

from PIL import Image

_HEADER_BYTES = 8


def load_jpeg2000(data: bytes, size: tuple[int, int], *, timeout_s: float) -> Image.Image:
    """Decode an image whose header says ``size``, in its own mode.

    Raises:
        OSError: It cannot be decoded.
        TimeoutError: It took longer than ``timeout_s`` seconds.
    """
    command = [sys.executable, "-I", __file__]
    try:
        child = subprocess.run(
            command, input=data, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"decoding took longer than {timeout_s:g} s") from error
    if child.returncode:
        words = child.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(words[-1] if words else f"the decoder died with {child.returncode}")
    mode = child.stdout[:_HEADER_BYTES].decode().rstrip()
    return Image.frombytes(mode, size, memoryview(child.stdout)[_HEADER_BYTES:])


def _serve() -> None:
    Image.MAX_IMAGE_PIXELS = None  # the parent has compared the size with its own limit
    image = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=["JPEG2000"])
    image.load()
    sys.stdout.buffer.write(image.mode.encode().ljust(_HEADER_BYTES))
    sys.stdout.buffer.write(image.tobytes())


if __name__ == "__main__":
    _serve()
