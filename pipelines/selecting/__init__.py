"""What a selection is decided by, and what it answers: scores, near-duplicates, removals."""
