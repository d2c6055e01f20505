"""Damage, then do what the message says, and find all well: for every file of an index."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from index.corpus import STORAGE, Built, Corpus, build, check_healthy, make_corpus
from pipeline.config import IndexConfig
from pipeline.errors import ConflictError, CorruptionError, PipelineError, PublishError
from pipeline.index.files import describe_file
from pipeline.index.job import build_index
from pipeline.index.manifest import digest_bytes
from pipeline.index.pointer import look_up, manifest_path, read_current
from pipeline.index.search.search_index import SearchIndex

SETTINGS = {"kind": "ivf-sq8", "queries": 30}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two generations: the second has a delta, deletions, and a segment of the first."""
    folder = tmp_path_factory.mktemp("healthy")
    corpus = make_corpus(folder / "embeddings", rows=240, dim=16)
    build(corpus, str(folder / "index"), **SETTINGS)
    corpus.extend("night.tar", rows=9, seed=7)
    corpus.drop_rows("shard-001.tar", every=30)
    build(corpus, str(folder / "index"), **SETTINGS)
    return Built(corpus, str(folder / "index"))


@pytest.fixture
def index(healthy: Built, tmp_path: Path) -> str:
    """A copy to damage."""
    shutil.copytree(healthy.index, tmp_path / "index")
    return str(tmp_path / "index")


def name_files(index: str) -> dict[str, str]:
    """Return the path of a file of each kind of the generation that serves."""
    manifest = read_current(index, STORAGE)
    main, delta = manifest.segments
    trained = manifest.codec.file.path.rsplit("/", 2)[0]
    named = {f"{name} of the segment": file.path for name, file in main.files.items()}
    named |= {f"{name} of the delta": file.path for name, file in delta.files.items()}
    named |= {name: file.path for name, file in manifest.queries.items()}
    return named | {
        "tombstones": manifest.tombstones[main.id].file.path,
        "codec": manifest.codec.file.path,
        "owners": manifest.owners.path,
        "map": manifest.map.path,
        "marker of the segment": f"segments/{main.id}/segment.json",
        "marker of the delta": f"segments/{delta.id}/segment.json",
        "marker of the training": f"{trained}/training.json",
        "manifest": manifest_path(manifest.generation),
        "CURRENT": "CURRENT",
    }


KINDS = (
    *(
        f"{name} of the {part}"
        for part in ("segment", "delta")
        for name in ("index", "vectors", "keys", "order", "truth", "lists", "marker")
    ),
    *("queries", "floors", "tombstones", "codec", "owners", "map", "marker of the training"),
    *("manifest", "CURRENT"),
)


def flip(data: bytes) -> bytes:
    """Change one bit in the middle; in JSON, which has a digest of its own, too."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "lost": None,
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flip,
    "empty": lambda data: b"",
    "other": lambda data: b'{"seq": [], "generation": 7, "format": 1, "info": {}}',
}


def list_cases(*damages: str) -> list[object]:
    """Return every kind of file with every damage; one each is quick, the others are slow."""
    return [
        pytest.param(kind, how, marks=() if place == number % len(damages) else pytest.mark.slow)
        for number, kind in enumerate(KINDS)
        for place, how in enumerate(damages)
    ]


def damage(index: str, path: str, how: str) -> None:
    change = DAMAGES[how]
    if change is None:
        Path(index, path).unlink()
    else:
        Path(index, path).write_bytes(change(Path(index, path).read_bytes()))


def read_message(uri: str) -> str | None:
    """Return what a reader says of an index, or None."""
    try:
        SearchIndex.open(uri)
    except PipelineError as error:
        return str(error)
    return None


def list_remedies(message: str) -> list[dict[str, object]]:
    """Return the settings of each job that a message tells to run."""
    remedies: dict[str, dict[str, object]] = {
        "--full": {"full": True},
        "run the index job again": {},
        "--roll-back": {"roll_back": "previous"},
    }
    found = [settings for words, settings in remedies.items() if words in message]
    if "CURRENT is missing" in message:
        found = [{}]
    assert found, f"no remedy in: {message}"
    return found


def follow(corpus: Corpus, uri: str, settings: dict[str, object]) -> None:
    """Run a job as a message says; where that is refused, as the refusal says."""
    try:
        build(corpus, uri, **(SETTINGS | settings))
    except PipelineError as error:
        if "roll_back" not in settings:
            raise
        for instead in list_remedies(str(error)):
            build(corpus, uri, **(SETTINGS | instead))
    if "roll_back" in settings:
        assert read_message(uri) is None
        build(corpus, uri, unpin=True, **SETTINGS)


@pytest.mark.parametrize(("kind", "how"), list_cases("lost", "flipped"))
def test_every_remedy_in_a_message_leads_to_a_healthy_index(healthy, index, kind, how, tmp_path):
    damage(index, name_files(index)[kind], how)
    message = read_message(index)
    if message is None:  # readers do without it
        assert kind.split()[0] in ("truth", "lists", "marker", "queries", "floors", "owners", "map")
        message = "a builder may say --full"
    for number, settings in enumerate(list_remedies(message)):
        copy = str(shutil.copytree(index, tmp_path / f"copy {number}"))
        follow(healthy.corpus, copy, settings)
        check_healthy(healthy.corpus, copy, **SETTINGS)


@pytest.mark.parametrize(("kind", "how"), list_cases("lost", "cut", "empty", "other"))
def test_an_unchanged_night_notices_what_is_lost_or_cut_and_mends_it(healthy, index, kind, how):
    damage(index, name_files(index)[kind], how)
    report = build(healthy.corpus, index, **SETTINGS)
    if kind.startswith("marker"):
        assert report["action"] == "unchanged"  # it is of no use before the next full build
    elif kind == "map":
        assert report["why"].startswith("nothing new") or "map" in report["why"]
    else:
        assert report["damage"]
    check_healthy(healthy.corpus, index, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_verifying_night_notices_a_flipped_bit_and_mends_it(healthy, index, kind):
    damage(index, name_files(index)[kind], "flipped")
    build(healthy.corpus, index, verify=True, **SETTINGS)
    check_healthy(healthy.corpus, index, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_night_that_adds_to_a_damaged_index_ends_healthy(healthy, index, kind, tmp_path):
    corpus = copy_corpus(healthy.corpus, tmp_path)
    damage(index, name_files(index)[kind], "flipped")
    corpus.extend("later.tar", rows=5, seed=9)
    build(corpus, index, **SETTINGS)
    check_healthy(corpus, index, **SETTINGS)


def copy_corpus(corpus: Corpus, folder: Path) -> Corpus:
    shutil.copytree(corpus.output, folder / "embeddings")
    copy = Corpus(str(folder / "embeddings"), corpus.dim)
    copy.vectors, copy.keys, copy._versions = dict(corpus.vectors), dict(corpus.keys), 100
    return copy


@pytest.mark.parametrize("how", ["cut", "flipped", "lost"])
def test_a_full_build_reuses_no_damaged_file(healthy, index, how):
    for kind, path in name_files(index).items():
        if kind.startswith(("manifest", "CURRENT", "marker")):
            continue
        damage(index, path, how)
    build(healthy.corpus, index, full=True, **SETTINGS)
    check_healthy(healthy.corpus, index, **SETTINGS)


def test_a_full_build_leaves_the_files_of_older_generations_alone(healthy, index):
    before = read_current(index, STORAGE)
    data = {f.path: STORAGE.read(f"{index}/{f.path}") for f in before.list_files()}
    damage(index, before.segments[0].files["order"].path, "lost")
    build(healthy.corpus, index, full=True, **SETTINGS)
    del data[before.segments[0].files["order"].path]
    assert all(STORAGE.read(f"{index}/{path}") == old for path, old in data.items())


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", ["CURRENT", "manifest"])
def test_rolling_back_works_whatever_is_broken_in_what_serves(healthy, index, kind, how):
    first, second = sorted(item.name for item in Path(index, "generations").iterdir())
    damage(index, name_files(index)[kind], how)
    report = build(healthy.corpus, index, roll_back=first)
    assert (report["action"], report["generation"]) == ("rolled back", first)
    assert SearchIndex.open(index).info.generation == first
    assert json.loads(Path(index, "CURRENT").read_text())["seq"] > int(second.split("-")[0])


def test_rolling_back_to_a_damaged_generation_names_those_that_are_whole(healthy, index):
    first, second = sorted(item.name for item in Path(index, "generations").iterdir())
    damage(index, manifest_path(first), "flipped")
    with pytest.raises(PipelineError, match=rf"{first} is no longer whole.*one of: {second}, or"):
        build(healthy.corpus, index, roll_back="previous")
    build(healthy.corpus, index, roll_back=second)
    build(healthy.corpus, index, unpin=True, **SETTINGS)
    check_healthy(healthy.corpus, index, **SETTINGS)


def test_a_pinned_generation_that_is_damaged_says_so_and_both_remedies_work(
    healthy, index, tmp_path
):
    first, second = sorted(item.name for item in Path(index, "generations").iterdir())
    build(healthy.corpus, index, roll_back=first)
    damage(index, read_current(index, STORAGE).owners.path, "lost")
    with pytest.raises(
        CorruptionError, match=r"pinned by a roll-back, and damaged: .*--roll-back, or"
    ):
        build(healthy.corpus, index, **SETTINGS)
    copy = str(shutil.copytree(index, tmp_path / "copy"))
    build(healthy.corpus, copy, full=True, **SETTINGS)
    check_healthy(healthy.corpus, copy, **SETTINGS)
    build(healthy.corpus, index, roll_back=second)
    build(healthy.corpus, index, unpin=True, **SETTINGS)
    check_healthy(healthy.corpus, index, **SETTINGS)


def test_restoring_a_file_is_a_remedy_too(healthy, index):
    path = read_current(index, STORAGE).segments[0].files["vectors"].path
    data = Path(index, path).read_bytes()
    damage(index, path, "cut")
    with pytest.raises(CorruptionError, match="restore it, or build again with --full"):
        SearchIndex.open(index)
    Path(index, path).write_bytes(data)
    check_healthy(healthy.corpus, index, **SETTINGS)


def test_verifying_alone_changes_nothing_and_names_the_remedy(healthy, index):
    before = {info.uri: info.version for info in STORAGE.list_objects(index)}
    damage(index, name_files(index)["truth of the delta"], "flipped")
    with pytest.raises(CorruptionError, match=r"truth.bin is damaged.*build again with --full"):
        build_index(IndexConfig(index=index, verify=True))
    after = {info.uri: info.version for info in STORAGE.list_objects(index)}
    assert after.keys() == before.keys()


def test_an_index_of_a_newer_format_is_left_alone(healthy, index):
    manifest = replace(read_current(index, STORAGE), format=2)
    Path(index, manifest_path(manifest.generation)).write_bytes(manifest.to_json())
    Path(index, "CURRENT").unlink()
    with pytest.raises(CorruptionError, match="has format 2; this program reads 1; upgrade it"):
        build(healthy.corpus, index, full=True, **SETTINGS)


def test_a_budget_that_changed_is_trained_for_anew(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=1200, dim=16)
    index = str(tmp_path / "index")
    codecs = set()
    for budget in ("20kB", "60kB", "8GB", "20kB"):
        build(corpus, index, kind="rabitq", queries=30, memory_budget=budget, full=True)
        codecs.add(read_current(index, STORAGE).codec.file.sha256)
    assert len(codecs) == 3


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("index", "FAISS cannot read .*; build again with --full"),
        ("vectors", "vectors.f16 does not hold .*; restore it, or build again with --full"),
        ("tombstones", "does not hold .* rows; restore it, or build again with --full"),
        ("order", "keys for .* rows; restore it, or build again with --full"),
    ],
)
def test_a_file_that_was_published_wrong_is_made_again_by_a_full_build(healthy, index, kind, words):
    """Its digest is its manifest's, so that it shows only when it is opened."""
    manifest = read_current(index, STORAGE)
    main, *others = manifest.segments
    old = manifest.tombstones[main.id].file if kind == "tombstones" else main.files[kind]
    data = bytes(old.size_bytes) if kind == "tombstones" else b"x" * 40
    Path(index, old.path).write_bytes(data)
    new = describe_file(Path(index, old.path), old.path)
    if kind == "tombstones":
        dead = dict(manifest.tombstones) | {
            main.id: replace(manifest.tombstones[main.id], file=new)
        }
        forged = replace(manifest, tombstones=dead)
    else:
        main = replace(main, files=dict(main.files) | {kind: new})
        forged = replace(manifest, segments=(main, *others))
    forged_bytes = forged.to_json()
    Path(index, manifest_path(manifest.generation)).write_bytes(forged_bytes)
    pointer = replace(look_up(index, STORAGE).pointer, manifest_sha256=digest_bytes(forged_bytes))
    Path(index, "CURRENT").write_bytes(pointer.to_json())
    with pytest.raises(CorruptionError, match=words):
        SearchIndex.open(index)
    build(healthy.corpus, index, full=True, **SETTINGS)
    check_healthy(healthy.corpus, index, **SETTINGS)


REMEDIES = {
    "restore it, or build again with --full": "test_restoring_a_file_is_a_remedy_too",
    "build again with --full": "test_every_remedy_in_a_message_leads_to_a_healthy_index",
    "run the index job again, which goes on from": "test_an_unchanged_night_notices_what_is",
    "roll back to another with --roll-back, or build again with --full": (
        "test_a_pinned_generation_that_is_damaged_says_so_and_both_remedies_work"
    ),
    "check the URI, or run index first": (
        "test_every_remedy_in_a_message_leads_to_a_healthy_index"
    ),
    "check the URI, or run embed first": "test_no_embeddings_no_index_and_no_rows_are_told_apart",
    "run embed first": "test_no_embeddings_no_index_and_no_rows_are_told_apart",
    "run again to build on what it published": "test_the_loser_of_a_race_takes_its_manifest_away",
    "run again": "test_a_build_that_reuses_what_is_collected_meanwhile_is_refused_and_then_runs",
    "run again when nothing else is": "test_a_pointer_that_keeps_changing_is_left_alone",
    "upgrade it": "test_an_index_of_a_newer_format_is_left_alone",
    "--force publishes all the same": "test_a_gate_that_training_anew_does_not_mend_refuses_after",
    "pass --embeddings with the embed job's output": "test_embeddings_have_to_be_given",
    "pass either vectors or image to search with": "test_a_picture_is_searched_with_from_python",
    "use another --index": "test_embeddings_of_another_space_are_refused_by_name",
    "use --kind auto": "test_too_few_vectors_for_the_lists_say_so",
    "use auto": "test_an_unknown_kind_names_those_there_are",
    "and run the embed job again, which makes that shard's parts anew": (
        "test_what_is_said_of_a_damaged_part_makes_the_night_whole"
    ),
    "leave --embeddings out": "test_the_index_is_built_from_the_night_s_own_embeddings",
}
ADVICE = re.compile(r"--[a-z]|\bagain\b|\b(?:run|use|pass|check|upgrade|restore|delete) ")


def list_advice() -> list[str]:
    """Return the advice in every message that the index and the nightly job raise."""
    root = Path(__file__).resolve().parents[2] / "pipeline"
    elsewhere = {"where.py", "values.py", "neighbour.py", "command.py", "package.py"}
    paths = [p for p in (root / "index").rglob("*.py") if p.name not in elsewhere]
    found = []
    for path in [*paths, root / "nightly.py", root / "errors.py"]:
        raised = ast.Return if path.name == "errors.py" else ast.Raise
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Assign) and "REMEDY" in ast.unparse(node.targets[0])
            if not named and not isinstance(node, raised):
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            advice = "".join(text for text in texts if isinstance(text, str)).rpartition("; ")[2]
            if ADVICE.search(advice):
                found.append(advice.strip())
    return found


def test_every_advice_in_a_message_has_a_test_that_follows_it():
    tests = Path(__file__).resolve().parents[1]
    named = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    advice = list_advice()
    assert len(advice) > 16
    unknown = [text for text in advice if not any(known in text for known in REMEDIES)]
    assert unknown == []
    assert [test for test in REMEDIES.values() if f"def {test}" not in named] == []


def test_a_pointer_that_keeps_changing_is_left_alone(healthy, index, monkeypatch):
    def refuse(*_):
        raise ConflictError("somebody was first")

    first = sorted(item.name for item in Path(index, "generations").iterdir())[0]
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.storage.Storage.put_if_version", refuse)
        with pytest.raises(PublishError, match="kept changing for 8 tries; run again when nothing"):
            build(healthy.corpus, index, roll_back=first)
    build(healthy.corpus, index, roll_back=first)
    assert SearchIndex.open(index).info.generation == first
