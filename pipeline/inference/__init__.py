"""From crops to vectors: the engines that run a backbone, and the embedder around them."""
