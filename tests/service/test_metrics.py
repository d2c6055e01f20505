"""What a scrape gives where several replicas answer at one address."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from pipeline.service.metrics import Metrics


def test_a_scrape_holds_the_counts_of_all_replicas_each_under_its_name():
    replicas = {name: Metrics() for name in ("a", "b", "c")}
    for number, metrics in enumerate(replicas.values(), start=1):
        metrics.watch("pipeline_index_rows", "Live rows.", lambda: 60)
        metrics.requests.labels("GET", "/v1/info", "200").inc(number)
        metrics.request_s.labels("/v1/info").observe(0.02)

    async def read_replicas():
        return {name: metrics.collect() for name, metrics in replicas.items()}

    text = asyncio.run(Metrics(read_replicas).render()).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        sample.labels["replica"]: sample.value
        for sample in families["pipeline_requests"].samples
        if sample.name == "pipeline_requests_total"
    }
    assert counts == {"a": 1, "b": 2, "c": 3}
    assert families["pipeline_request_seconds"].type == "histogram"
    assert len(families["pipeline_index_rows"].samples) == 3


def test_a_service_in_one_process_labels_no_replica():
    metrics = Metrics()
    metrics.requests.labels("GET", "/v1/info", "200").inc()
    assert b"replica" not in asyncio.run(metrics.render())
