"""Object stores and disks that fail: what passes is survived, what does not says so at once."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_fault_input
from runs import count_files, list_files, read_rows, start_job, wait_until
from s3.faulty_proxy import Fault, FaultyProxy
from table import TRIALS

from pipeline.config import StorageOptions
from pipeline.embed_job.run import embed
from pipeline.errors import AccessError, StorageError
from pipeline.output.verify import verify_output
from pipeline.storage import Storage

pytestmark = pytest.mark.slow

# Each kind strikes once for certain before chance decides.
PASSING = (
    Fault("slow_down"),
    Fault("internal_error"),
    Fault("reset", method="GET", after_bytes=3000),
    Fault("short", method="GET", after_bytes=3000),
    Fault("lost_answer", method="PUT"),
    Fault("slow_down", probability=0.1, times=None),
    Fault("internal_error", probability=0.1, times=None),
    Fault("reset", method="GET", after_bytes=3000, probability=0.1, times=None),
    Fault("short", method="GET", after_bytes=3000, probability=0.1, times=None),
    Fault("lost_answer", method="PUT", probability=0.2, times=None),
    Fault("stall", skip=5, times=2),
    Fault("stall_body", method="GET", key="*/in/*", skip=3, times=1, after_bytes=500),
)


@pytest.fixture(scope="module")
def remote(s3_server, undisturbed, tmp_path_factory):
    """The input of the undisturbed run in a bucket, and the rows of a run over it there."""
    folder = tmp_path_factory.mktemp("remote")
    write_fault_input(folder / "in")
    bucket, storage = s3_server.make_bucket(), s3_server.storage()
    for name in list_files(folder / "in"):
        storage.upload(folder / "in" / name, f"{bucket}/in/{name}")
    config = replace(
        undisturbed.config,
        input=(f"{bucket}/in",),
        output=f"{bucket}/expected",
        storage=StorageOptions(endpoint_url=s3_server.endpoint_url),
    )
    embed(config)
    rows = read_rows(config.output, storage)
    assert {key: row["sha256"] for key, row in rows.items()} == {
        key: row["sha256"] for key, row in undisturbed.rows.items()
    }
    return config, rows


def through(proxy, config, name: str, **options):
    """Return the settings of a run through the proxy to an output of its own."""
    storage = replace(config.storage, endpoint_url=proxy.endpoint_url, **options)
    return replace(config, output=config.output.replace("expected", name), storage=storage)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_passing_faults_of_every_kind_are_survived(trial: int, remote, s3_server, fault_table):
    config, rows = remote
    with FaultyProxy(s3_server.endpoint_url, seed=trial) as proxy:
        config = through(
            proxy, config, f"passing{trial}", storage_attempts=12, storage_timeout_s=5.0
        )
        proxy.inject(*map(replace_fault, PASSING))
        report = embed(config)
        struck = {kind: count_struck(proxy, kind) for kind in {fault.kind for fault in PASSING}}
    assert all(struck.values()), struck
    assert report.failed_shards == {}
    for kind, number in struck.items():
        fault = f"S3: {kind}, {number} requests of run {trial}"
        fault_table.check(fault, config.output, rows, s3_server.storage())


def replace_fault(fault: Fault) -> Fault:
    """Return a rule that has struck nobody yet."""
    names = ("kind", "method", "key", "skip", "times", "probability", "after_bytes")
    return Fault(**{name: getattr(fault, name) for name in names})


def count_struck(proxy, kind: str) -> int:
    return sum(seen.fault == kind for seen in list(proxy.seen))


def test_a_shard_that_storage_keeps_refusing_is_reported_and_the_others_are_done(
    remote, faulty_s3, s3_server, fault_table
):
    config, rows = remote
    config = through(faulty_s3, config, "refusing", storage_attempts=2)
    faulty_s3.inject(Fault("internal_error", method="GET", key="*/in/3.tar", times=None))
    with pytest.raises(StorageError, match=r"1 objects could not be read.*3\.tar.*run again") as e:
        embed(config)
    assert e.value.report.shards["failed"] == 1
    committed = read_rows(config.output, s3_server.storage())
    assert set(rows) - set(committed) == {key for key in rows if key.startswith("3.tar/")}
    faulty_s3.clear()
    report = embed(config)
    assert report.images.embedded == 16
    fault_table.check(
        "S3: one shard refused, then run again", config.output, rows, s3_server.storage()
    )


def test_credentials_that_have_expired_end_a_run_at_once(remote, faulty_s3):
    config, _ = remote
    config = through(faulty_s3, config, "expired", storage_attempts=6)
    faulty_s3.inject(Fault("expired", times=None))
    with pytest.raises(AccessError, match=r"ExpiredToken|expired|renew the credentials"):
        embed(config)
    assert len(faulty_s3.seen) <= 4


def test_credentials_that_expire_on_the_way_end_the_run_and_lose_nothing(
    remote, faulty_s3, s3_server, fault_table
):
    config, rows = remote
    config = through(faulty_s3, config, "expiring")
    faulty_s3.inject(Fault("expired", method="PUT", key="*/parts/*", skip=9, times=None))
    with pytest.raises(AccessError, match="renew the credentials in the environment"):
        embed(config)
    faulty_s3.clear()
    embed(config)
    fault_table.check(
        "S3: credentials expire mid-run, then run again", config.output, rows, s3_server.storage()
    )


def test_a_store_that_goes_away_for_long_ends_the_run_and_a_rerun_completes_it(
    remote, faulty_s3, s3_server, fault_table
):
    config, rows = remote
    config = through(faulty_s3, config, "away", storage_attempts=2)
    faulty_s3.inject(Fault("slow_down", method="PUT", key="*/away/parts/*", skip=9, times=None))
    with pytest.raises(StorageError, match=r"failed 2 times, .*check the store and the network"):
        embed(config)
    faulty_s3.clear()
    embed(config)
    fault_table.check(
        "S3: outage for writes, then run again", config.output, rows, s3_server.storage()
    )


# Disks


@contextmanager
def mount(folder: Path, options: str) -> Iterator[None]:
    """Mount an empty file system in memory at ``folder``."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(
    undisturbed, fault_table, weights: Path, tmp_path: Path
):
    output = tmp_path / "out"
    room = weights.stat().st_size + 400 * 1024
    config = replace(undisturbed.config, output=str(output))
    with mount(output, f"size={room}"):
        with pytest.raises(StorageError, match="No space left on device; free some space there"):
            embed(config)
        assert not (output / "lease.json").exists()
        assert count_files(output, "parts") > 0
        assert verify_output(str(output), Storage()).problems == ()
        assert not [path for path in output.rglob(".~*") if "lock" not in path.name]
        subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
        embed(config)
        fault_table.check("local output: disk full, then run again", output, undisturbed.rows)


def test_an_output_that_may_not_be_written_is_named_before_anything_runs(
    undisturbed, ray_cluster: str, tmp_path: Path
):
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output / "sub"), ray_address=ray_cluster)
    with mount(output, "size=1m,ro"), start_job(config, tmp_path) as job:
        assert job.wait() == 1
        words = job.log.read_text().splitlines()[-1]
        assert words.startswith(f"error: cannot write '{output}/sub")
        assert "Read-only file system; give this user the permission, or choose another" in words


# Ctrl-C


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(
    undisturbed, fault_table, tmp_path: Path
):
    """With a Ray of its own, which gets the signal as well, as it would from a terminal."""
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output))
    with start_job(config, tmp_path) as job:
        wait_until(lambda: count_files(output, "commits") >= 1)
        job.interrupt()
        assert job.wait() == 130
        lines = job.log.read_text().splitlines()
        assert lines[-1] == "stopped; the same command goes on from the committed shards"
        assert not any("Traceback" in line for line in lines), lines
    assert not (output / "lease.json").exists()
    assert 0 < len(read_rows(output)) < len(undisturbed.rows)
    embed(config)
    fault_table.check("driver: Ctrl-C, then run again", output, undisturbed.rows)
