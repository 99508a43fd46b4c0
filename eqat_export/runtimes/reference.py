"""Our own forward pass: transformers' model of the configuration, filled with dequantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import CheckpointError
from formats.model import Checkpoint

__all__ = ["reference_logits", "reference_model", "token_ids"]

BATCH, LENGTH, SEED = 2, 128, 0


def token_ids(vocabulary: int, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Fixed token ids, int64 ``[batch, length]``: uniform over the vocabulary with seed 0."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def reference_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits of the dequantized model computed in ``dtype``: ``[batch, length, vocabulary]`` on CPU."""
    model = reference_model(checkpoint, dtype, device)
    with torch.inference_mode():
        return model(input_ids=ids.to(device)).logits.cpu()


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The whole model in ``dtype``; weights are dequantized in fp32 and then rounded to it.

    Raises:
        CheckpointError: transformers has no causal LM for the configuration, or tensors are missing, left over or of
            another shape than the model's.
    """
    from transformers import AutoConfig  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415

    folder = checkpoint.reader.folder
    try:
        if folder.is_dir():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:  # a container that is one file says by itself what config.json would
            config = AutoConfig.for_model(**checkpoint.reader.config)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (KeyError, ValueError) as error:
        kind = checkpoint.reader.config.get("model_type")
        raise CheckpointError(
            f"{folder}: transformers has no causal LM for model_type {kind!r}; the runtime check needs one"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors below are dense
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(checkpoint.dense_tensors(dtype)),
        dtype=dtype,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            names = sorted(str(name) for name in loading[problem])
            raise CheckpointError(
                f"{folder}: {len(names)} {problem.replace('_', ' ')} for {model_class.__name__}, e.g. {names[0]}; "
                "config.json and the tensors contradict each other"
            )
    return model.to(device).eval()
