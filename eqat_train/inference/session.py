"""``eqat generate`` without its command line: a checkpoint, a prompt, and text that comes piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats.errors import InputError
from formats.model import open_checkpoint

from ..models.loading import load_dense_model, load_tokenizer, resolve_model
from .decoder import Decoder
from .generate import generate
from .loading import load_model, make_decoder
from .sampling import Sampler
from .text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generation", "GenerationOptions", "start_generation"]


@dataclass(frozen=True)
class GenerationOptions:
    """Options of ``eqat generate``; its help says what they are."""

    checkpoint: str
    prompt: str
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    chat: bool = False
    impl: str = "auto"
    cuda_graph: bool = True
    trust_remote_code: bool = False


class Generation:
    """Text as an iterator, and what it took.

    Attributes:
        prompt_tokens: length of the prompt.
        new_tokens: generated so far.
        prompt_seconds: until the first token, kernels compiled and tuned in it included.
        seconds: from the first token to the last so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        sampler: Sampler,
        max_new_tokens: int,
        stop: frozenset[int],
    ) -> None:
        self.prompt_tokens, self.new_tokens = ids.shape[1], 0
        self.prompt_seconds = self.seconds = 0.0
        self._tokens = generate(decoder, ids, sampler, max_new_tokens, stop)
        self._stream = TextStream(tokenizer, ids[0].tolist())

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first one; 0 while there is no second."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else 0.0

    def __iter__(self) -> Iterator[str]:
        started = first = time.perf_counter()
        for token in self._tokens:
            now = time.perf_counter()
            self.new_tokens += 1
            if self.new_tokens == 1:
                first, self.prompt_seconds = now, now - started
            self.seconds = now - first
            text = self._stream.push(token)
            if text:
                yield text

    def rest(self) -> str:
        """What is left of a character that was not completed; call it at the end."""
        return self._stream.finish()


def start_generation(options: GenerationOptions, dtype: torch.dtype, device: torch.device) -> tuple[Generation, str]:
    """Loads the model and prepares the prompt.

    Returns:
        The generation, of which nothing has been computed yet, and a remark for the user, perhaps empty.

    Raises:
        InputError: the prompt does not fit the model's context, ``chat`` without a chat template, or a checkpoint in a
            container of its own (GGUF, ONNX).
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    sampler = Sampler(options.temperature, options.top_p, options.seed, device)
    _refuse_containers(Path(options.checkpoint).expanduser())
    folder = resolve_model(options.checkpoint, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    ids = _prompt_ids(tokenizer, options.prompt, options.chat, folder)
    with open_checkpoint(folder) as checkpoint:
        trust = options.trust_remote_code
        if device.type == "cpu" and options.impl == "auto":  # dequantizing at every token takes most of the time there
            model = load_dense_model(checkpoint, dtype, device, trust_remote_code=trust)
        else:
            model = load_model(checkpoint, dtype, device, impl=options.impl, trust_remote_code=trust)
    new, remark = _fitting(model, ids.shape[1], options.max_new_tokens)
    decoder = make_decoder(model, ids.shape[1] + new, graph=options.cuda_graph)
    return Generation(decoder, tokenizer, ids, sampler, new, _stop_tokens(folder, tokenizer)), remark


def _refuse_containers(path: Path) -> None:
    """Raises for what is no folder of safetensors but can be made one."""
    if not path.is_file() and not any(path.glob("*.onnx")):
        return
    with open_checkpoint(path) as checkpoint:
        form = checkpoint.format.id if checkpoint.format else "dense"
    raise InputError(f"{path} is {form}, which is not run directly; convert it first: eqat export {path} --to native")


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, folder: Path) -> Tensor:
    """int64 ``[1, length]``."""
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{folder} has no chat template; leave --chat out, or write the model's turns yourself")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = list(tokenizer(prompt)["input_ids"])
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
    if not ids:  # an empty prompt: what a text begins with
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [] if start is None else [start]
    return torch.tensor([ids], dtype=torch.int64)


def _fitting(model: PreTrainedModel, prompt: int, wanted: int) -> tuple[int, str]:
    """How many new tokens fit the model's context, and a remark where that is fewer than wanted."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt + wanted
    if prompt >= context:
        raise InputError(f"the prompt has {prompt} tokens; the model's context is {context}: shorten it")
    if prompt + wanted > context:
        return (
            context - prompt,
            f"{prompt} + {wanted} tokens exceed the context of {context}: {context - prompt} follow",
        )
    return wanted, ""


def _stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of generation_config.json."""
    from transformers import GenerationConfig  # noqa: PLC0415

    found: list[int | None] = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(folder).eos_token_id
        found += more if isinstance(more, list) else [more]
    return frozenset(token for token in found if token is not None)
