"""Command lines: settings, one call, an exit code."""
