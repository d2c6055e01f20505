"""The plan: by its invariants over random histories, and its messages one by one."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_jpeg, write_loose, write_tar

from pipeline.embed_job import plan as plan_module
from pipeline.embed_job.plan import Plan, guard_removal, plan_shards
from pipeline.errors import NoShardsError, SettingsError
from pipeline.input.listing import Listing, Source, list_sources
from pipeline.output.commits import renew_commit, split_commits
from pipeline.records import Commit, FailedObject, Layout, ObjectInfo, PartInfo, Shard
from pipeline.storage import Storage

LAYOUT = Layout(chunk_images=256, chunk_bytes=2**20)
SPACE = "5bace5bace5bace5"
NAMES = ("a.jpg", "b.jpg", "c.jpg", "d/e.jpg", "f.jpg", "x.tar", "d/y.tar", "z.parquet")
ROOTS = ("s3://bucket/one", "s3://bucket/two", "s3://bucket/one/d")

# What an input holds: the version of each object by URI.
World = dict[str, int]


def make_source(uri: str, version: int, root: str) -> Source:
    kinds = {"jpg": "image", "tar": "tar", "parquet": "parquet"}
    name = uri[len(root) + 1 :]
    return Source(kinds[uri.rsplit(".", 1)[1]], root, name, ObjectInfo(uri, 100, f"v{version}"))


def make_listing(world: World, roots: tuple[str, ...]) -> Listing:
    """List what lies under the roots, each object once, as ``list_sources`` does."""
    sources: dict[str, Source] = {}
    for root in roots:
        for uri, version in world.items():
            if uri.startswith(f"{root}/"):
                sources.setdefault(uri, make_source(uri, version, root))
    return Listing(roots, tuple(sorted(sources.values(), key=lambda s: s.name)))


def make_commit(shard: Shard, *, sequence: int) -> Commit:
    rows = len(shard.members) or 1
    part = PartInfo(f"parts/{shard.folder}/00000.parquet", rows, "", 1, {"ok": rows})
    return Commit(
        shard.id,
        shard.kind,
        shard.source,
        shard.root,
        shard.name,
        shard.version,
        shard.size_bytes,
        SPACE,
        (part,),
        members=shard.members,
        supersedes=shard.supersedes,
        sequence=sequence,
    )


@dataclass
class Output:
    """Commits as they lie in storage; every step is one write, and the run may end after any."""

    commits: dict[str, Commit] = field(default_factory=dict)
    retired: dict[str, Commit] = field(default_factory=dict)

    def retire(self, shard_id: str) -> None:
        if shard_id in self.commits:
            self.retired[shard_id] = self.commits.pop(shard_id)

    def plan(self, listing: Listing, again: frozenset[str] = frozenset()) -> tuple[Plan, int]:
        live, superseded = split_commits(self.commits)
        for shard_id in superseded:
            self.retire(shard_id)
        known = [*self.commits.values(), *self.retired.values()]
        sequence = 1 + max((commit.sequence for commit in known), default=0)
        plan = plan_shards(
            listing,
            space_id=SPACE,
            layout=LAYOUT,
            commits=live,
            retired=self.retired,
            again=again & frozenset(live),
            sequence=sequence,
        )
        return plan, sequence

    def run(self, listing: Listing, *, order: list[int], steps: int | None = None) -> bool:
        """Do what a run does, in any order of completion; return False when it was cut off."""
        plan, sequence = self.plan(listing)
        for commit, olds in plan.restored:
            self.retired.pop(commit.shard_id)
            self.commits[commit.shard_id] = renew_commit(
                commit, sequence=sequence, run_id="", supersedes=olds
            )
        for commit in plan.removed:
            self.retire(commit.shard_id)
        pending = sorted(plan.embed, key=lambda shard: order[hash(shard.id) % len(order)])
        for shard in pending:
            if steps == 0:
                return False
            steps = None if steps is None else steps - 1
            self.commits[shard.id] = make_commit(shard, sequence=sequence)
            if steps == 0:
                return False  # killed before the superseded commit was moved away
            for shard_id in shard.supersedes:
                self.retire(shard_id)
        return True

    def read(self) -> list[tuple[str, str]]:
        """Return (URI, version) of every row that a reader sees."""
        live, _ = split_commits(self.commits)
        rows = []
        for commit in live.values():
            rows += [(m.uri, m.version) for m in commit.members] or [
                (commit.source, commit.version)
            ]
        return rows

    def read_keys(self) -> list[str]:
        live, _ = split_commits(self.commits)
        return [
            key
            for commit in live.values()
            for key in ([m.key for m in commit.members] or [commit.name])
        ]


def name_apart(root: str, name: str) -> str:
    """Return a URI under ``root`` whose last part no other root has."""
    folder, _, basename = name.rpartition("/")
    return "/".join(filter(None, [root, folder, f"{root[-3:]}-{basename}"]))


worlds = st.dictionaries(
    st.sampled_from([name_apart(root, name) for root in ROOTS[:2] for name in NAMES]),
    st.integers(1, 2),
    max_size=len(NAMES),
)
orders = st.permutations(range(5))
inputs = st.sampled_from([ROOTS[:1], ROOTS[1:2], ROOTS[2:]])


@pytest.fixture(autouse=True)
def small_bundles(monkeypatch):
    monkeypatch.setattr(plan_module, "BUNDLE_IMAGES", 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(worlds, inputs, orders, st.integers(0, 6)), min_size=1, max_size=5))
def test_after_every_history_the_rows_are_the_listing_once_each(history):
    plan_module.BUNDLE_IMAGES = 3
    output = Output()
    for world, roots, order, steps in history:
        listing = make_listing(world, roots)
        before = output.read()
        for _ in range(2):  # cut off anywhere, then once more
            output.run(listing, order=order, steps=steps)
            seen = output.read()
            uris = [uri for uri, _ in seen]
            assert len(uris) == len(set(uris)), "a reader sees two versions of one object"
            still_there = {uri for uri, _ in before if world.get(uri) is not None}
            assert still_there <= set(uris), "a reader misses an object that was never gone"
        assert output.run(listing, order=order)
        rows = output.read()
        under = {
            (uri, version) for uri, version in rows if any(uri.startswith(f"{r}/") for r in roots)
        }
        assert under == {(s.info.uri, s.info.version) for s in listing.sources}
        assert set(rows) - under == {
            row for row in before if not any(row[0].startswith(f"{r}/") for r in roots)
        }
        assert len(output.read_keys()) == len(set(output.read_keys()))
        plan, _ = output.plan(listing)
        assert not plan.embed
        assert not plan.removed
        assert not plan.restored


@settings(max_examples=100, deadline=None)
@given(worlds, worlds, orders, orders, st.integers(0, 6))
def test_an_interrupted_run_and_its_rerun_commit_what_an_undisturbed_run_commits(
    first, second, order, other_order, steps
):
    plan_module.BUNDLE_IMAGES = 3
    undisturbed, interrupted = Output(), Output()
    for world in (first, second):
        listing = make_listing(world, ROOTS[:2])
        assert undisturbed.run(listing, order=order)
        interrupted.run(listing, order=other_order, steps=steps)
        assert interrupted.run(listing, order=other_order)
    assert set(undisturbed.commits) == set(interrupted.commits)
    parts = [
        {key: commit.parts for key, commit in output.commits.items()}
        for output in (undisturbed, interrupted)
    ]
    assert parts[0] == parts[1]


def test_an_added_loose_image_becomes_a_bundle_of_its_own_and_leaves_the_others_alone():
    output = Output()
    world = {f"{ROOTS[0]}/{name}": 1 for name in ("a.jpg", "c.jpg")}
    output.run(make_listing(world, ROOTS[:1]), order=[0])
    plan, _ = output.plan(make_listing(world | {f"{ROOTS[0]}/b.jpg": 1}, ROOTS[:1]))
    (shard,) = plan.embed
    assert [member.key for member in shard.members] == ["b.jpg"]
    assert not shard.supersedes
    assert len(plan.carried) == 1


def test_a_changed_loose_image_is_replaced_together_with_its_bundle_in_one_commit():
    output = Output()
    world = {f"{ROOTS[0]}/{name}": 1 for name in ("a.jpg", "b.jpg", "c.jpg")}
    output.run(make_listing(world, ROOTS[:1]), order=[0])
    (old,) = output.commits
    plan, _ = output.plan(make_listing(world | {f"{ROOTS[0]}/b.jpg": 2}, ROOTS[:1]))
    (shard,) = plan.embed
    assert [(m.key, m.version) for m in shard.members] == [
        ("a.jpg", "v1"),
        ("b.jpg", "v2"),
        ("c.jpg", "v1"),
    ]
    assert shard.supersedes == (old,)
    assert not plan.removed


def test_a_source_that_goes_back_to_an_older_version_brings_its_rows_back_without_reading():
    output = Output()
    uri = f"{ROOTS[0]}/x.tar"
    for version in (1, 2):
        output.run(make_listing({uri: version}, ROOTS[:1]), order=[0])
    plan, _ = output.plan(make_listing({uri: 1}, ROOTS[:1]))
    assert not plan.embed
    ((commit, olds),) = plan.restored
    assert commit.version == "v1"
    assert olds == tuple(output.commits)


def test_only_what_the_given_inputs_cover_is_removed():
    output = Output()
    world = {f"{ROOTS[0]}/x.tar": 1, f"{ROOTS[0]}/d/y.tar": 1, f"{ROOTS[1]}/x2.tar": 1}
    output.run(make_listing(world, ROOTS[:2]), order=[0])
    plan, _ = output.plan(make_listing({f"{ROOTS[0]}/d/other.tar": 1}, ROOTS[2:]))
    assert [commit.source for commit in plan.removed] == [f"{ROOTS[0]}/d/y.tar"]
    assert {commit.source for commit in plan.carried} == {
        f"{ROOTS[0]}/x.tar",
        f"{ROOTS[1]}/x2.tar",
    }


def plan_guarded(output: Output, world: World, max_removed: float = 0.1) -> Plan:
    make_plan = partial(
        plan_shards,
        make_listing(world, ROOTS[:1]),
        space_id=SPACE,
        layout=LAYOUT,
        commits=output.commits,
        retired=output.retired,
    )
    return guard_removal(make_plan, max_removed=max_removed)


@pytest.mark.parametrize("suffix", ["tar", "jpg"])
@pytest.mark.parametrize(
    ("gone", "max_removed", "stays"),
    [
        (16, 0.1, False),  # a few may always leave
        (17, 0.1, True),
        (60, 0.5, False),
        (61, 0.5, True),
        (119, 1.0, False),
    ],
)
def test_a_listing_that_lost_a_large_share_removes_nothing_and_plans_all_else(
    suffix, gone, max_removed, stays
):
    plan_module.BUNDLE_IMAGES = 1000
    output = Output()
    world = {f"{ROOTS[0]}/{i:03}.{suffix}": 1 for i in range(120)}
    output.run(make_listing(world, ROOTS[:1]), order=[0])
    left = dict(list(world.items())[gone:]) | {f"{ROOTS[0]}/new.tar": 1}
    plan = plan_guarded(output, left, max_removed)
    assert plan.withheld_rows == (gone if stays else 0)
    assert plan.covered_rows == 120
    new = [shard.source for shard in plan.embed if shard.name == "new.tar"]
    assert new == [f"{ROOTS[0]}/new.tar"]
    if stays:
        assert not plan.removed
        assert len(plan.embed) == 1
        assert list(plan.carried) == list(output.commits.values())
    else:
        assert plan.removed_rows == gone


def test_what_a_listing_could_not_look_at_is_not_removed():
    output = Output()
    world = {f"{ROOTS[0]}/{name}": 1 for name in ("d/y.tar", "d/e.jpg", "x.tar", "a.jpg", "b.jpg")}
    output.run(make_listing(world, ROOTS[:1]), order=[0])
    left = make_listing({f"{ROOTS[0]}/b.jpg": 1}, ROOTS[:1])
    failed = tuple(FailedObject(f"{ROOTS[0]}/{name}", "closed") for name in ("d", "a.jpg"))
    plan, _ = output.plan(replace(left, failed=failed))
    assert [commit.source for commit in plan.removed] == [f"{ROOTS[0]}/x.tar"]
    assert not plan.embed


def test_what_a_deeper_input_committed_is_removed_under_its_parent_too():
    output = Output()
    uri = f"{ROOTS[2]}/y.tar"
    output.run(make_listing({uri: 1}, ROOTS[2:]), order=[0])
    plan, _ = output.plan(make_listing({f"{ROOTS[0]}/x.tar": 1}, ROOTS[:1]))
    assert [commit.source for commit in plan.removed] == [uri]


def test_images_embedded_under_a_deeper_input_are_not_embedded_twice_under_its_parent():
    output = Output()
    uri = f"{ROOTS[2]}/e.jpg"
    output.run(make_listing({uri: 1}, ROOTS[2:]), order=[0])
    plan, _ = output.plan(make_listing({uri: 1, f"{ROOTS[0]}/a.jpg": 1}, ROOTS[:1]))
    assert [[m.uri for m in shard.members] for shard in plan.embed] == [[f"{ROOTS[0]}/a.jpg"]]


def test_a_shard_embedded_again_writes_to_another_folder_than_its_committed_parts():
    output = Output()
    world = {f"{ROOTS[0]}/x.tar": 1, f"{ROOTS[0]}/a.jpg": 1}
    listing = make_listing(world, ROOTS[:1])
    output.run(listing, order=[0])
    plan, sequence = output.plan(listing, again=frozenset(output.commits))
    assert {shard.id for shard in plan.embed} == set(output.commits)
    assert all(shard.folder == f"{shard.id}.{sequence}" for shard in plan.embed)
    assert not any(shard.supersedes for shard in plan.embed)


def test_shards_outside_the_inputs_are_not_embedded_again():
    output = Output()
    output.run(make_listing({f"{ROOTS[0]}/a.jpg": 1}, ROOTS[:1]), order=[0])
    listing = make_listing({f"{ROOTS[1]}/b.jpg": 1}, ROOTS[1:2])
    plan, _ = output.plan(listing, again=frozenset(output.commits))
    assert [shard.source for shard in plan.embed] == [f"{ROOTS[1]}/b.jpg"]
    assert [commit.shard_id for commit in plan.carried] == list(output.commits)


def test_the_largest_shards_come_first():
    sources = [make_source(f"{ROOTS[0]}/{n}.tar", 1, ROOTS[0]) for n in range(4)]
    sizes = (3, 9, 1, 9)
    sources = [
        replace(s, info=replace(s.info, size_bytes=n)) for s, n in zip(sources, sizes, strict=True)
    ]
    plan, _ = Output().plan(Listing(ROOTS[:1], tuple(sources)))
    assert [shard.name for shard in plan.embed] == ["1.tar", "3.tar", "0.tar", "2.tar"]
    assert plan.listed_bytes == 22


def test_bundles_hold_at_most_their_bytes(monkeypatch):
    monkeypatch.setattr(plan_module, "BUNDLE_BYTES", 250)
    monkeypatch.setattr(plan_module, "BUNDLE_IMAGES", 1000)
    world = {f"{ROOTS[0]}/{i}.jpg": 1 for i in range(7)}
    plan, _ = Output().plan(make_listing(world, ROOTS[:1]))
    assert sorted(len(shard.members) for shard in plan.embed) == [1, 3, 3]


def test_another_chunking_or_space_is_another_shard():
    listing = make_listing({f"{ROOTS[0]}/x.tar": 1}, ROOTS[:1])
    layouts = (LAYOUT, replace(LAYOUT, chunk_images=7), replace(LAYOUT, chunk_bytes=9))
    ids = {
        plan_shards(listing, space_id=space, layout=layout, commits={}, retired={}).embed[0].id
        for space in (SPACE, "other")
        for layout in layouts
    }
    assert len(ids) == 6


def test_two_inputs_with_one_name_are_refused_before_anything_is_embedded(tmp_path: Path):
    for folder in ("one", "two"):
        write_loose(tmp_path / folder, {"a.jpg": make_jpeg()})
    with pytest.raises(SettingsError, match=r"would both get the key 'a\.jpg'; give their common"):
        list_sources([str(tmp_path / "one"), str(tmp_path / "two")], "auto", Storage())


def test_a_key_that_another_input_has_committed_is_refused():
    output = Output()
    output.run(make_listing({f"{ROOTS[0]}/a.jpg": 1}, ROOTS[:1]), order=[0])
    with pytest.raises(SettingsError, match=r"would get the key 'a\.jpg', which this output has"):
        output.plan(make_listing({f"{ROOTS[1]}/a.jpg": 1}, ROOTS[1:2]))


def test_an_object_given_twice_is_listed_once(tmp_path: Path):
    write_loose(tmp_path, {"sub/a.jpg": make_jpeg()})
    listing = list_sources([str(tmp_path), str(tmp_path / "sub")], "auto", Storage())
    assert [source.name for source in listing.sources] == ["sub/a.jpg"]


def test_kinds_are_told_by_name_and_leftovers_of_other_tools_are_ignored(tmp_path: Path):
    names = ("a.tar", "b.tar.gz", "c.TGZ", "d.parquet", "ü ß.JPG", "a.b.c.png", "x/y z/i.webp")
    ignored = ("_SUCCESS", "._a.jpg", ".DS_Store", "notes.txt", "labels.json", "noname")
    write_loose(tmp_path, dict.fromkeys((*names, *ignored), b"x"))
    listing = list_sources([str(tmp_path)], "auto", Storage())
    assert {source.name for source in listing.sources} == set(names)
    assert listing.ignored == len(ignored)


def test_images_without_a_suffix_are_found_when_the_kind_is_given(tmp_path: Path):
    write_loose(tmp_path, {"noname": b"x", "a.jpg": b"x", "b.txt": b"x", "c.tar": b"x"})
    listing = list_sources([str(tmp_path)], "images", Storage())
    assert [source.name for source in listing.sources] == ["a.jpg", "noname"]


def test_a_single_object_of_any_name_is_taken_as_the_kind_says(tmp_path: Path):
    path = write_tar(tmp_path / "shard.tar", [("a.jpg", make_jpeg())]).rename(tmp_path / "shard")
    (source,) = list_sources([str(path)], "tar", Storage()).sources
    assert (source.kind, source.name) == ("tar", "shard")


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".parquet"])
def test_a_list_of_uris_names_each_image_once(tmp_path: Path, suffix: str):
    write_loose(tmp_path / "in", {"a b.jpg": b"x", "ü.jpg": b"y"})
    uris = [str(tmp_path / "in" / name) for name in ("a b.jpg", "ü.jpg", "gone.jpg", "a b.jpg")]
    path = tmp_path / f"list{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(["# made by hand", "", *uris]))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"n": range(4), "url": uris}), path)
    else:
        mark = "," if suffix == ".csv" else "\t"
        path.write_text(
            "\n".join(mark.join(row) for row in [("n", "URI"), *(("1", u) for u in uris)])
        )
    listing = list_sources([str(path)], "list", Storage())
    assert {source.info.uri for source in listing.sources} == {uris[0], uris[1]}
    ((gone, reason),) = [(entry.uri, entry.reason) for entry in listing.failed]
    assert gone == uris[2]
    assert "No such file" in reason
    assert listing.listed == 3
    assert all(source.root == str(path) for source in listing.sources)


def test_a_list_without_a_uri_column_says_which_it_has(tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_text("name,size\na,1\n")
    with pytest.raises(SettingsError, match=r"no column named uri.* are \['name', 'size'\]"):
        list_sources([str(path)], "list", Storage())


def test_an_empty_prefix_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(NoShardsError, match=f"no image shards under '{tmp_path}/trian'; check"):
        list_sources([str(tmp_path / "trian")], "auto", Storage())


def test_a_prefix_of_other_objects_says_how_many_there_are(tmp_path: Path):
    write_loose(tmp_path, {"a.doc": b"", "b.doc": b""})
    words = r"\(2 objects of other kinds: 2 text or metadata\); check the prefix"
    with pytest.raises(NoShardsError, match=words):
        list_sources([str(tmp_path)], "auto", Storage())


def test_one_empty_input_among_others_is_an_error_too(tmp_path: Path):
    write_loose(tmp_path / "full", {"a.jpg": b"x"})
    with pytest.raises(NoShardsError, match="empty"):
        list_sources([str(tmp_path / "full"), str(tmp_path / "empty")], "auto", Storage())
