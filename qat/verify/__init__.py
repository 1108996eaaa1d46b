"""Do PyTorch, ONNX Runtime and the engine compute the same, and if not, from which layer on?

Works without torch where no PyTorch model is compared.
"""

from .outcome import Agreement, Departure, OutputCheck, TensorCheck, VerifyReport
from .run import verify

__all__ = ["Agreement", "Departure", "OutputCheck", "TensorCheck", "VerifyReport", "verify"]
