"""What position embeddings do inside a network, and the cost of a network."""
