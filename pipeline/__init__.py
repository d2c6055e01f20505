"""Batch image embeddings on Ray."""
