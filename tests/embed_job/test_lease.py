"""One live run per output."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.embed_job.lease import Holder, Lease
from pipeline.errors import LeaseError, StorageError
from pipeline.storage import Storage
from pipeline.storage.local import LocalStore

STORAGE = Storage()


def take(output: Path, run_id: str = "mine", **options) -> Lease:
    return Lease(str(output), run_id, storage=STORAGE, **options)


def leave_behind(output: Path, **changes) -> bytes:
    """Write the lease of another holder, by default a live process on another machine."""
    other = replace(Holder.here("theirs"), host="elsewhere", boot="another boot")
    data = replace(other, **changes).to_json()
    output.mkdir(exist_ok=True)
    (output / "lease.json").write_bytes(data)
    return data


def find_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def read_holder(output: Path) -> Holder:
    return Holder(**json.loads((output / "lease.json").read_bytes()))


def test_a_lease_names_its_holder_while_it_is_held_and_is_gone_afterwards(tmp_path: Path):
    with take(tmp_path) as lease:
        holder = read_holder(tmp_path)
        assert (holder.run_id, holder.pid) == ("mine", os.getpid())
        lease.check()
    assert not (tmp_path / "lease.json").exists()


def test_a_lease_is_given_back_when_the_run_fails(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), take(tmp_path):
        raise ZeroDivisionError
    with take(tmp_path):
        pass


def test_a_live_run_on_this_machine_keeps_others_out_and_is_named(tmp_path: Path):
    with take(tmp_path, "theirs"):
        with pytest.raises(LeaseError) as caught, take(tmp_path):
            pass
        assert f"run theirs (process {os.getpid()} on " in str(caught.value)
        assert "wait for it to end, or stop it" in str(caught.value)
        assert read_holder(tmp_path).run_id == "theirs"


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path: Path):
    leave_behind(tmp_path, boot=Holder.here("").boot, pid=find_dead_pid())
    with take(tmp_path):
        assert read_holder(tmp_path).run_id == "mine"


def test_a_process_id_that_was_used_again_does_not_keep_a_lease_alive(tmp_path: Path):
    leave_behind(tmp_path, boot=Holder.here("").boot, pid=os.getpid(), started="1")
    with take(tmp_path):
        assert read_holder(tmp_path).run_id == "mine"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"half a le",
        b"[1, 2]",
        b"null",
        b'{"run_id": "x"}',
        *(
            json.dumps(asdict(Holder.here("theirs")) | odd).encode()
            for odd in (
                {"pid": "7"},
                {"pid": True},
                {"pid": -1},
                {"pid": 1e3},
                {"boot": None},
                {"started": 4},
                {"renewed_s": "now"},
            )
        ),
    ],
)
def test_a_lease_that_nobody_can_read_is_taken_over_when_it_stays_unchanged(
    data: bytes, tmp_path: Path
):
    (tmp_path / "lease.json").write_bytes(data)
    if b'"renewed_s": "now"' in data:  # what its clock says does not count
        with pytest.raises(LeaseError, match="run theirs"), take(tmp_path):
            pass
        return
    with take(tmp_path, expire_s=0.1):
        assert read_holder(tmp_path).run_id == "mine"


def test_a_process_that_has_ended_but_was_not_waited_for_is_dead(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    leave_behind(tmp_path, boot=Holder.here("").boot, pid=process.pid)
    with take(tmp_path):
        assert read_holder(tmp_path).run_id == "mine"
    process.wait()


def test_a_process_that_was_paused_past_its_lease_notices_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its renewals slept with it, so the check itself has to ask the store."""
    with take(tmp_path, expire_s=3600.0) as lease:  # no renewal comes within this test
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        leave_behind(tmp_path)  # another machine took it over
        lease.check()
        monkeypatch.setattr(time, "clock_gettime", lambda _: now_s + 3601.0)
        with pytest.raises(LeaseError, match=r"another run took .* over; this one stops"):
            lease.check()


def test_a_long_pause_with_nobody_else_about_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with take(tmp_path, expire_s=3600.0) as lease:
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr(time, "clock_gettime", lambda _: now_s + 3601.0)
        lease.check()
        assert read_holder(tmp_path).run_id == "mine"


def test_a_renewal_whose_replies_were_all_lost_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = LocalStore.put_if

    def lose_reply(self: LocalStore, *args: object, **options: object) -> str:
        real(self, *args, **options)
        raise StorageError("the reply was lost")

    with take(tmp_path, expire_s=3600.0) as lease:
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr(time, "clock_gettime", lambda _: now_s + 3601.0)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put_if", lose_reply)
            with pytest.raises(StorageError, match="reply was lost"):
                lease.check()
        lease.check()
    assert not (tmp_path / "lease.json").exists()


def test_a_run_on_another_machine_is_dead_when_its_lease_stays_unchanged(tmp_path: Path):
    leave_behind(tmp_path)
    with take(tmp_path, expire_s=0.2):
        assert read_holder(tmp_path).run_id == "mine"


@pytest.mark.parametrize("renewed_s", [0.0, 4e9])
def test_a_holder_whose_clock_is_wrong_by_years_is_not_taken_for_dead(
    renewed_s: float, tmp_path: Path
):
    data = leave_behind(tmp_path, renewed_s=renewed_s)

    def renew() -> None:
        STORAGE.put(str(tmp_path / "lease.json"), data + b" ")

    timer = threading.Timer(0.3, renew)
    timer.start()
    with pytest.raises(LeaseError, match="run theirs"), take(tmp_path, expire_s=2.0):
        pass
    timer.join()


def test_a_run_on_another_machine_that_renews_keeps_others_out(tmp_path: Path):
    leave_behind(tmp_path)
    done = threading.Event()

    def renew() -> None:
        beat = 0
        while not done.wait(0.02):
            beat += 1
            STORAGE.put(str(tmp_path / "lease.json"), leave_behind_data(beat))

    def leave_behind_data(beat: int) -> bytes:
        other = replace(Holder.here("theirs"), host="elsewhere", boot="another boot")
        return json.dumps(asdict(other) | {"renewed_s": other.renewed_s + beat}).encode()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(LeaseError, match=r"run theirs .* on elsewhere"),
            take(tmp_path, expire_s=1.0),
        ):
            pass
    finally:
        done.set()
        thread.join()


def test_a_lease_given_back_while_we_wait_is_ours(tmp_path: Path):
    leave_behind(tmp_path)
    timer = threading.Timer(0.1, (tmp_path / "lease.json").unlink)
    timer.start()
    with take(tmp_path, expire_s=2.0):
        assert read_holder(tmp_path).run_id == "mine"
    timer.join()


def test_a_run_whose_lease_was_taken_over_notices_and_leaves_the_new_one_alone(tmp_path: Path):
    with take(tmp_path, expire_s=0.2) as lease:
        theirs = leave_behind(tmp_path)
        lease._thread.join(10)  # the renewal that finds it ends the thread
        with pytest.raises(LeaseError, match=r"another run took .* over; this one stops"):
            lease.check()
    assert (tmp_path / "lease.json").read_bytes() == theirs


def test_a_lease_taken_over_just_before_the_end_is_not_deleted(tmp_path: Path):
    with take(tmp_path, expire_s=600.0):
        theirs = leave_behind(tmp_path)
    assert (tmp_path / "lease.json").read_bytes() == theirs


def test_a_store_in_trouble_does_not_hold_up_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, answered = threading.Event(), threading.Event()
    renew = Storage.put_if_version

    def answer_late(self: Storage, uri: str, data: bytes, version: str) -> str:
        asked.set()
        assert answered.wait(60)
        return renew(self, uri, data, version)

    monkeypatch.setattr(Storage, "put_if_version", answer_late)
    monkeypatch.setattr("pipeline.embed_job.lease.END_S", 0.1)
    with take(tmp_path, expire_s=0.2) as lease:
        assert asked.wait(60)
    assert (tmp_path / "lease.json").exists()
    answered.set()
    lease._thread.join(60)
    assert not (tmp_path / "lease.json").exists()


def test_a_held_lease_is_renewed(tmp_path: Path):
    with take(tmp_path, expire_s=0.2):
        first = read_holder(tmp_path).renewed_s
        deadline = threading.Event()
        for _ in range(200):
            if read_holder(tmp_path).renewed_s > first:
                break
            deadline.wait(0.02)
        assert read_holder(tmp_path).renewed_s > first


def test_of_two_runs_that_start_at_once_one_wins(tmp_path: Path):
    outcomes: list[str] = []
    barrier, finished = threading.Barrier(2), threading.Barrier(2)

    def run(name: str) -> None:
        barrier.wait()
        try:
            with take(tmp_path, name):
                outcomes.append("won")
                finished.wait()
        except LeaseError:
            outcomes.append("refused")
            finished.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "won"]


def test_a_lease_works_on_s3_as_well(s3_server, s3_bucket: str):
    storage = s3_server.storage()
    with (
        Lease(s3_bucket, "theirs", storage=storage),
        pytest.raises(LeaseError, match="run theirs"),
        Lease(s3_bucket, "mine", storage=storage),
    ):
        pass
    with Lease(s3_bucket, "mine", storage=storage):
        assert json.loads(storage.read(f"{s3_bucket}/lease.json"))["run_id"] == "mine"
