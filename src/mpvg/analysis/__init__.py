"""What position embeddings do inside a network, and what a network costs."""
