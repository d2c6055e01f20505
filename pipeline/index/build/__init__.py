"""Builds a generation: source, differences, training, segments, measurement, gates, seal."""
