"""The compiled kernel in each of its forms, and none."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.images import resample, resize

ROOT = Path(__file__).parents[2]
FORMS = ("installed", "compiled", "portable", "missing")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL | None]:
    """Kernels by form; a form is left out where it cannot be had."""
    found: dict[str, ctypes.CDLL | None] = {"missing": None}
    if installed := resample.find_kernel():
        found["installed"] = installed
    if compiler := shutil.which("cc"):
        folder = tmp_path_factory.mktemp("kernel")
        for name, flags in {"compiled": (), "portable": ("-DWITHOUT_AVX2",)}.items():
            path = folder / f"{name}.so"
            source = ROOT / "pipeline/images/kernel.c"
            options = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", *flags]
            command = [compiler, *options, "-shared", "-fPIC", str(source), "-o", str(path)]
            subprocess.run(command, check=True)
            found[name] = ctypes.CDLL(str(path))
    return found


@pytest.fixture(scope="module", params=FORMS)
def kernel(request: pytest.FixtureRequest, kernels: dict[str, ctypes.CDLL | None]) -> Iterator[str]:
    """Make one form of the kernel the one that is used; return its name."""
    if request.param not in kernels:
        pytest.skip("there is no compiler here, or the package was built without one")
    with pytest.MonkeyPatch.context() as patch:
        for module in (resample, resize):
            patch.setattr(module, "find_kernel", lambda: kernels[request.param])
        yield request.param
