"""The wheel carries everything, installs, and its console scripts work without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from infra.manifests import PROJECT, ROOT

WITHOUT_PATHS = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy without its untracked rest."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def build_wheel(folder: Path, **variables: str) -> Path:
    source, target = folder / "source", folder / "target"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, env=os.environ | variables)
    (path,) = target.glob("*.whl")
    return path


def list_files(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    command = [sys.executable, "-m", "pip", "--python", python, *install]
    subprocess.run(command, check=True, env=WITHOUT_PATHS)  # where the project would be found
    return folder


def test_the_wheel_carries_code_pages_and_licence_and_nothing_else(wheel: Path) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for package in ("pipeline", "jobs")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".so") and "__pycache__" not in path.parts
    }
    kernel = f"pipeline/images/_kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert list_files(wheel) == sources | ({kernel} if shutil.which("cc") else set())
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_without_a_compiler_the_wheel_lacks_the_kernel_alone(wheel: Path, tmp_path: Path) -> None:
    without = list_files(build_wheel(tmp_path, CC="/nonexistent/cc"))
    assert {n for n in list_files(wheel) if not n.startswith("pipeline/images/_kernel")} == without


@pytest.mark.parametrize("script", sorted(PROJECT["scripts"]))
def test_a_console_script_shows_its_help(installed: Path, script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "bin" / script, "--help"],
        cwd=tmp_path,
        env=WITHOUT_PATHS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_package_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "bin" / "python", "-c", "import pipeline; print(pipeline.__file__)"],
        cwd=tmp_path,
        env=WITHOUT_PATHS,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(installed))
