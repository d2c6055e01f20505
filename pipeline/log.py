"""The project's logger, and how a process writes it."""

import logging

LOG = logging.getLogger("pipeline")


def configure_logging(level: str = "info") -> None:
    """Send the project's log lines to standard error, one line an event.

    Args:
        level: Least important level that is shown: ``debug``, ``info`` or ``warning``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(level.upper())
    LOG.propagate = False
