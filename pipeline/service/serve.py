"""Serves an index over HTTP: in this process, or on Ray Serve."""

from pipeline.config import ServeConfig
from pipeline.service.server import ServeReport, check_keys, serve_here


def serve(config: ServeConfig) -> ServeReport:
    """Answer lookups until a signal says stop; what ``jobs/serve.py`` calls.

    Raises:
        SettingsError: A setting is wrong, or the service would let strangers in unasked.
        ObjectMissingError: There is no index.
    """
    check_keys(config)
    if config.local:
        return serve_here(config)
    from pipeline.service.cluster import serve_on_ray  # Ray takes seconds to import

    return serve_on_ray(config)
