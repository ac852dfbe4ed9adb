"""Training: the loop, its data, its engine and its checkpoints."""
