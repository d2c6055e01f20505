"""The embeddings output: space and layout, parts, commits, verification."""
