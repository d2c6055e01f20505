"""Answers searches from a published generation."""
