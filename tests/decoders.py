"""Decoders that misbehave: what stands behind a picture's last byte is run where it is decoded."""

from pathlib import Path

from pictures import encode, make_picture

_MARK = b"#!fault\n"

_SITECUSTOMIZE = f"""
from PIL import PngImagePlugin

load = PngImagePlugin.PngImageFile.load

def load_or_fail(self):
    if self.fp is not None:
        position = self.fp.tell()
        self.fp.seek(0)
        code = self.fp.read().partition({_MARK!r})[2]
        self.fp.seek(position)
        exec("import ctypes, os, signal, sys, time\\n" + code.decode())
    return load(self)

PngImagePlugin.PngImageFile.load = load_or_fail
"""


def install_faulty_decoder(folder: Path) -> Path:
    """Write a folder that makes pictures of ``make_fault`` work in processes that import it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return folder


def make_fault(code: str, seed: int = 1) -> bytes:
    """Return a good picture whose decoder runs ``code`` first."""
    return encode(make_picture(seed), "PNG") + _MARK + code.encode()


def once(code: str, flag: Path) -> str:
    """Return code that does the same the first time only."""
    return (
        f"if not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w').close()\n    {code}"
    )
