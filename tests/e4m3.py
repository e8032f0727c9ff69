"""FP8 (e4m3) in Triton's interpreter.

It reads e4m3 rightly, but for NaN. What it stores it rounds wrongly (Triton 3.9 makes 16 of 31.5,
and 256 of 1000). On a GPU the conversions are single instructions, which tests/compile_kernels.py
looks for; here PyTorch stands in for them.
"""

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.checkpoints.kv_scales import FP8
from nanovllm.kernels._triton import HAS_TRITON


def convert_e4m3_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test, PyTorch converts to and from e4m3 in the interpreter."""
    if not HAS_TRITON or torch.cuda.is_available():
        return
    import triton.runtime.interpreter as interpreter

    convert = interpreter._convert_float

    def convert_float(x: np.ndarray, source: Any, target: Any, rounding: Any) -> Any:
        if str(target) == "fp8e4nv":
            assert x.dtype == np.float32
            rounded = torch.from_numpy(x.copy()).clamp(-448, 448).to(FP8)
            return rounded.view(torch.uint8).numpy()
        if str(source) == "fp8e4nv":
            exact = torch.from_numpy(x.copy()).view(torch.uint8).view(FP8)
            return exact.to(torch.float16 if str(target) == "fp16" else torch.float32).numpy()
        return convert(x, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
