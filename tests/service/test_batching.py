import numpy as np
import pyarrow.compute as pc

from pipeline.index.search.where import compile_where
from pipeline.service.batching import Search, run_searches
from pipeline.service.metrics import Metrics
from service.gallery import DIM


def test_searches_whose_filters_differ_in_the_middle_of_a_list_do_not_share_an_answer(gallery):
    snapshot = gallery.open().snapshot
    keys = [f"photos/000.tar/{number:05d}.jpg" for number in range(60)]
    lists = [[*keys[:15], other, *keys[15:29]] for other in keys[30:40]]
    filters = [compile_where({"key": {"$in": some}}, snapshot.info.columns) for some in lists]
    assert len(set(map(str, filters))) == 1
    searches = [Search(snapshot, np.ones(DIM), 40, where, exact=False) for where in filters]
    answers = run_searches(searches, Metrics())
    assert [sorted(hit.key for hit in hits) for hits in answers] == [sorted(some) for some in lists]


def test_equal_filters_are_searched_as_one(gallery):
    snapshot = gallery.open().snapshot
    wheres = [compile_where("width > 100 and cls = 1", snapshot.info.columns) for _ in range(2)]
    groups = [Search(snapshot, np.ones(DIM), 5, where, exact=False).group for where in wheres]
    assert groups[0] == groups[1]
    for other in (None, pc.field("width") > 100.0, pc.field("width") > 100):
        assert Search(snapshot, np.ones(DIM), 5, other, exact=False).group != groups[0]
