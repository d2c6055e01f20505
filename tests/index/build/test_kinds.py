import pytest

from pipeline.errors import SettingsError
from pipeline.index.build.kinds import make_plan, outgrew, show_bytes, tabulate_selection
from pipeline.index.faiss.codec import KINDS

GB = 10**9
WIDTHS = (1024, 2152, 1984, 2048, 1024)


def plan(rows, dim=1024, **settings):
    return make_plan(rows, dim, **{"memory_bytes": 8 * GB, "target_recall": 0.95} | settings)


@pytest.mark.parametrize(
    ("rows", "kind", "factory", "segments"),
    [
        (1, "flat", "Flat", 1),
        (9_500, "flat", "Flat", 1),
        (10_000, "rabitq", "HR,RaBitQfs", 1),
        (110_000, "rabitq", "HR,RaBitQfs", 1),
        (120_000, "ivf-rabitq", "HR,IVF1024,RaBitQfs", 1),
        (1_000_000, "ivf-rabitq", "HR,IVF4096_HNSW32,RaBitQfs", 1),
        (10_000_000, "ivf-rabitq", "HR,IVF16384_HNSW32,RaBitQfs", 1),
        (40_000_000, "ivf-rabitq", "HR,IVF32768_HNSW32,RaBitQfs", 2),
    ],
)
def test_rows_decide_the_kind(rows, kind, factory, segments):
    chosen = plan(rows)
    assert (chosen.kind, chosen.factory, chosen.segments) == (kind, factory, segments)


def test_a_billion_rows_fit_a_cluster_budget_in_segments():
    chosen = plan(1_000_000_000, memory_bytes=200 * GB)
    assert chosen.lists == 65_536
    assert chosen.segments == 50
    assert 140 * GB < chosen.memory_bytes < 180 * GB


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("rows", [1000, 200_000, 5_000_000])
def test_all_widths_get_a_plan(dim, rows):
    chosen = plan(rows, dim)
    rotated = chosen.factory.startswith("HR,")
    assert rotated == (chosen.kind != "flat" and dim != 2152)  # 2152 would be padded to 4096


def test_wider_vectors_leave_flat_and_plain_codes_earlier():
    assert [plan(6000, dim).kind for dim in (1024, 2048)] == ["flat", "rabitq"]
    assert [plan(100_000, dim).kind for dim in (1024, 2048)] == ["rabitq", "ivf-rabitq"]
    assert plan(30_000, 16).kind == plan(30_000, 256).kind == "flat"


def test_a_small_memory_budget_leads_to_codes():
    assert plan(9000, memory_bytes=20 * 10**6).kind == "rabitq"


def test_perfect_recall_asks_for_flat_while_it_fits():
    assert plan(1_000_000, target_recall=1.0).kind == "flat"
    assert plan(5_000_000, target_recall=1.0).kind == "ivf-rabitq"


def test_a_budget_that_nothing_fits_is_refused_with_both_sizes():
    message = r"100,000,000 rows of 1024 need 15\.\d GB even as 1-bit codes; .* 1 GB"
    with pytest.raises(SettingsError, match=message):
        plan(100_000_000, memory_bytes=GB)


@pytest.mark.parametrize("kind", KINDS)
def test_an_explicit_kind_is_taken_as_it_is(kind):
    chosen = plan(3000, kind=kind)
    assert chosen.kind == kind
    assert "as asked" in chosen.reason


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(SettingsError, match="kind is 'pq'; use auto, flat, rabitq"):
        plan(3000, kind="pq")


def test_the_reason_is_one_line_with_rows_width_memory_and_why_nothing_simpler():
    assert plan(100_000).reason == (
        "rabitq: 1-bit codes, the best ranked again by stored vectors; for 100,000 rows of 1024, "
        "where flat takes about 21 ms a query; 13.7 MB in memory"
    )
    assert "where rabitq takes about 18 ms a query" in plan(1_000_000).reason
    assert "where" not in plan(9000).reason
    assert "where" not in plan(9000, memory_bytes=20 * 10**6).reason


def test_segments_keep_a_build_within_half_the_memory():
    chosen = plan(4_000_000, kind="flat", memory_bytes=8 * GB)
    assert chosen.segments == 5
    assert 4_000_000 / chosen.segments * 4096 <= 4 * GB


def test_the_sample_stays_within_half_the_memory():
    chosen = plan(50_000_000, memory_bytes=10 * GB)
    assert chosen.sample_rows * 4096 <= 5 * GB


def test_an_index_at_a_limit_does_not_change_its_kind_every_night():
    assert not outgrew("flat", 11_000, 1024, planned_kind="rabitq")
    assert outgrew("flat", 12_000, 1024, planned_kind="rabitq")
    assert not outgrew("rabitq", 4000, 1024, planned_kind="flat")
    assert outgrew("rabitq", 150_000, 1024, planned_kind="ivf-rabitq")
    assert not outgrew("ivf-rabitq", 10_000_000, 1024, planned_kind="ivf-rabitq")
    assert not outgrew("flat", 10_000_000, 1024, planned_kind="flat")  # for perfect recall


def test_sizes_are_written_for_people():
    assert [show_bytes(n) for n in (999, 1500, 2_500_000, 3e12)] == [
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3 TB",
    ]


def test_the_selection_table_holds_every_combination_with_its_line():
    table = tabulate_selection((1000, 100_000), (64, 1024), (10**6, GB))
    assert len(table) == 8
    assert (table[0].rows, table[0].dim, table[0].memory_budget_bytes) == (1000, 64, 10**6)
    last = table[-1]
    assert (last.kind, last.reason) == ("rabitq", plan(100_000).reason)
    assert last.memory_bytes == plan(100_000).memory_bytes
    refused = table[4]
    assert (refused.kind, refused.memory_bytes) == (None, 0)
    assert "100,000 rows of 64 need 1.7 MB even as 1-bit codes" in refused.reason


def test_the_usual_selection_table_covers_all_kinds_that_auto_chooses():
    assert {row.kind for row in tabulate_selection()} == {None, "flat", "rabitq", "ivf-rabitq"}
