import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from pictures import make_jpeg

from pipeline.errors import RecordError
from pipeline.images.decode import ImageLimits, decode_image
from pipeline.images.pool import DecodePool

LIMITS = ImageLimits()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end of the test, so that hanging decoders end with it."""
    event = threading.Event()
    yield event
    event.set()


def hang_at(numbers: set[int], release: threading.Event) -> Callable[[int], int]:
    def decode(item: int) -> int:
        if item in numbers:
            release.wait()
        return item * 10

    return decode


@pytest.mark.parametrize("threads", [0, 1, 2, 8])
def test_a_pool_keeps_the_order_and_yields_failures_in_their_place(threads: int) -> None:
    data = [make_jpeg(0, (8, 8)), b"", make_jpeg(1, (9, 9)), b"<html>"] * 10

    def decode(item: bytes) -> tuple[int, int]:
        return decode_image(item, limits=LIMITS).size

    with DecodePool(threads) as pool:
        found = list(pool.map_images(data, decode))
    assert [getattr(result, "status", result) for result in found] == [
        (8, 8),
        "unreadable",
        (9, 9),
        "unsupported",
    ] * 10


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_images_that_hang_are_given_up_and_the_pool_keeps_its_size(
    threads: int, release: threading.Event
) -> None:
    hanging = {0, 1, 2, 3, 9}
    with DecodePool(threads, timeout_s=0.05) as pool:
        found = list(pool.map_images(range(10), hang_at(hanging, release)))
        again = list(pool.map_images(range(20), lambda item: item))
    for item, result in enumerate(found):
        if item in hanging:
            assert isinstance(result, RecordError)
            assert (result.status, result.reason) == (
                "unreadable",
                "decoding took longer than 0.05 s",
            )
        else:
            assert result == item * 10
    assert again == list(range(20))
    assert pool.abandoned == len(hanging)


def test_the_time_limit_counts_an_images_own_work_not_its_wait() -> None:
    with DecodePool(1, timeout_s=1.0) as pool:
        found = list(pool.map_images([0.3] * 5, time.sleep))
    assert found == [None] * 5


def test_an_image_that_ends_after_it_was_given_up_changes_nothing(release: threading.Event) -> None:
    ended = threading.Event()

    def decode(item: int) -> int:
        if item == 0:
            release.wait()
            ended.set()
        return item

    with DecodePool(1, timeout_s=0.05) as pool:
        first, *rest = pool.map_images(range(3), decode)
        release.set()
        assert ended.wait(10)
        assert list(pool.map_images(range(1, 4), decode)) == [1, 2, 3]
    assert isinstance(first, RecordError)
    assert rest == [1, 2]


def test_another_exception_is_raised_where_its_image_would_be() -> None:
    with DecodePool(2) as pool:
        results = pool.map_images([1, 0, 1], lambda item: 1 // item)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert list(pool.map_images([1], lambda item: item)) == [1]


def test_a_pool_reads_ahead_by_twice_its_threads_only() -> None:
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            pulled.append(item)
            yield item

    with DecodePool(3) as pool:
        results = pool.map_images(items(), lambda item: item)
        assert next(results) == 0
        assert len(pulled) == 7
        results.close()


def test_what_was_read_ahead_is_not_decoded_once_nobody_wants_it(release: threading.Event) -> None:
    decoded: list[int] = []

    def decode(item: int) -> int:
        if item == 1:
            release.wait()
        decoded.append(item)
        return item

    with DecodePool(1) as pool:
        results = pool.map_images(range(10), decode)
        assert next(results) == 0
        results.close()
        release.set()
        assert list(pool.map_images([100], decode)) == [100]
    assert set(decoded) <= {0, 1, 100}


def test_a_closed_pool_says_so_instead_of_waiting_for_ever() -> None:
    pool = DecodePool(1)
    pool.close()
    with pytest.raises(RuntimeError, match="the decode pool is closed"):
        next(pool.map_images([1], lambda item: item))


def test_two_callers_share_a_pool_even_while_an_image_of_one_hangs(
    release: threading.Event,
) -> None:
    found: dict[str, list[object]] = {}

    def run(name: str, hanging: set[int]) -> None:
        found[name] = list(pool.map_images(range(30), hang_at(hanging, release)))

    with DecodePool(2, timeout_s=0.1) as pool:
        callers = [
            threading.Thread(target=run, args=("a", {3, 4, 20})),
            threading.Thread(target=run, args=("b", set())),
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert found["b"] == [item * 10 for item in range(30)]
    assert [i for i, r in enumerate(found["a"]) if isinstance(r, RecordError)] == [3, 4, 20]


def test_a_hanging_decoder_does_not_stop_the_process_from_ending() -> None:
    program = (
        "import threading\n"
        "from pipeline.images.pool import DecodePool\n"
        "pool = DecodePool(2, timeout_s=0.05)\n"
        "wait = threading.Event().wait\n"
        "print(list(pool.map_images([0, 1], lambda item: wait() if item else item)))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "decoding took longer than 0.05 s" in child.stdout
