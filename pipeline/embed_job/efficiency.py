"""How close a run came to what its machines can do, what bound it, and what would help."""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pipeline.embed_job.resources import Resources

_IDLE_SHARE = 0.15
"""Actors that are idle for longer than this lack loads, whatever else they lack."""

Binding = Literal["read", "decode", "forward"]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The outcome of ``judge_run``.

    Attributes:
        forward_images_per_s: What the forward passes alone would have reached.
        host_images_per_s: What decoding and transforming alone would have reached.
        ceiling_images_per_s: The most both could have reached together: the smaller of the two
            where they run on different devices, less where they share their cores.
        reached: Share of that ceiling that was reached.
        idle: Share of the actors' time without any load.
        binds: The stage that more of would help most.
        advice: The same in words, with numbers.
    """

    forward_images_per_s: float
    host_images_per_s: float
    ceiling_images_per_s: float
    reached: float
    idle: float
    binds: Binding
    advice: str


def judge_run(
    images: int, seconds: float, stages: Mapping[str, float], resources: Resources
) -> Efficiency | None:
    """Compare a run with the ceilings that its own stages give.

    Args:
        images: Images that were embedded.
        seconds: Time in which the actors did it; start-up apart.
        stages: Seconds by stage, summed over actors: ``decode`` and ``transform`` (CPU time),
            ``forward`` (the device's time), ``idle``.
        resources: What the actors had.

    Returns:
        None where there is nothing to judge.
    """
    forward_s = stages.get("forward", 0.0)
    host_s = stages.get("decode", 0.0) + stages.get("transform", 0.0)
    if not images or seconds <= 0 or forward_s <= 0 or host_s <= 0:
        return None
    cores = resources.decoders or resources.actors * max(1, round(resources.cpus))
    forward = images * resources.actors / forward_s
    host = images * cores / host_s
    shared = not resources.gpus and not resources.decoders
    ceiling = 1 / (1 / forward + 1 / host) if shared else min(forward, host)
    idle = min(1.0, stages.get("idle", 0.0) / (resources.actors * seconds))
    binds: Binding = "forward" if forward <= host else "decode"
    if idle > _IDLE_SHARE and images / seconds < (1 - _IDLE_SHARE) * ceiling:
        binds = "read"
    return Efficiency(
        forward_images_per_s=forward,
        host_images_per_s=host,
        ceiling_images_per_s=ceiling,
        reached=images / seconds / ceiling,
        idle=idle,
        binds=binds,
        advice=_advise(binds, forward, host, idle, resources),
    )


def _advise(binds: Binding, forward: float, host: float, idle: float, resources: Resources) -> str:
    if binds == "read":
        return (
            f"read-bound: embedder actors had no images for {idle:.0%} of their time; bring the "
            "shards nearer, cut them smaller if there are fewer than actors, or use fewer actors"
        )
    if not resources.gpus:
        return _advise_cpu(binds, forward, host)
    if binds == "decode":
        cores = (resources.decoders or resources.actors * resources.cpus) * (forward / host - 1)
        more = math.ceil(cores / (resources.actors * resources.gpus))
        return (
            f"decode-bound: {more} more CPU cores per GPU would fill it; or --decode fast, "
            "--decode gpu, or --decode-stage with CPU-only nodes"
        )
    return (
        f"forward-bound: the GPUs are full, and their cores could feed {host / forward:.1f} times "
        "as many images; --precision bf16, --engine torch-compile, or more GPUs"
    )


def _advise_cpu(binds: Binding, forward: float, host: float) -> str:
    share = host / (host + forward) if host != math.inf else 1.0
    if binds == "decode":
        return (
            f"decode-bound: decoding takes {1 - share:.0%} of the cores; --decode fast, or more "
            "cores"
        )
    return (
        f"forward-bound: the forward pass takes {share:.0%} of the cores; --engine openvino, a "
        "GPU, or more cores"
    )


class IdleClock:
    """Counts the time in which an actor has nothing to do; several threads may work at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working = 0
        self._since_s = time.perf_counter()

    @contextmanager
    def interrupted(self) -> Iterator[float]:
        """Work; gives the idle seconds that this brings to an end, 0 beside another's work."""
        with self._lock:
            idle_s = 0.0 if self._working else time.perf_counter() - self._since_s
            self._working += 1
        try:
            yield idle_s
        finally:
            with self._lock:
                self._working -= 1
                self._since_s = time.perf_counter()
