"""The training-capable model that applications import; see `rwkv_v8_model`."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
