"""File formats of weights: each reads a file into named CPU tensors and writes them back."""

MOST_TENSORS = 5_000  # that a file of weights may hold
LONGEST_NAME = 256  # characters of a tensor's name
