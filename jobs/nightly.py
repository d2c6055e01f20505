"""Embed, index, report, every night: ``python jobs/nightly.py --config nightly.toml``."""

import sys
from collections.abc import Sequence

from pipeline.backbones import find_backbone
from pipeline.cli import run_job
from pipeline.config import NightlyConfig
from pipeline.nightly import run_nightly


def main(argv: Sequence[str] | None = None) -> int:
    """Run the nightly job; return its exit code."""
    return run_job(
        "nightly",
        NightlyConfig,
        run_nightly,
        argv,
        check=lambda config: find_backbone(config.embed.model),
    )


if __name__ == "__main__":
    sys.exit(main())
