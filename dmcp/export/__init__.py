"""Networks in forms that need no ``dmcp``: ONNX, ``torch.export``, plain Python.

Each is written for batches of any size, run, and compared with the network before the file exists.
"""

from dmcp.export.check import TOLERANCE
from dmcp.export.onnx import OnnxNetwork, to_onnx
from dmcp.export.python import load_python, to_python
from dmcp.export.torch_export import TorchNetwork, to_torch

__all__ = [
    "TOLERANCE",
    "OnnxNetwork",
    "TorchNetwork",
    "load_python",
    "to_onnx",
    "to_python",
    "to_torch",
]
