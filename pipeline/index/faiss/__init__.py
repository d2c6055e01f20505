"""The only code that imports faiss."""
