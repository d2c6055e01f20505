"""DOOR to FAISS, the package: which one is installed, and whether it will do."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.errors import SettingsError

MIN_VERSION = (1, 15, 1)
"""Older versions parse damaged files unsafely."""

PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


@dataclass(frozen=True, slots=True)
class Engine:
    """Which FAISS this is.

    Attributes:
        package: Name of the installed distribution, ``"unknown"`` if it has no metadata.
        version: Its version.
        gpus: Number of GPUs it can use.
    """

    package: str
    version: str
    gpus: int


def find_packages(find: Callable[[str], str] = importlib.metadata.version) -> dict[str, str]:
    """Return the installed FAISS distributions and their versions."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = find(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_packages(found: dict[str, str]) -> None:
    """Refuse two distributions at once.

    Raises:
        SettingsError: They share one folder, so the last one installed has overwritten the other.
    """
    if len(found) > 1:
        names = " ".join(found)
        raise SettingsError(
            f"{' and '.join(found)} are both installed and overwrite each other; keep one: "
            f"pip uninstall -y {names}, then pip install 'image-embedding-pipeline[cpu]' or [gpu]"
        )


@lru_cache(maxsize=1)
def load_faiss() -> Any:
    """Import FAISS on first use and check that it is the only one, whole, and new enough.

    Raises:
        SettingsError: It is missing, there are two, or it is too old.
    """
    check_packages(find_packages())
    if sys.platform == "darwin":  # torch and faiss each bring an OpenMP runtime there
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        import faiss
    except ImportError as error:
        raise SettingsError(
            "FAISS is not installed; pip install 'image-embedding-pipeline[cpu]', or [gpu]"
        ) from error
    if not hasattr(faiss, "IndexFlatIP"):
        raise SettingsError(
            "the installed FAISS is a remnant of two packages; reinstall one of them: "
            "pip install --force-reinstall 'image-embedding-pipeline[cpu]'"
        )
    version = tuple(int(part) for part in faiss.__version__.split(".")[:3])
    if version < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise SettingsError(f"FAISS {faiss.__version__} is too old; install at least {wanted}")
    return faiss


def describe_engine() -> Engine:
    """Return which FAISS this process uses."""
    faiss = load_faiss()
    package = next(iter(find_packages()), "unknown")
    return Engine(package, faiss.__version__, int(faiss.get_num_gpus()))


def set_threads(number: int) -> None:
    """Let FAISS use ``number`` threads for the calls of this thread; it counts per thread."""
    load_faiss().omp_set_num_threads(number)
