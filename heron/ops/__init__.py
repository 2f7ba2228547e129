"""The operators: one folder each, with its definition, its fast forms, and a README on both."""

from heron.ops.few_rows import few_rows
from heron.ops.fp8_linear import fp8_linear
from heron.ops.head_mix import head_mix
from heron.ops.head_step import head_step
from heron.ops.linear_cross_entropy import cross_entropy, linear_cross_entropy
from heron.ops.low_rank import low_rank_linear
from heron.ops.matvec import matvec
from heron.ops.norm_mix import norm_mix
from heron.ops.rosa import rosa
from heron.ops.sample_rows import sample_rows
from heron.ops.shift_mix import shift_mix
from heron.ops.wkv7 import wkv7, wkv7_span, wkv7_span_gradient

__all__ = [
    "cross_entropy",
    "few_rows",
    "fp8_linear",
    "head_mix",
    "head_step",
    "linear_cross_entropy",
    "low_rank_linear",
    "matvec",
    "norm_mix",
    "rosa",
    "sample_rows",
    "shift_mix",
    "wkv7",
    "wkv7_span",
    "wkv7_span_gradient",
]
