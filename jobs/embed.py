"""Image shards to embeddings: ``python jobs/embed.py --input URI --output URI --model NAME``."""

import sys
from collections.abc import Sequence

from pipeline.backbones import find_backbone
from pipeline.cli import run_job
from pipeline.config import EmbedConfig
from pipeline.embed_job.run import embed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the embed job; return its exit code."""
    return run_job("embed", EmbedConfig, embed, argv, check=lambda c: find_backbone(c.model))


if __name__ == "__main__":
    sys.exit(main())
