"""Metadata as others publish it: where it lies, what it looks like, and by which rules its rows fall."""
