"""File formats of weights: each reads a file into named CPU tensors and writes them back."""
