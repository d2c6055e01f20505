"""Lookups over HTTP, and the page: DOOR to the web framework."""
