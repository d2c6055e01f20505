"""The jobs as programs: one rule for exit codes, what they print, how they end."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pictures import make_jpeg, write_loose
from runs import ROOT, count_files, make_config, start_job, wait_until

from pipeline.cli import run_job
from pipeline.config import EmbedConfig
from pipeline.program import name_program
from pipeline.summary import summarise

MODEL = "fbnetv3_b.ra2_in1k"
EMBED = ["--input", "in", "--output", "out", "--model", MODEL, "--weights", "random:0"]
SOUND = {
    "embed": EMBED,
    "index": ["--embeddings", "nowhere", "--index", "index"],
    "nightly": [*EMBED, "--index", "index"],
    "search": ["--index", "nowhere", "--key", "a"],
    "serve": ["--index", "nowhere", "--local", "--port", "0"],
    "benchmark": ["--rounds", "1"],
}
"""Flags that parse, of each job; what they name need not be there."""

EVERYWHERE = [
    (["--no-such-flag"], "unknown flag --no-such-flag"),
    (["stray"], "--help lists all flags"),
    (["--config", "nowhere.toml"], "cannot read --config nowhere.toml"),
    (["--config", "broken.toml"], "is not TOML"),
    (["--config", "unknown.toml"], "'no_such_key' in unknown.toml"),
]
MISTAKES = [
    *((job, flags, words) for job in SOUND for flags, words in EVERYWHERE),
    *(
        (job, ["--storage-attempts", "0"], "it must be at least 1")
        for job in SOUND
        if job != "benchmark"
    ),
    ("embed", ["--input", "nowhere"], "no image shards under"),
    ("nightly", ["--input", "nowhere"], "no image shards under"),
    *((job, ["--model", "nomodel"], "unknown backbone 'nomodel'") for job in ("embed", "nightly")),
    ("embed", ["--weights", "nowhere"], "no weights at 'nowhere'"),
    ("embed", ["--verify"], "no embeddings at"),
    ("index", [], "no embeddings at"),
    *(
        ("index", flags, "no index at")
        for flags in (
            ["--embeddings=None", "--verify"],
            ["--embeddings=None", "--knn=3"],
            ["--roll-back=previous"],
            ["--collect-garbage=list"],
        )
    ),
    ("search", [], "no index at"),
    ("serve", [], "no index at"),
    ("embed", ["--input", "gopher://x"], "is no protocol that is known"),
    ("index", ["--embeddings", "gopher://x"], "is no protocol that is known"),
    ("search", ["--index", "gopher://x"], "is no protocol that is known"),
    ("serve", ["--index", "gopher://x"], "is no protocol that is known"),
    ("search", ["--index", "", "--url", "nourl"], "it must start with http:// or https://"),
    ("nightly", ["--dry-run"], "dry_run does one thing instead of a night's work; give it to"),
    ("nightly", ["--verify"], "verify does one thing instead of a night's work"),
    ("nightly", ["--roll-back", "previous"], "roll_back does one thing"),
    ("nightly", ["--collect-garbage", "list"], "collect_garbage does one thing"),
    ("nightly", ["--embeddings", "elsewhere"], "leave --embeddings out"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_loose(tmp_path / "in", {"a.jpg": make_jpeg(1)})
    (tmp_path / "broken.toml").write_text("x = [")
    (tmp_path / "unknown.toml").write_text("no_such_key = 1")
    return tmp_path


def run(job: str, flags: list[str]) -> int:
    return import_module(f"jobs.{job}").main([*SOUND[job], *flags])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("job", "flags", "words"),
    MISTAKES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_mistake_in_what_was_typed_is_exit_code_2_in_every_job(
    job: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(job, flags) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address of this machine where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("embed", ["--input", "s3://b/x"]),
        ("index", ["--embeddings", "s3://b/x"]),
        ("nightly", ["--input", "s3://b/x"]),
        ("search", ["--index", "s3://b/x"]),
        ("serve", ["--index", "s3://b/x"]),
    ],
)
def test_a_store_that_does_not_answer_is_exit_code_1_in_every_job(
    job: str, flags: list[str], dead_address: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    dead = ["--endpoint-url", f"http://{dead_address}", "--storage-attempts", "1"]
    assert run(job, [*flags, *dead]) == 1
    assert "Could not connect to the endpoint" in capsys.readouterr().err


def start(job: str, *flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a job as a program of its own, in ``folder``."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("job", "flags"), [("embed", []), ("serve", ["--no-local"])], ids=["embed", "serve"]
)
def test_a_ray_cluster_that_does_not_answer_is_exit_code_2(
    job: str, flags: list[str], folder: Path, dead_address: str
) -> None:
    done = start(job, *SOUND[job], *flags, "--ray-address", dead_address, folder=folder)
    assert done.returncode == 2, done.stderr
    assert f"no Ray cluster answers at '{dead_address}'" in done.stderr


def test_a_check_reads_the_settings_and_starts_nothing(folder: Path, capsys) -> None:
    for job in SOUND:
        assert run(job, ["--check"]) == 0
        assert capsys.readouterr().out == "the settings are sound; nothing was started\n"
    assert not (folder / "out").exists()
    for job in ("embed", "nightly"):
        assert run(job, ["--check", "--model", "nomodel"]) == 2
        assert "unknown backbone 'nomodel'" in capsys.readouterr().err


def test_a_program_tells_its_version_and_completes_its_flags(capsys) -> None:
    for flags, words in ((["--version"], "image-embedding-pipeline "), ([], "--carry")):
        with pytest.raises(SystemExit) as caught:
            run("embed", flags or ["--print-completion", "bash"])
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("/usr/bin/image-embed", "image-index"),
        ("jobs/embed.py", "python jobs/index.py"),
        ("../jobs/embed.py", "python ../jobs/index.py"),
        (f"{Path.cwd()}/jobs/embed.py", "python jobs/index.py"),
        ("/opt/jobs/embed.py", "python /opt/jobs/index.py"),
        ("-c", "image-index"),
        ("pytest", "image-index"),
    ],
)
def test_messages_name_the_program_as_it_was_typed(typed: str, name: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [typed])
    assert name_program("index") == name


def show(report: dict[str, Any], *flags: str) -> str:
    """Return what a job prints at its end on a terminal."""
    code = (
        "import json, sys; from pipeline.cli import run_job; from pipeline.config import "
        "IndexConfig\n"
        "class Report:\n    def to_dict(self): return json.loads(sys.argv[1])\n"
        "run_job('index', IndexConfig, lambda _: Report(), ['--index', 'i', *sys.argv[2:]])"
    )
    master, terminal = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen:
        command = [sys.executable, "-c", code, json.dumps(report), *flags]
        with subprocess.Popen(command, stdout=terminal, cwd=ROOT) as process:
            os.close(terminal)
            shown = bytearray()
            try:
                while data := screen.read(4096):
                    shown += data
            except OSError:  # the other end is closed
                pass
        assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n")


BUILT = {"job": "index", "action": "built", "generation": "000001-ab", "rows": 12, "kind": "flat"}
BUILT |= {"index": "s3://b/i", "measured": {"recall": 0.9876}}


def test_a_terminal_gets_a_summary_and_json_where_it_is_asked_for() -> None:
    assert show(BUILT) == (
        "index   built: generation 000001-ab, 12 rows, flat\n"
        "recall  0.9876\n"
        "next    image-search --index s3://b/i --image query.jpg\n"
        "or      image-serve --index s3://b/i --local\n"
    )
    assert json.loads(show(BUILT, "--json")) == BUILT


def test_a_report_of_one_step_lists_its_single_values() -> None:
    assert summarise({"job": "verify", "commits": 2, "problems": [], "statuses": {"ok": 7}}) == (
        "commits   2\nstatuses  ok 7"
    )


def test_the_end_of_a_run_tells_what_to_type_next_and_that_works(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = {f"{i}.jpg": make_jpeg(i) for i in range(4)} | {"cut.jpg": make_jpeg(9)[:300]}
    write_loose(tmp_path / "in", pictures)
    config = make_config(tmp_path / "in", tmp_path / "embeddings", weights)
    from pipeline.embed_job.run import embed

    lines = dict(line.split(maxsplit=1) for line in summarise(embed(config).to_dict()).splitlines())
    assert lines["images"].startswith("5 embedded in ")
    assert lines["rows"].startswith("4 ok, 1 ")
    assert Path(lines["report"]).exists()
    assert lines["next"] == "image-index --embeddings embeddings --index index"
    assert import_module("jobs.index").main(lines["next"].split()[1:]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4


def test_sigterm_ends_a_job_as_ctrl_c_does(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def action(_: EmbedConfig) -> None:
        signal.raise_signal(signal.SIGTERM)

    flags = ["--input", "a", "--output", "b", "--model", "m"]
    assert run_job("embed", EmbedConfig, action, flags) == 143
    assert "the same command goes on from the committed shards" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_is_told_to_end_leaves_cleanly(tmp_path: Path, weights: Path) -> None:
    """Ray installs a handler of its own; the lease is given back all the same."""
    write_loose(tmp_path / "in", {f"{i}.jpg": make_jpeg(i) for i in range(400)})
    config = make_config(tmp_path / "in", tmp_path / "out", weights, chunk_images=4)
    with start_job(config, tmp_path) as job:
        wait_until(lambda: count_files(tmp_path / "out", "parts"))
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 143
    assert "the same command goes on from the committed shards" in job.log.read_text()
    assert not (tmp_path / "out" / "lease.json").exists()
