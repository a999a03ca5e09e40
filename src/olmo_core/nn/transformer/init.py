"""How weights start; defined in :mod:`olmo_core.nn.init`."""

from olmo_core.nn.init import InitMethod

__all__ = ["InitMethod"]
