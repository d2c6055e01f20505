"""Loads that kill the process at work on them."""

import os
import tempfile
from pathlib import Path

import pytest
from pictures import make_jpeg, write_loose
from runs import make_config, read_rows, start_job

from pipeline.embed_job.quarantine import FATAL_DEATHS, SUSPECT_DEATHS, Quarantine, find_deadly
from pipeline.embed_job.wire import Load
from pipeline.errors import ClusterError
from pipeline.images.decode import ImageLimits
from pipeline.records import Chunk, Record, Shard

DEADLY = make_jpeg(1) + b"DEADLY"
"""A good picture; decoding it kills the process wherever ``install_deadly_decoder`` was called."""

SITECUSTOMIZE = """
import os
from PIL import JpegImagePlugin

load = JpegImagePlugin.JpegImageFile.load

def load_or_die(self):
    if self.fp is not None:
        position = self.fp.tell()
        self.fp.seek(0)
        if self.fp.read().endswith(b"DEADLY"):
            os.kill(os.getpid(), 11)
        self.fp.seek(position)
    return load(self)

JpegImagePlugin.JpegImageFile.load = load_or_die
"""


@pytest.fixture
def deadly_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every Python process that is started from now on die at ``DEADLY``."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    return path


@pytest.fixture
def quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quarantine:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Quarantine("run", ImageLimits())


def make_load(*images: bytes, chunk: int = 0) -> Load:
    shard = Shard("aa", "tar", "/in/a.tar", "/in", "a.tar", 1, "v")
    records = [Record(f"a.tar/{i}", i, "/in/a.tar", data, 0) for i, data in enumerate(images)]
    return Load([(shard, Chunk("aa", chunk, records, last=True))])


def die_at_work(quarantine: Quarantine, load: Load) -> None:
    """Enter as a process does that is killed inside."""
    if (pid := os.fork()) == 0:
        with quarantine.enter(load):
            os._exit(1)
    os.waitpid(pid, 0)


def test_a_load_that_goes_well_or_fails_leaves_no_note(quarantine: Quarantine, tmp_path: Path):
    load = make_load(b"x")
    with quarantine.enter(load) as given:
        assert given == load
        assert len(list(tmp_path.rglob("*"))) == 2
    with pytest.raises(ZeroDivisionError), quarantine.enter(load):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_images_that_kill_their_decoder_are_found_and_the_others_are_kept(deadly_decoder: str):
    images = [make_jpeg(0), DEADLY, b"broken", make_jpeg(2), DEADLY]
    assert find_deadly(images, ImageLimits()) == {1, 4}


def test_a_load_is_suspect_after_some_deaths_and_given_up_after_more(
    quarantine: Quarantine, deadly_decoder: str
):
    load = make_load(make_jpeg(0), DEADLY)
    for _ in range(SUSPECT_DEATHS):
        with quarantine.enter(make_load(DEADLY, chunk=1)) as given:
            assert given.records[0].status == "ok"
        die_at_work(quarantine, load)
    with quarantine.enter(load) as given:
        assert [record.status for record in given.records] == ["ok", "unreadable"]
        assert given.records[1].error == "it kills the process that decodes it"
    for _ in range(FATAL_DEATHS):
        die_at_work(quarantine, make_load(b"harmless", chunk=2))
    with (
        pytest.raises(
            ClusterError, match=r"5 processes died at work on images of /in/a\.tar; look"
        ),
        quarantine.enter(make_load(b"harmless", chunk=2)),
    ):
        pass


@pytest.mark.slow
def test_a_picture_that_crashes_every_actor_becomes_a_row(
    deadly_decoder: str, weights: Path, tmp_path: Path
):
    images = {f"{i}.jpg": make_jpeg(i) for i in range(6)} | {"deadly.jpg": DEADLY}
    write_loose(tmp_path / "in", images)
    config = make_config(tmp_path / "in", tmp_path / "out", weights, chunk_images=4)
    with start_job(config, tmp_path, PYTHONPATH=deadly_decoder) as job:
        assert job.wait(250) == 0, job.log.read_text()[-2000:]
    rows = read_rows(config.output)
    statuses = {key: row["status"] for key, row in rows.items()}
    assert statuses == dict.fromkeys(images, "ok") | {"deadly.jpg": "unreadable"}
    assert rows["deadly.jpg"]["error"] == "it kills the process that decodes it"
