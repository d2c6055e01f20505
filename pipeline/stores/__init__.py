"""The kinds of store behind ``pipeline.storage``: one try per call, raw errors."""
