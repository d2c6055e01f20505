"""Seeded mistakes of the protocol, each a change of one line of the product.

A mutant is put in place by giving its function another code object, so every module that has
imported the function runs the changed one.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.embed_job import plan
from pipeline.embed_job.actors import EmbedActor
from pipeline.embed_job.lease import Lease
from pipeline.embed_job.ledger import OpenShard
from pipeline.embed_job.run import _Run
from pipeline.index import garbage, publish
from pipeline.index.build import segment_writer
from pipeline.output import commits, parts
from pipeline.storage import ranges
from pipeline.storage.conditional import ConditionalWrites
from pipeline.storage.local import LocalStore


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        name: What is done wrong.
        function: Where.
        old: The text that is replaced; it occurs once.
        new: What it is replaced by.
        survives: Why schedules seldom or never tell; empty for one that they must tell.
    """

    name: str
    function: Callable[..., Any]
    old: str
    new: str
    survives: str = ""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the changed code instead of the function's own."""
        original = self.function.__code__
        source = textwrap.dedent(inspect.getsource(self.function))
        assert source.count(self.old) == 1, f"{self.name}: {self.old!r} is not there once"
        namespace: dict[str, Any] = {}
        changed = source.replace(self.old, self.new)
        exec(compile(changed, original.co_filename, "exec"), self.function.__globals__, namespace)
        self.function.__code__ = namespace[self.function.__name__].__code__
        try:
            yield
        finally:
            self.function.__code__ = original


MUTANTS = (
    Mutant(
        "a shard is committed before all of its parts are there",
        OpenShard.add,
        "return self.num_chunks == len(self.parts)",
        "return self.num_chunks is not None or self.num_records >= 2",
    ),
    Mutant(
        "a receipt that came twice is booked twice",
        _Run._embed_shards,
        "if opened is None or receipt.chunk in opened.parts:",
        "if opened is None:",
    ),
    Mutant(
        "a commit is written over another run's",
        commits.write_commit,
        "storage.put_if_absent(uri, commit.to_json())",
        "storage.put(uri, commit.to_json())",
        survives="a shard's id names its content, so both commits have the same rows",
    ),
    Mutant(
        "old rows are taken away before the new ones are there",
        _Run._commit,
        "replaced = self._before.get(commit.shard_id)",
        "replaced = self._before.get(commit.shard_id); self._retire(commit.supersedes)",
    ),
    Mutant(
        "superseded commits stay live",
        commits.split_commits,
        "for name in (*commit.supersedes, *_list_sources(commit)):",
        "for name in ():",
    ),
    Mutant(
        "the wrong side is superseded",
        commits.split_commits,
        "newest[name] = max(newest.get(name, age), age)",
        "newest[name] = (10**9, '')",
    ),
    Mutant(
        "an older commit wins against a newer one of its object",
        commits.split_commits,
        "for name in (*commit.supersedes, *_list_sources(commit)):",
        "for name in commit.supersedes:",
    ),
    Mutant(
        "a run counts as no later than one that it took over from",
        _Run._plan,
        "self._sequence = 1 + self._lease.takeovers",
        "self._sequence = 1",
        survives="names of runs begin with the time, and decide where numbers do not",
    ),
    Mutant(
        "every run has the same number",
        _Run._plan,
        "self._sequence += max((commit.sequence for commit in known), default=0)",
        "pass",
    ),
    Mutant(
        "a commit is retired whichever it is",
        commits.retire_commit,
        "if expected is not None and Commit.from_json(data) != expected:",
        "if False:",
    ),
    Mutant(
        "a commit is deleted whatever it has become",
        commits.retire_commit,
        "storage.delete_if_version(uri, version)",
        "storage.delete([uri])",
    ),
    Mutant(
        "a retired commit is forgotten before it is live again",
        commits.restore_commit,
        "write_commit(output, commit, storage)",
        "storage.delete([join_uri(output, retired_path(commit.shard_id))])\n"
        "    write_commit(output, commit, storage)",
        survives="a shard that is neither live nor retired is embedded again",
    ),
    Mutant(
        "listings are not repeated until nothing is new",
        commits._read_commits,
        "if listing and not new:",
        "if listing:",
        survives="tests/output/test_parts.py catches it; few readers list just then",
    ),
    Mutant(
        "damaged parts are not noticed",
        commits.find_damaged,
        "for shard_id, commit in commits.items():",
        "for shard_id, commit in ():",
    ),
    Mutant(
        "parts that were cut short are not noticed",
        commits.find_damaged,
        "elif size_bytes != part.size_bytes:",
        "elif False:",
    ),
    Mutant(
        "pruning deletes parts of live commits",
        commits.prune_output,
        "for commit in retired.values() for part in commit.parts} - live",
        "for commit in retired.values() for part in commit.parts}",
        survives="a shard that is embedded again gets another folder",
    ),
    Mutant(
        "pruning deletes what is not referenced yet",
        commits.prune_output,
        "or (path not in live and (info.modified_s or 0.0) < oldest_s)",
        "or path not in live",
        survives="the run that prunes has no part under way, and its lease forbids others",
    ),
    Mutant(
        "pruning does not ask for the lease",
        commits.prune_output,
        "check()",
        "pass",
    ),
    Mutant(
        "pruning does not say what it is about to delete",
        commits.prune_output,
        "storage.put(own, json.dumps([uri[len(output) + 1 :] for uri in unused]).encode())",
        "pass",
    ),
    Mutant(
        "what is being deleted is used again",
        _Run._plan,
        "doomed = list_doomed(output, self._storage)",
        "doomed = frozenset()",
    ),
    Mutant(
        "parts are named by their place alone",
        parts.part_path,
        'return f"parts/{folder}/{chunk:05d}-{sha256[:16]}.parquet"',
        'return f"parts/{folder}/{chunk:05d}.parquet"',
    ),
    Mutant(
        "a lease is taken without a condition",
        Lease._acquire,
        "return self._storage.put_if_version(self._uri, self._describe_self(), version)",
        "self._storage.put(self._uri, self._describe_self()); return version",
    ),
    Mutant(
        "a live holder is taken for dead",
        Lease._await_death,
        "holder = Holder.from_json(data)",
        "return",
    ),
    Mutant(
        "a lease is renewed without a condition",
        Lease._write_again,
        "return self._storage.put_if_version(self._uri, data, self._version)",
        "self._storage.put(self._uri, data); return self._version",
    ),
    Mutant(
        "a lost reply to a renewal ends the run",
        Lease._write_again,
        "if not self._is_own(found):",
        "if True:",
        survives="tests/embed_job/test_lease.py catches it",
    ),
    Mutant(
        "a run that woke up does not ask whether it still has the lease",
        Lease.check,
        "if self._lost is None and _now_s() - self._renewed_s > self._expire_s / 2:",
        "if False:",
    ),
    Mutant(
        "a run that lost its lease goes on",
        Lease.check,
        "if self._lost is not None:",
        "if False:",
    ),
    Mutant(
        "a lease is given back whoever holds it",
        Lease._give_back,
        "if self._is_own(data):",
        "if True:",
        survives="tests/embed_job/test_lease.py catches it",
    ),
    Mutant(
        "old and new versions of a shard are both live",
        plan._find_superseded,
        'if shard.kind != "bundle" and shard.source in by_source',
        "if False",
    ),
    Mutant(
        "images that were taken away stay",
        plan.plan_shards,
        "removed=tuple(removed),",
        "removed=(),",
    ),
    Mutant(
        "any write that met a conflict counts as done",
        ConditionalWrites._recognise,
        "if head is not None and head.write_id == write_id:",
        "if head is not None:",
    ),
    Mutant(
        "a write that had taken effect is not recognised (S3)",
        ConditionalWrites._recognise,
        "if head is not None and head.write_id == write_id:",
        "if False:",
    ),
    Mutant(
        "a write that had taken effect is not recognised (disk)",
        LocalStore.put_if,
        "if found != version and not (write_id in self._begun and found == written):",
        "if found != version:",
    ),
    Mutant(
        "a conditional write on a disk does not look",
        LocalStore.put_if,
        "if found != version and not (write_id in self._begun and found == written):",
        "if False:",
    ),
    Mutant(
        "a short answer is taken for the whole",
        ranges.read_span,
        "if position >= end:",
        "if True:",
    ),
    Mutant(
        "what became of a shard that cannot be read is not told",
        EmbedActor._embed_load,
        "yield _describe_failed(failed)",
        "pass",
    ),
)


INDEX_MUTANTS = (
    Mutant(
        "CURRENT names a manifest before it is written",
        publish.publish,
        "files.storage.put_if_absent(uri, data)",
        "needed = tuple(manifest.list_needed())\n"
        "    sha = digest_bytes(data)\n"
        "    swap_pointer(files, Target(manifest.generation, sha, manifest.seq, needed), before)\n"
        "    return files.storage.put_if_absent(uri, data)",
    ),
    Mutant(
        "CURRENT is swapped without a condition",
        publish.swap_pointer,
        "files.storage.put_if_version(uri, pointer.to_json(), before.version)",
        "files.storage.put(uri, pointer.to_json())",
    ),
    Mutant(
        "whoever meets a conflict takes it for its own write",
        publish._took_effect,
        "if now is None:",
        "if True:\n        return True\n    if now is None:",
        survives="the loser says that it published, and what serves stays whole",
    ),
    Mutant(
        "the loser of a race deletes its manifest whatever serves",
        publish.publish,
        "if before.pointer and now and manifest.generation not in (now.generation, *now.history):",
        "if True:",
        survives="one schedule in hundreds tells, kept as a test of its own",
    ),
    Mutant(
        "what a collection between has deleted is not looked for",
        publish._let_pass,
        "if damage is not None:",
        "if False:",
        survives="the list of what is doomed tells first",
    ),
    Mutant(
        "a generation is published whatever is being deleted",
        publish._refuse_doomed,
        "if path in doomed:",
        "if False:",
    ),
    Mutant(
        "a collection deletes without changing CURRENT",
        garbage.delete_garbage,
        "storage.put_if_version(uri, announced.to_json(), found.current.version)",
        "pass",
    ),
    Mutant(
        "a collection goes by age alone",
        garbage.find_garbage,
        "if _is_old(info, newest) and info.uri not in needed and",
        "if _is_old(info, newest) and not info.uri.endswith('CURRENT') and",
    ),
    Mutant(
        "a collection forgets the generation that serves",
        garbage.find_garbage,
        "kept = {current.pointer.generation, *served[:keep], *young}",
        "kept = set(young)",
    ),
    Mutant(
        "a collection whose reply was lost gives up its list",
        garbage.delete_garbage,
        "if now is None or now.doomed != path:",
        "if True:",
        survives="tests/index/test_lost_replies.py catches it",
    ),
    Mutant(
        "a segment is named before its files are there",
        segment_writer.build_segment,
        "built = writer.finish(",
        "files.storage.put(join_uri(files.index, marker), b'{}')\n        built = writer.finish(",
        survives="a marker that cannot be read is not reused",
    ),
)
