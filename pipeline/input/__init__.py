"""From input URIs to chunks: listing, containers, the reader."""
