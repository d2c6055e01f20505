"""How many actors to start, and the CPUs and GPUs each gets."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import EmbedConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resources:
    """Number of actors, and the CPUs and GPUs of each.

    Attributes:
        actors: Number of embedder actors.
        cpus: CPU cores of each.
        gpus: GPUs of each; 0 embeds on the CPU.
        decoders: Number of actors, of one core each, that decode for these; 0 for none.
    """

    actors: int
    cpus: float
    gpus: float
    decoders: int = 0

    @property
    def device(self) -> str:
        """Torch device of an actor."""
        return "cuda" if self.gpus > 0 else "cpu"


def fit_actors(config: EmbedConfig, nodes: Sequence[Mapping[str, float]]) -> Resources:
    """Return the actors that fit the nodes: one per GPU, otherwise one per CPU core.

    An actor lives on one node, so each node is counted by itself, and the decode processes beside a
    GPU are those that every node with GPUs can give. A decode stage gets the cores that are left of
    the whole cluster; without GPUs, that is half of them.

    Args:
        config: Numbers set by the user go first.
        nodes: What each node has, as Ray counts it: ``{"CPU": 8.0, "GPU": 1.0}``.
    """
    gpus = config.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    cpus = config.cpus_per_actor or 1.0
    if gpus:
        room = [_divide(node.get("GPU", 0.0), gpus) for node in nodes]
        shares = [node.get("CPU", 0.0) / n for node, n in zip(nodes, room, strict=True) if n]
        share = 1.0 if config.decode_stage else min(shares, default=1.0)
        cpus = config.cpus_per_actor or max(1.0, share)
    else:
        room = [_divide(node.get("CPU", 0.0), cpus) for node in nodes]
    if not sum(room):
        _log.warning(
            "no node has room for an actor cpus=%g gpus=%g; waiting for the cluster to grow",
            cpus,
            gpus,
        )
    most = sum(room) if gpus or not config.decode_stage else sum(room) // 2
    actors = config.actors or max(1, most)
    cores = sum(node.get("CPU", 0.0) for node in nodes)
    decoders = max(1, int(cores - actors * cpus)) if config.decode_stage else 0
    return Resources(actors, cpus, gpus, decoders)


def _divide(have: float, each: float) -> int:
    return int(have / each + 1e-6)
