"""Processes and machines that die at any moment: the rows in the end are always the same."""

import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHUNKS
from pictures import encode, make_picture, write_tar
from ray.cluster_utils import Cluster
from runs import count_files, read_rows, start_job, wait_until
from s3.faulty_proxy import Fault
from table import TRIALS

from pipeline.config import StorageOptions
from pipeline.embed_job.run import embed

pytestmark = pytest.mark.slow


def kill_workers(title: str) -> int:
    """Kill the processes of this session's own cluster that Ray has given a title."""
    return kill_processes(lambda words: words.startswith(f"ray::{title}"))


def kill_decoders() -> int:
    """Kill the decode processes of this session's own cluster."""
    return kill_processes(lambda words: "pipeline.images.decoder" in words)


def kill_processes(is_victim: Callable[[str], bool]) -> int:
    victims = [pid for pid in list_descendants(os.getpid()) if is_victim(read_command(pid))]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(victims)


def list_descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from list_descendants(int(child))


def read_command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_killed_driver_loses_and_doubles_nothing(
    trial: int, undisturbed, fault_table, ray_cluster: str, tmp_path: Path
):
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output), ray_address=ray_cluster)
    dice = random.Random(f"driver {trial}")
    for _ in range(2):  # killed, started again and killed again
        moment = dice.randrange(CHUNKS)
        with start_job(config, tmp_path) as job:
            wait_until(
                lambda m=moment: count_files(output, "parts") >= m or job.process.poll() is not None
            )
            job.kill()
    embed(config)
    fault_table.check("driver: SIGKILL twice, then run again", output, undisturbed.rows)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_actors_are_replaced(trial: int, undisturbed, fault_table, tmp_path: Path):
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output))
    dice = random.Random(f"actor {trial}")
    moments = sorted(dice.sample(range(1, CHUNKS - 6), 2))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(embed, config)
        for moment in moments:
            wait_until(lambda m=moment: count_files(output, "parts") >= m or run.done())
            assert kill_workers("MapWorker") or run.done()
        report = run.result()
    assert report.failed_shards == {}
    fault_table.check("embedder actors: SIGKILL mid-batch, twice", output, undisturbed.rows)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_decode_processes_are_replaced(trial: int, undisturbed, fault_table, tmp_path: Path):
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output))
    dice = random.Random(f"decoder {trial}")
    moments = sorted(dice.sample(range(1, CHUNKS - 6), 4))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(embed, config)
        for moment in moments:
            wait_until(lambda m=moment: count_files(output, "parts") >= m or run.done())
            wait_until(lambda: kill_decoders() or run.done())
        report = run.result()
    assert report.failed_shards == {}
    fault_table.check("decode processes: SIGKILL, four times", output, undisturbed.rows)
    assert kill_decoders() == 0  # they end with their actors


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_run_whose_ray_dies_says_so_and_loses_nothing(
    name: str, undisturbed, fault_table, tmp_path: Path
):
    """Ray's library ends the driver at once, without an exception that it could explain."""
    output = tmp_path / "out"
    config = replace(undisturbed.config, output=str(output))
    with start_job(config, tmp_path, RAY_ADDRESS="") as job:
        wait_until(
            lambda: count_files(output, "parts") or job.process.poll() is not None, timeout_s=240.0
        )
        daemons = list(list_descendants(job.process.pid))
        (daemon,) = [pid for pid in daemons if Path(read_command(pid).split("\0")[0]).name == name]
        os.kill(daemon, signal.SIGKILL)
        assert job.wait(300.0) == 1
        said = job.log.read_text()
    assert re.search(r"error: (the run ended without a word|Ray gave up)", said), said
    assert "then run again" in said
    embed(config)
    fault_table.check(f"{name}: SIGKILL, then run again", output, undisturbed.rows)


def test_a_read_worker_killed_in_the_middle_of_a_shard_is_replaced(
    undisturbed, fault_table, s3_server, s3_bucket: str, faulty_s3, tmp_path: Path
):
    """The worker hangs in its second request for a large shard when it is killed."""
    storage = s3_server.storage()
    noise = [random.Random(i).randbytes(700_000) for i in range(15)]
    members = [(f"{i}.bmp", encode(make_picture(i), "BMP") + noise[i]) for i in range(15)]
    storage.upload(write_tar(tmp_path / "big.tar", members), f"{s3_bucket}/in/big.tar")
    options = StorageOptions(endpoint_url=faulty_s3.endpoint_url)
    config = replace(undisturbed.config, input=(f"{s3_bucket}/in",), storage=options)
    embed(replace(config, output=str(tmp_path / "expected")))
    expected = read_rows(tmp_path / "expected")
    assert {row["status"] for row in expected.values()} == {"ok"}
    output = tmp_path / "out"
    faulty_s3.inject(Fault("stall", method="GET", key="*/big.tar", skip=1, times=1))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(embed, replace(config, output=str(output)))
        wait_until(lambda: faulty_s3.count("GET", faulty=True) or run.done())
        wait_until(lambda: count_files(output, "parts") >= 1 or run.done())
        assert kill_workers("Read_Shard") == 1
        run.result()
    fault_table.check("read worker: SIGKILL in the middle of a shard", output, expected)


@pytest.fixture
def nodes() -> Iterator["Nodes"]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.stop()


class Nodes:
    """A cluster of several nodes on this machine: a head without cores, and workers."""

    def __init__(self) -> None:
        system = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "_system_config": system}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(2)]

    def add(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def lose(self) -> None:
        """Kill every process of the oldest worker node at once."""
        self.cluster.remove_node(self.workers.pop(0), allow_graceful=False)

    def stop(self) -> None:
        self.cluster.shutdown()


def test_every_node_may_be_lost_while_others_come(
    undisturbed, fault_table, nodes: Nodes, tmp_path: Path
):
    output = tmp_path / "out"
    address = nodes.cluster.address
    config = replace(undisturbed.config, output=str(output), actors=2, ray_address=address)
    dice = random.Random("nodes")
    moments = sorted(dice.sample(range(1, CHUNKS - 10), 2))
    with start_job(config, tmp_path) as job:
        for moment in moments:
            wait_until(
                lambda m=moment: count_files(output, "parts") >= m or job.process.poll() is not None
            )
            nodes.workers.append(nodes.add())
            nodes.lose()
        assert job.wait(280) == 0, job.log.read_text()[-2000:]
    fault_table.check("nodes: both lost in turn, new ones join", output, undisturbed.rows)
