"""Micro-batches, queues, hot swap and shutdown, under real concurrent HTTP."""

import asyncio
import threading
import time
from dataclasses import replace

import httpx
import pytest

from pipeline.errors import CorruptionError
from pipeline.service.batching import MicroBatcher
from pipeline.service.problems import Problem
from service.gallery import Gallery, make_image
from service.services import LIMITS, ColourEmbedder, run_service


async def post_all(url, bodies, path="/v1/search", **kinds):
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        return await asyncio.gather(*(http.post(path, **body) for body in bodies))


def search_body(number, **options):
    key = f"photos/000.tar/{number:05d}.jpg"
    return {"json": {"query": {"key": key}, "k": 5} | options}


def test_concurrent_searches_of_all_kinds_each_get_their_own_answer(service):
    bodies = [
        search_body(n, k=1 + n % 7, filter="price > 30" if n % 3 == 0 else None, exact=n % 5 == 0)
        for n in range(60)
    ]
    responses = asyncio.run(post_all(service.url, bodies))
    assert {r.status_code for r in responses} == {200}
    for number, response in enumerate(responses):
        results = response.json()["results"]
        key = f"photos/000.tar/{number:05d}.jpg"
        assert len(results) == 1 + number % 7
        if number % 3:
            expected = service.index.neighbours_of(key, 1 + number % 7)
            assert [r["key"] for r in results] == [n.key for n in expected]
        else:
            assert all(r["metadata"]["price"] > 30 for r in results)


async def count_waiting(http, what="images"):
    text = (await http.get("/metrics")).text
    return float(text.split(f"\npipeline_waiting_{what} ")[1].split("\n")[0])


def test_images_that_wait_are_embedded_together(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)

    async def crowd(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            posts = [asyncio.create_task(post_image(http, 0))]
            await asyncio.to_thread(embedder.entered.wait, 20)
            posts += [asyncio.create_task(post_image(http, n)) for n in range(1, 9)]
            while await count_waiting(http) < 8:
                pass
            hold.set()
            return await asyncio.gather(*posts)

    with run_service(gallery.open(), embedder=embedder) as service:
        responses = asyncio.run(crowd(service.url))
    assert {r.status_code for r in responses} == {200}
    assert embedder.batches == [1, 8]


def post_image(http, number):
    return http.post("/v1/search", files={"image": make_image(number)})


def test_one_broken_image_fails_alone_in_its_batch(service):
    bodies = [{"files": {"image": make_image(n) if n != 4 else b"broken"}} for n in range(8)]
    responses = asyncio.run(post_all(service.url, bodies))
    assert [r.status_code for r in responses] == [200] * 4 + [422] + [200] * 3


def test_a_full_queue_is_answered_at_once_with_a_time_to_come_back(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)

    async def crowd(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            first = asyncio.create_task(post_image(http, 0))
            await asyncio.to_thread(embedder.entered.wait, 20)
            waiting = {asyncio.create_task(post_image(http, n)) for n in range(1, 12)}
            refused = set()
            while len(refused) < 7:  # four wait, and seven are turned away
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
            hold.set()
            return [task.result() for task in refused], await asyncio.gather(first, *waiting)

    limits = replace(LIMITS, max_waiting=16)
    with run_service(gallery.open(), embedder=embedder, limits=limits) as service:
        refused, answered = asyncio.run(crowd(service.url))
    assert {(r.status_code, r.json()["code"]) for r in refused} == {(503, "overloaded")}
    assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert [r.status_code for r in answered] == [200] * 5


def test_a_request_that_was_given_up_costs_no_work(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)
    limits = replace(LIMITS, max_batch=1)
    with run_service(gallery.open(), embedder=embedder, limits=limits, timeout_s=0.3) as service:
        bodies = [{"files": {"image": make_image(n)}} for n in range(3)]
        responses = asyncio.run(post_all(service.url, bodies))
        hold.set()
        assert {r.status_code for r in responses} == {504}
        files = {"image": make_image(1)}
        assert httpx.post(f"{service.url}/v1/search", files=files, timeout=30).status_code == 200
    assert len(embedder.batches) == 2


def test_a_new_generation_is_swapped_in_without_a_failed_request(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(60)
    gallery.build()
    limits = replace(LIMITS, refresh_s=0.05)
    with run_service(gallery.open(), limits=limits) as service:
        stop = threading.Event()
        seen: list[list[tuple[int, str]]] = [[] for _ in range(4)]

        def hammer(answers):
            with httpx.Client(base_url=service.url, timeout=60) as http:
                number = 0
                while not stop.is_set():
                    response = http.post("/v1/search", **search_body(number % 60))
                    answers.append((response.status_code, response.json().get("generation")))
                    number += 1

        threads = [threading.Thread(target=hammer, args=(answers,)) for answers in seen]
        for thread in threads:
            thread.start()
        generations = [service.index.info.generation]
        for _ in range(3):
            gallery.add_shard(10)
            gallery.build()
            wait_until(lambda: len(service.index) == gallery.images)
            generations.append(service.index.info.generation)
            wait_for_more(seen)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert httpx.get(f"{service.url}/v1/info").json()["rows"] == 90
    statuses = {status for answers in seen for status, _ in answers}
    assert statuses == {200}
    for answers in seen:
        order = [generation for _, generation in answers]
        assert sorted(order) == order
        assert generations[-1] in order


def wait_for_more(lists):
    """Return when every list has grown by three."""
    sizes = [len(values) + 3 for values in lists]
    wait_until(lambda: all(len(v) >= n for v, n in zip(lists, sizes, strict=True)))


def wait_until(condition, timeout_s=30.0):
    """Poll what another thread will make true; fails when it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.005)


def test_a_damaged_generation_is_not_swapped_in_and_is_counted(tmp_path, monkeypatch):
    gallery = Gallery(tmp_path)
    gallery.add_shard(20)
    gallery.build()
    with run_service(gallery.open(), limits=replace(LIMITS, refresh_s=0.02)) as service:
        generation = service.index.info.generation
        gallery.add_shard(10)
        gallery.build()
        damage_newest_file(tmp_path)
        with httpx.Client(base_url=service.url) as http:
            wait_until(lambda: 'refreshes_total{result="failed"}' in http.get("/metrics").text)
            assert http.get("/v1/info").json()["generation"] == generation
            assert http.post("/v1/search", **search_body(3)).status_code == 200
    with pytest.raises(CorruptionError):
        gallery.open()


def damage_newest_file(folder):
    manifest = max(
        (folder / "index/generations").glob("*/manifest.json"), key=lambda p: p.stat().st_mtime_ns
    )
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)


def test_requests_under_way_are_finished_when_the_service_stops(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)
    with run_service(gallery.open(), embedder=embedder) as service:
        answers = []

        def ask():
            files = {"image": make_image(1)}
            answers.append(httpx.post(f"{service.url}/v1/search", files=files, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        assert embedder.entered.wait(20)
        service.server.should_exit = True
        wait_until(lambda: not can_connect(service.url))
        hold.set()
        thread.join(30)
    assert [a.status_code for a in answers] == [200]
    assert embedder.closed
    assert not service.lookups.is_open


def can_connect(url):
    try:
        httpx.get(f"{url}/healthz", timeout=1)
    except httpx.TransportError:
        return False
    return True


def test_metrics_count_requests_by_route_and_never_by_key(http, service):
    http.post("/v1/search", **search_body(3))
    http.get("/v1/items/photos/000.tar/00003.jpg")
    http.get("/v1/items/nobody")
    text = http.get("/metrics").text
    route = 'method="GET",route="/v1/items/{key}"'
    assert f'pipeline_requests_total{{{route},status="200"}}' in text
    assert f'pipeline_requests_total{{{route},status="404"}}' in text
    assert "nobody" not in text
    for name in (
        "pipeline_index_rows 60.0",
        "pipeline_generation_created_seconds",
        'pipeline_stage_seconds_count{stage="search"}',
        "pipeline_batch_size_bucket",
        "pipeline_waiting_searches 0.0",
        "pipeline_image_cache_bytes",
    ):
        assert name in text


def test_a_batcher_gives_results_back_in_order_and_errors_to_their_owners():
    def double(items):
        return [ValueError(str(i)) if i == 3 else 2 * i for i in items]

    async def run():
        batcher = MicroBatcher("numbers", double, max_batch=4, max_waiting=100, workers=2)
        results = await asyncio.gather(
            *(batcher.submit(i) for i in range(10)), return_exceptions=True
        )
        await batcher.close()
        return results

    results = asyncio.run(run())
    assert [r for r in results if not isinstance(r, Exception)] == [0, 2, 4, 8, 10, 12, 14, 16, 18]
    assert str(results[3]) == "3"


def test_a_batch_that_fails_as_a_whole_fails_all_its_items_and_no_later_one():
    calls = []

    def fail_once(items):
        calls.append(len(items))
        if len(calls) == 1:
            raise OSError("disk")
        return items

    async def run():
        batcher = MicroBatcher("items", fail_once, max_batch=8, max_waiting=8)
        with pytest.raises(OSError, match="disk"):
            await batcher.submit(1)
        assert await batcher.submit(2) == 2
        await batcher.close()

    asyncio.run(run())


def test_a_full_batcher_names_what_waits():
    gate = threading.Event()

    async def run():
        batcher = MicroBatcher(
            "pictures", lambda i: gate.wait(20) and i, max_batch=1, max_waiting=1
        )
        tasks = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return results

    refused = [r for r in asyncio.run(run()) if isinstance(r, Problem)]
    assert refused
    assert refused[0].status == 503
    assert "too many pictures are waiting" in refused[0].detail
