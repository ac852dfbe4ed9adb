"""How good pictures are: pure tensors in, figures out."""
