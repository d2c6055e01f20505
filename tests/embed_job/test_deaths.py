"""Loads and pictures that kill the process at work on them."""

import os
import tempfile
from pathlib import Path

import pytest
from decoders import install_faulty_decoder, make_fault
from pictures import make_jpeg, write_loose
from runs import make_config, read_rows, start_job

from pipeline.embed_job.deaths import FATAL_DEATHS, count_deaths
from pipeline.embed_job.wire import Load
from pipeline.errors import ClusterError
from pipeline.records import Chunk, Record, Shard

RUN = "run"


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notes go."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def make_load(*, chunk: int = 0) -> Load:
    shard = Shard("aa", "tar", "/in/a.tar", "/in", "a.tar", 1, "v")
    records = [Record("a.tar/0", 0, "/in/a.tar", b"x", 0)]
    return Load([(shard, Chunk("aa", chunk, records, last=True))])


def die_at_work(load: Load) -> None:
    """Work on a load as a process does that is killed at it."""
    if (pid := os.fork()) == 0:
        with count_deaths(RUN, load):
            os._exit(1)
    os.waitpid(pid, 0)


def test_a_load_that_goes_well_or_fails_leaves_no_note(notes: Path):
    with count_deaths(RUN, make_load()):
        assert len(list(notes.rglob("*"))) == 2
    with pytest.raises(ZeroDivisionError), count_deaths(RUN, make_load()):
        raise ZeroDivisionError
    assert list(notes.iterdir()) == []


def test_a_load_that_keeps_killing_its_processes_is_given_up_and_no_other():
    for _ in range(FATAL_DEATHS):
        with count_deaths(RUN, make_load(chunk=1)):
            die_at_work(make_load())
    with (
        pytest.raises(ClusterError, match=r"5 processes died at work on images of /in/a\.tar; loo"),
        count_deaths(RUN, make_load()),
    ):
        pass


@pytest.mark.slow
def test_pictures_that_crash_or_hang_their_decoder_become_rows(weights: Path, tmp_path: Path):
    """The actors live on: what is counted is their processes over the whole run."""
    images = {f"{i}.jpg": make_jpeg(i) for i in range(6)}
    images["crash.jpg"] = make_fault("ctypes.string_at(0)")
    images["hang.jpg"] = make_fault("ctypes.PyDLL(None).sleep(600)")
    write_loose(tmp_path / "in", images)
    config = make_config(
        tmp_path / "in", tmp_path / "out", weights, chunk_images=4, image_timeout_s=1.0
    )
    path = os.pathsep.join(
        filter(None, [str(install_faulty_decoder(tmp_path / "site")), os.environ.get("PYTHONPATH")])
    )
    with start_job(config, tmp_path, PYTHONPATH=path) as job:
        assert job.wait(250) == 0, job.log.read_text()[-2000:]
    rows = read_rows(config.output)
    statuses = {key: row["status"] for key, row in rows.items()}
    failed = {"crash.jpg": "unreadable", "hang.jpg": "unreadable"}
    assert statuses == dict.fromkeys(images, "ok") | failed
    assert rows["crash.jpg"]["error"] == "it kills the process that decodes it (SIGSEGV)"
    assert rows["hang.jpg"]["error"] == "decoding took longer than 1 s"


@pytest.mark.slow
def test_a_decoder_that_is_killed_each_time_fails_the_run_and_is_no_row(
    weights: Path, tmp_path: Path
):
    images = {"a.jpg": make_jpeg(0), "b.jpg": make_fault("os.kill(os.getpid(), signal.SIGKILL)")}
    write_loose(tmp_path / "in", images)
    config = make_config(tmp_path / "in", tmp_path / "out", weights)
    path = os.pathsep.join(
        filter(None, [str(install_faulty_decoder(tmp_path / "site")), os.environ.get("PYTHONPATH")])
    )
    with start_job(config, tmp_path, PYTHONPATH=path) as job:
        assert job.wait(250) == 1
    assert "the process that decodes b.jpg was ended 5 times (SIGKILL)" in job.log.read_text()
    assert read_rows(config.output) == {}
