"""Ops with custom kernels, one file each: eager reference, schema, backends, autograd."""

from dmcp.ops.retain import retain, retain_reference

__all__ = ["retain", "retain_reference"]
