"""How images lie in their containers; ``pipeline.readers`` is the way in."""
