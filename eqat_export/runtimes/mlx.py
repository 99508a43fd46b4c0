"""mlx-lm, computing in fp32.

``mlx_lm.utils.load_model`` reads the folder by itself; its parameters are then widened to fp32, which changes no
number. In 16 bits MLX rounds ``q * scale`` before it adds the bias and, on the CPU, every partial sum (``_qmm_t`` in
``mlx/backend/cpu/quantized.cpp``), so that neither weights nor logits would tell about the file. Its fp32 sums run
through a row one product at a time, which no blocked matrix product equals; logits may show what 16 bits cost, in
which such models are run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formats.model import Checkpoint

from .base import Runtime, Session

__all__ = ["MlxRuntime"]


class MlxRuntime(Runtime):
    """``mlx_lm.utils.load_model(folder)``."""

    id = "mlx"
    package = "mlx-lm"
    requires = ("mlx", "mlx_lm")
    extra = "mlx"
    formats = ("mlx", None)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`; MLX chooses its device by itself."""
        import mlx.core as mx  # noqa: PLC0415
        from mlx_lm.utils import load_model  # noqa: PLC0415

        model, _ = load_model(checkpoint.reader.folder)
        model.set_dtype(mx.float32)
        session = _MlxSession(model)
        session.device = str(mx.default_device()).removeprefix("Device(").partition(",")[0]
        return session


class _MlxSession(Session):
    dtype = torch.float32
    logits_dtype = torch.float16

    def __init__(self, model: Any) -> None:
        self.model = model
        self._modules = dict(model.named_modules())

    def logits(self, ids: Tensor) -> Tensor:
        """See Session."""
        return _run(self.model, ids)

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """See Session; an embedding answers as the output layer that it is where both are tied."""
        module: Any = self._modules.get(name)
        return None if module is None else partial(_run, getattr(module, "as_linear", module))


def _run(function: Callable[[Any], Any], inputs: Tensor) -> Tensor:
    import mlx.core as mx  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    return torch.from_numpy(np.array(function(mx.array(inputs.cpu().numpy()))))
