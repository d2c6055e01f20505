"""Histories of an input, and what runs over them: the situations that crash points are tried in."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pipeline.embed_job.run import embed
from simulation.machine import make_config, simulating
from simulation.store import S3, Blob, make_blob
from simulation.world import WORLDS, World

Objects = dict[str, Blob]


def make_tar(**members: str) -> bytes:
    """Return a tar shard of images, each by its content."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(f"{name}.jpg")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return sink.getvalue()


BASE = {
    "a.tar": make_tar(one="a1", two="a2", three="a3"),
    "b.tar": make_tar(one="b1", two="bad b2"),
    "c.jpg": b"c1",
    "d.jpg": b"d1",
}
CHANGED = BASE | {"a.tar": make_tar(one="a1 again", two="a2", four="a4"), "d.jpg": b"d2"}
REMOVED = {"a.tar": BASE["a.tar"], "c.jpg": b"c1"}
GROWN = BASE | {"e.tar": make_tar(one="e1"), "f.jpg": b"slow f1"}
INPUTS = {"base": BASE, "changed": CHANGED, "removed": REMOVED, "grown": GROWN}


@dataclass(frozen=True)
class History:
    """Inputs one after the other, with a run over each; the last run is the one under test.

    Attributes:
        inputs: What lies in the input at each run.
        settings: Of the last run.
        damage: What befalls a part before that run: it goes, or it loses its end.
    """

    inputs: tuple[Mapping[str, bytes], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    damage: Literal["", "gone", "cut"] = ""


HISTORIES = {
    "first": History((BASE,)),
    "unchanged": History((BASE, BASE)),
    "grown": History((BASE, GROWN)),
    "changed": History((BASE, CHANGED)),
    "removed": History((BASE, REMOVED)),
    "restored": History((BASE, REMOVED, BASE)),
    "changed back": History((BASE, CHANGED, BASE)),
    "retried": History((BASE, BASE), {"retry_failed": True}),
    "pruned": History((BASE, CHANGED, CHANGED), {"prune": True}),
    "changed and pruned": History((BASE, CHANGED, REMOVED), {"prune": True}),
    "part gone": History((BASE, BASE), damage="gone"),
    "part cut": History((BASE, BASE), damage="cut"),
}


def put_input(objects: Mapping[str, Blob], files: Mapping[str, bytes], place: str) -> Objects:
    """Return a store with another input."""
    kept = {uri: blob for uri, blob in objects.items() if not uri.startswith(f"{place}/in/")}
    return kept | {f"{place}/in/{name}": make_blob(data) for name, data in files.items()}


@cache
def _prepare(name: str, place: str) -> tuple[tuple[str, Blob], ...]:
    objects: Objects = {}
    for files in HISTORIES[name].inputs[:-1]:
        objects = run_alone(put_input(objects, files, place), place)
    damage_part(objects, HISTORIES[name].damage)
    return tuple(put_input(objects, HISTORIES[name].inputs[-1], place).items())


def damage_part(objects: Objects, damage: str) -> None:
    """Take away the first part, or its end."""
    uri = next((uri for uri in sorted(objects) if "/out/parts/" in uri), "")
    if damage == "gone":
        del objects[uri]
    elif damage == "cut":
        objects[uri] = make_blob(objects[uri].data[:-100])


def prepare(name: str, place: str = S3) -> Objects:
    """Return the store as it is before the last run of a history."""
    return dict(_prepare(name, place))


def run_alone(objects: Mapping[str, Blob], place: str = S3, **settings: Any) -> Objects:
    """Run the embed job once, undisturbed; return the store."""
    world = World(objects=objects)
    WORLDS.append(world)
    try:
        with simulating():
            process = world.start("alone", lambda: embed(make_config(place, **settings)))
            world.run()
    finally:
        WORLDS.pop()
    if process.error is not None:
        raise process.error
    return world.objects
