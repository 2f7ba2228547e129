"""The operators: one folder each, with its definition, its fast forms, and a README on both."""

from heron.ops.linear_cross_entropy import linear_cross_entropy
from heron.ops.rosa import rosa
from heron.ops.sample_rows import sample_rows
from heron.ops.wkv7 import wkv7

__all__ = ["linear_cross_entropy", "rosa", "sample_rows", "wkv7"]
