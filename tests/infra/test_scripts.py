"""The scripts parse, their commands are real, and what they draw is the same every time."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from infra.manifests import INFRA, NIGHTLY_PATH, PROJECT, ROOT, SETTINGS, split_command
from pipeline.cli import parse_settings

SCRIPTS = [*sorted(INFRA.glob("*.sh")), ROOT / ".ci" / "run"]
DEMO_PICTURES = INFRA / "demo_pictures.py"
CLASSES = 12


def read_commands(path: Path) -> list[str]:
    """Return the commands of jobs in a script, with variables replaced by something that parses."""
    text = re.sub(r"\\+\n", " ", path.read_text())
    text = re.sub(r"\$\{?WEIGHTS\}?", "random:0", text)
    text = re.sub(r"\$\{?MODEL\}?", "fbnetv3_b.ra2_in1k", text)
    text = re.sub(r"\$\{?\w+\}?", "variable", text)
    commands = re.findall(r"(?:python jobs/\w+\.py|image-\w+) +--[^>\n]*", text)
    return [command.strip() for command in commands if "…" not in command]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_stops_at_the_first_failure(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text() or path.name == "venv.sh"


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name != "venv.sh"], ids=lambda p: p.name)
def test_a_script_can_be_run_as_it_is(path: Path) -> None:
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("name", ["demo.sh", "dev.sh", "aws/cluster.yaml", "compose.yaml"])
def test_the_commands_of_a_file_parse_with_the_settings_of_their_jobs(name: str) -> None:
    commands = read_commands(INFRA / name)
    if name.endswith(".sh"):
        assert commands
    for command in commands:
        script, flags = split_command(command)
        assert script in PROJECT["scripts"]
        parse_settings(SETTINGS[script], ["--k" if flag == "-k" else flag for flag in flags])


def test_ci_runs_the_one_test_script() -> None:
    assert "infra/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_ci_covers_the_pythons_that_the_scripts_accept() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (versions,) = re.findall(r"python: \[(.+)\]", workflow)
    assert json.loads(f"[{versions}]") == ["3.11", "3.12", "3.13"]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (INFRA / "venv.sh").read_text()
    assert PROJECT["requires-python"] == ">=3.11"


def test_without_a_fitting_python_the_demo_says_what_to_install(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": "no-such-python", "VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", INFRA / "demo.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: no Python 3.11 to 3.13 with venv and pip found" in done.stderr
    assert "apt install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_installed_environment_is_left_alone(tmp_path: Path) -> None:
    script = 'source infra/venv.sh; prepare_venv cpu; python -c "print(1)"'
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    summed = subprocess.run(
        'echo "$(cksum <pyproject.toml) $PWD"', shell=True, cwd=ROOT, capture_output=True, text=True
    )
    (tmp_path / ".installed-test").write_text(summed.stdout)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=os.environ | {"VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def draw(folder: Path, *flags: str) -> dict[str, bytes]:
    subprocess.run([sys.executable, DEMO_PICTURES, folder, *flags], check=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_demos_shards_are_the_same_every_time(tmp_path: Path) -> None:
    flags = ("--number", "36", "--per-shard", "10")
    first = draw(tmp_path / "a", *flags)
    assert list(first) == [f"pictures-{shard:05d}.tar" for shard in range(4)]
    assert draw(tmp_path / "b", *flags) == first
    assert draw(tmp_path / "c", *flags, "--seed", "1") != first


def test_shards_that_exist_are_left_alone(tmp_path: Path) -> None:
    flags = ("--number", "24", "--per-shard", "12")
    draw(tmp_path, *flags)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    draw(tmp_path, *flags)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times


def test_every_picture_opens_and_has_its_class_beside_it(tmp_path: Path) -> None:
    draw(tmp_path, "--number", str(2 * CLASSES), "--per-shard", "100")
    with tarfile.open(tmp_path / "pictures-00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    pictures = [name for name in files if name.endswith(".jpg")]
    assert len(pictures) == 2 * CLASSES
    classes = set()
    for name in pictures:
        stem = name.removesuffix(".jpg")
        facts = json.loads(files[f"{stem}.json"])
        with Image.open(io.BytesIO(files[name])) as image:
            assert list(image.size) == facts["size"]
            image.load()
        assert stem.startswith(facts["class"])
        classes.add((facts["class"], int(files[f"{stem}.cls"])))
    assert sorted(label for _, label in classes) == list(range(CLASSES))


def test_the_nightly_settings_are_mounted_where_the_manifests_look() -> None:
    manifests = "".join(path.read_text() for path in (INFRA / "kubernetes").glob("*.yaml"))
    assert NIGHTLY_PATH in manifests
    assert "--from-file=infra/nightly.toml" in manifests
