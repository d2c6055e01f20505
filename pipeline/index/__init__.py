"""The index: committed embeddings become segments, segments a generation, generations neighbours.

Everything but one pointer is immutable. Start reading at ``manifest``, then ``job`` and
``search``.
"""
