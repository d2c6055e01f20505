"""Decode processes: the rows of an undisturbed decoder, whatever happens to the processes."""

import gc
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from decoders import install_faulty_decoder, make_fault, once
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, make_hostile_pictures, make_jpeg, make_picture
from PIL import Image

from pipeline.errors import ShortageError
from pipeline.images.batches import FILLING
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker
from pipeline.images.decode import ImageLimits, image_digest
from pipeline.images.decoder import SHORTAGE_EXIT, Setup
from pipeline.images.host import Crop, CropRecipe
from pipeline.images.pool import TRIES, DecodePool
from pipeline.images.process import explain_exit
from pipeline.images.resize import DataConfig
from pipeline.records import Embedding, Record

GEOMETRY = DataConfig(32, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RECIPE = CropRecipe(GEOMETRY, "apply", False, ImageLimits(max_pixels=100_000_000))
GOOD = [make_jpeg(seed, (48 + seed, 40)) for seed in range(6)]

Make = Callable[..., HostCropMaker]


@pytest.fixture(scope="module", autouse=True)
def faulty_decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let every decode process do what ``make_fault`` says."""
    folder = install_faulty_decoder(tmp_path_factory.mktemp("faulty") / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr("pipeline.images.pool._FIRST_PAUSE_S", 0.005)
        yield


@pytest.fixture(scope="module")
def make_maker() -> Iterator[Make]:
    """Makes crop makers that are closed in the end."""
    made: dict[str, HostCropMaker] = {}

    def make(processes: int = 2, *, timeout_s: float = 30.0, batch_size: int = 8, **recipe):
        key = f"{processes} {timeout_s} {batch_size} {recipe}"
        if key not in made:
            buffers = SharedBuffers(batch_size, GEOMETRY.image_size)
            made[key] = HostCropMaker(
                replace(RECIPE, **recipe), buffers, processes=processes, timeout_s=timeout_s
            )
        return made[key]

    yield make
    for maker in made.values():
        maker.close()


def make_records(images: list[bytes]) -> list[Record]:
    return [Record(f"in/{i}.jpg", i, "in.tar", data, None) for i, data in enumerate(images)]


def list_statuses(maker: HostCropMaker, images: list[bytes]) -> list[str]:
    made = maker.make(make_records(images))
    return ["ok" if isinstance(item, Crop) else item.status for item in made]


def find_failure(maker: HostCropMaker, image: bytes) -> Embedding:
    """Return what becomes of an image between good ones, which must not suffer."""
    found = list(maker.make(make_records([*GOOD[:2], image, *GOOD[2:]])))
    assert [type(item) for item in found[:2] + found[3:]] == [Crop] * 6
    assert isinstance(found[2], Embedding)
    assert found[2].digest == image_digest(image)
    return found[2]


def list_pids(maker: HostCropMaker) -> list[int]:
    assert maker._pool is not None
    return maker._pool.pids


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 20
    while any(map(lives, pids)):
        assert time.monotonic() < deadline_s, "decode processes live on"
        os.sched_yield()


HOSTILE = [hostile.data for hostile in make_hostile_pictures().values()]
UNREAD = replace(make_records([b""])[0], status="truncated", error="the archive ends")


@pytest.mark.parametrize("processes", [1, 3])
@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("ggggbu"), max_size=60),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_every_image_gets_the_bits_and_the_reason_of_decoding_in_place(
    make_maker: Make, processes: int, kinds: list[str], batch_size: int, seed: int
) -> None:
    images = {"g": GOOD, "b": HOSTILE, "u": [b""]}
    records = make_records([images[k][(seed + i) % len(images[k])] for i, k in enumerate(kinds)])
    records = [UNREAD if k == "u" else r for k, r in zip(kinds, records, strict=True)]
    maker, inline = make_maker(processes), make_maker(0)
    found: dict[int, object] = {}
    sizes = []
    for batch in maker.make_batches(records, lambda: batch_size):
        sizes.append(len(batch.members))
        for pixels, (index, known) in zip(batch.pixels, batch.members, strict=True):
            assert index not in found
            found[index] = (pixels.tobytes(), known.width, known.height, known.digest)
        assert not set(found).intersection(dict(batch.failed))
        found.update(batch.failed)
        maker._buffers.give_back(batch.buffer)
    expected = [
        (item.pixels.tobytes(), item.width, item.height, item.digest)
        if isinstance(item, Crop)
        else item
        for item in inline.make(records)
    ]
    assert [found[i] for i in range(len(records))] == expected
    assert sum(size < batch_size for size in sizes) <= FILLING


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(0)", "exit code 0"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_an_image_that_crashes_its_decoder_costs_its_row_only(
    make_maker: Make, code: str, words: str
) -> None:
    maker = make_maker(2)
    failure = find_failure(maker, make_fault(code))
    assert failure.status == "unreadable"
    assert failure.error == f"it kills the process that decodes it ({words})"
    assert list_statuses(maker, GOOD * 3) == ["ok"] * 18
    assert len(list_pids(maker)) == 2


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",  # takes CPU time
        "sum(range(10**12))",  # takes CPU time and never comes back to the interpreter
        "time.sleep(600)",  # waits for something that never happens
        "ctypes.PyDLL(None).sleep(600)",  # the same, with the interpreter's lock in its hand
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); time.sleep(600)",
    ],
)
def test_a_decoder_that_hangs_costs_its_images_row_only(make_maker: Make, code: str) -> None:
    maker = make_maker(2, timeout_s=0.3)
    failure = find_failure(maker, make_fault(code))
    assert failure.status == "unreadable"
    assert failure.error == "decoding took longer than 0.3 s"
    assert list_statuses(maker, GOOD) == ["ok"] * 6


def test_a_jpeg_2000_that_takes_too_long_is_given_up(make_maker: Make) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    failure = find_failure(make_maker(2, timeout_s=0.2), encode(Image.fromarray(noise), "JPEG2000"))
    assert (failure.status, failure.error) == ("unreadable", "decoding took longer than 0.2 s")


def test_time_in_which_a_decoder_is_stopped_does_not_count(make_maker: Make) -> None:
    maker = make_maker(1, timeout_s=0.3)
    found: list[list[str]] = []
    images = [make_fault("os.kill(os.getpid(), signal.SIGSTOP)")]
    caller = threading.Thread(target=lambda: found.append(list_statuses(maker, images)))
    caller.start()
    while not (pids := list_pids(maker)) or os.waitid(os.P_PID, pids[0], os.WSTOPPED) is None:
        pass
    assert not threading.Event().wait(1.2)  # four times the limit
    os.kill(pids[0], signal.SIGCONT)
    caller.join()
    assert found == [["ok"]]


@pytest.mark.parametrize("code", ["os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_what_happens_once_costs_nothing(make_maker: Make, code: str, tmp_path: Path) -> None:
    image = make_fault(once(code, tmp_path / "flag"))
    assert list_statuses(make_maker(2), [*GOOD, image, *GOOD]) == ["ok"] * 13
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        *((-number, "crashed") for number in (4, 5, 6, 7, 8, 11, 31)),  # of its own doing
        *((number, "crashed") for number in (0, 1, 3, 255)),
        *((-number, "shortage") for number in (1, 2, 3, 9, 15, 24, 63)),  # from outside
        (SHORTAGE_EXIT, "shortage"),
        (-signal.SIGPROF, "overran"),
    ],
)
def test_how_a_process_ended_tells_what_is_to_blame(code: int, cause: str) -> None:
    found, words = explain_exit(code)
    assert found == cause
    assert words


def test_a_decoder_killed_from_outside_each_time_ends_the_call_and_is_no_row(
    make_maker: Make,
) -> None:
    records = make_records([*GOOD, make_fault("os.kill(os.getpid(), signal.SIGKILL)"), *GOOD])
    maker = make_maker(2)
    with pytest.raises(
        ShortageError,
        match=rf"decodes in/6\.jpg was ended {TRIES} times \(SIGKILL\).* or lower --max-pixels",
    ):
        list(maker.make(records))
    assert list_statuses(maker, GOOD) == ["ok"] * 6
    small = make_maker(2, limits=ImageLimits(max_pixels=3000))
    statuses = [getattr(item, "status", "ok") for item in small.make(records)]
    assert statuses == ["ok" if i != 6 else "too_large" for i in range(13)]


def test_idle_processes_that_are_killed_are_replaced(make_maker: Make) -> None:
    maker = make_maker(2)
    assert list_statuses(maker, GOOD) == ["ok"] * 6
    for pid in list_pids(maker):
        os.kill(pid, signal.SIGKILL)
    assert list_statuses(maker, GOOD * 4) == ["ok"] * 24


def test_a_process_without_memory_is_replaced_and_its_image_tried_again(make_maker: Make) -> None:
    """A real shortage: the process may map no more than it has mapped by now."""
    maker = make_maker(1)
    assert list_statuses(maker, GOOD[:1]) == ["ok"]
    [pid] = list_pids(maker)
    mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (mapped + 2**20, resource.RLIM_INFINITY))
    large = encode(make_picture(1, (4000, 3000)), "PNG")
    assert list_statuses(maker, [large]) == ["ok"]
    assert list_pids(maker) != [pid]


def test_an_image_that_asks_for_more_memory_than_any_needs_is_too_large(make_maker: Make) -> None:
    failure = find_failure(make_maker(2), make_fault("bytearray(2**60)"))
    assert failure.status == "too_large"
    assert failure.error == "it asks for more memory than its size needs"


def test_a_decoder_that_eats_all_memory_is_stopped_before_the_machine_suffers(
    make_maker: Make,
) -> None:
    maker = make_maker(1, limits=ImageLimits(max_pixels=100_000))
    failure = find_failure(maker, make_fault("x = []\nwhile True: x.append(bytearray(2**28))"))
    assert failure.status == "too_large"


def test_a_shortage_that_a_decoder_reports_is_no_row(make_maker: Make) -> None:
    image = make_fault("raise OSError(24, 'Too many open files')")
    with pytest.raises(ShortageError, match="short of memory"):
        list(make_maker(2).make(make_records([image])))


def test_without_descriptors_a_call_fails_and_with_some_it_goes_on(tmp_path: Path) -> None:
    program = f"""
import os, resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from images.test_pool import GOOD, RECIPE, list_statuses
from pipeline.errors import ShortageError
from pipeline.images import pool
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker

pool._FIRST_PAUSE_S = 0.005
maker = HostCropMaker(RECIPE, SharedBuffers(8, 32), processes=1, timeout_s=30.0)
print(list_statuses(maker, GOOD[:1]))
os.kill(maker._pool.pids[0], 9)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
while True:
    try:
        taken.append(os.dup(0))
    except OSError:
        break
try:
    list_statuses(maker, GOOD)
except ShortageError as error:
    print(error)
for fd in taken:
    os.close(fd)
print(list_statuses(maker, GOOD))
maker.close()
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    first, words, last = child.stdout.splitlines()
    assert first == "['ok']"
    assert "no decode process can be started or fed: [Errno 24] Too many open files" in words
    assert last == str(["ok"] * 6)


def test_a_machine_without_memory_for_a_batch_says_so() -> None:
    """A real shortage: no file may grow beyond a few batches, which lie in a file in memory."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from images.test_pool import GOOD, RECIPE, list_statuses
from pipeline.errors import ShortageError
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker

resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
for batch_size in (4, 1000):
    maker = HostCropMaker(RECIPE, SharedBuffers(batch_size, 32), processes=0, timeout_s=30.0)
    try:
        print(len(next(maker.make_batches([], lambda: 1)).members))
    except ShortageError as error:
        print(error)
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    fits, words = child.stdout.splitlines()
    assert fits == "0"
    assert words.startswith("there is no memory for a batch of 1000 crops ([Errno 27]")
    assert words.endswith("or lower --batch-size")


def test_elsewhere_than_on_linux_the_caller_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    maker = HostCropMaker(RECIPE, SharedBuffers(8, 32), processes=2, timeout_s=30.0)
    assert maker._pool is None
    assert list_statuses(maker, GOOD) == ["ok"] * 6


def test_a_pause_of_the_whole_machine_makes_no_image_slow() -> None:
    """Owner and decoder are stopped for several times the limit, in the middle of an image."""
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {sys.path[0]!r}]
from decoders import make_fault
from images.test_pool import RECIPE, list_statuses
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker

maker = HostCropMaker(RECIPE, SharedBuffers(8, 32), processes=1, timeout_s=0.4)
image = make_fault("os.write(2, b'x'); start = time.process_time()\\n"
                   "while time.process_time() < start + 0.2: pass")
print(list_statuses(maker, [image]))
maker.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stderr is not None
        assert child.stderr.read(1) == b"x"
        os.killpg(child.pid, signal.SIGSTOP)
        assert not threading.Event().wait(1.6)
        os.killpg(child.pid, signal.SIGCONT)
        assert child.stdout is not None
        assert child.stdout.read() == b"['ok']\n"


def test_a_decode_process_is_small_and_imports_nothing_heavy(
    make_maker: Make, tmp_path: Path
) -> None:
    report = tmp_path / "modules"
    maker = make_maker(1)
    code = f"open({str(report)!r}, 'w').write(' '.join(sys.modules))"
    assert list_statuses(maker, [*GOOD, make_fault(code)]) == ["ok"] * 7
    assert not {"torch", "pyarrow", "ray", "fsspec"} & set(report.read_text().split())
    [pid] = list_pids(maker)
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 80 * 1024


OWNER = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, sys.argv[1]]
from decoders import make_fault
from images.test_pool import GOOD, RECIPE, make_records
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker

maker = HostCropMaker(RECIPE, SharedBuffers(1, 32), processes=2, timeout_s=600.0)
batches = maker.make_batches(make_records([GOOD[0], make_fault("time.sleep(600)")]), lambda: 1)
next(batches)
print(*maker._pool.pids, flush=True)
{{end}}
"""


@pytest.mark.parametrize("end", ["import time; time.sleep(600)", "sys.exit()"])
def test_decode_processes_end_with_their_owner_however_it_ends(end: str) -> None:
    """One of them hangs, the other is idle."""
    command = [sys.executable, "-c", OWNER.format(end=end), sys.path[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        if "sleep" in end:
            owner.kill()
        owner.wait(30)
        wait_until_gone(pids)


def test_closing_ends_processes_that_hang_and_fails_who_waits() -> None:
    maker = HostCropMaker(RECIPE, SharedBuffers(8, 32), processes=1, timeout_s=600.0)
    found: list[Exception] = []

    def call() -> None:
        try:
            list_statuses(maker, [make_fault("time.sleep(600)")])
        except RuntimeError as error:
            found.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while not maker._buffers.notes[0]:
        os.sched_yield()
    pids = list_pids(maker)
    maker.close()
    caller.join()
    assert "closed while it decoded" in str(found[0])
    wait_until_gone(pids)
    with pytest.raises(RuntimeError, match="the decode pool is closed"):
        list_statuses(maker, GOOD)


def test_a_pool_that_is_dropped_ends_its_processes() -> None:
    pool = DecodePool(Setup(RECIPE, 30.0, 8), SharedBuffers(8, 32), processes=1)
    while not pool.pids:
        os.sched_yield()
    pids = pool.pids
    del pool
    gc.collect()
    wait_until_gone(pids)


def test_two_callers_share_processes_even_while_an_image_of_one_hangs(make_maker: Make) -> None:
    maker = make_maker(2, timeout_s=0.3)
    found: dict[str, list[str]] = {}
    hang = make_fault("time.sleep(600)")

    def run(name: str, images: list[bytes]) -> None:
        found[name] = list_statuses(maker, images)

    callers = [
        threading.Thread(target=run, args=("a", [*GOOD, hang, *GOOD, hang])),
        threading.Thread(target=run, args=("b", GOOD * 5)),
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found["a"] == [*["ok"] * 6, "unreadable"] * 2
    assert found["b"] == ["ok"] * 30


def test_a_call_that_nobody_reads_to_its_end_gives_its_buffers_back(make_maker: Make) -> None:
    maker = make_maker(2, batch_size=4)
    for _ in range(5):
        batches = maker.make_batches(make_records(GOOD * 10), lambda: 4)
        batch = next(batches)
        batches.close()
        maker._buffers.give_back(batch.buffer)
    assert len(maker._buffers._mapped) <= FILLING + 1
    assert list_statuses(maker, GOOD) == ["ok"] * 6


def test_processes_begin_before_the_first_batch_is_asked_for(
    make_maker: Make, tmp_path: Path
) -> None:
    maker, begun = make_maker(1), tmp_path / "begun"
    records = make_records([GOOD[0], make_fault(f"open({str(begun)!r}, 'w').close()")])
    deadline_s = time.monotonic() + 20
    with maker.start_batches(records, lambda: 8) as batches:
        while not begun.exists():
            assert time.monotonic() < deadline_s, "nothing began"
            os.sched_yield()
        for batch in batches:
            maker._buffers.give_back(batch.buffer)


def test_memory_is_bounded_by_the_batches_under_way(make_maker: Make) -> None:
    maker = make_maker(2, batch_size=2)
    for batch in maker.make_batches(make_records(GOOD * 20), lambda: 2):
        assert len(maker._buffers._mapped) <= FILLING + 1
        maker._buffers.give_back(batch.buffer)


def test_a_large_picture_travels_whole(make_maker: Make) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (2000, 1500, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    assert list_statuses(make_maker(1), [buffer.getvalue() + bytes(20_000_000)]) == ["ok"]
