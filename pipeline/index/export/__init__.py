"""Exports of a generation: kNN graph, near-duplicates, plain FAISS files."""
