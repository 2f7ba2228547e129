"""The network and its state."""

from heron.model.rwkv import RWKV
from heron.model.state import LayerState, State

__all__ = ["RWKV", "LayerState", "State"]
