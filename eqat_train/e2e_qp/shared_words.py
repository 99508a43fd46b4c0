"""Packed words of a model that does not fit one GPU: each rank holds its share, and a layer's are gathered for use.

A share is one int32 tensor a linear, an equal part of its codes and zero-points in a row; they never change, so nothing
is ever sent back, and at 2 bits a gather moves an eighth of the fp16 weight. Ranks ask for words in the same order.
What forward and backward ask for repeats with every micro-batch, so the next words are on their way while the present
ones are used. Gathered words are kept until as many linears were asked for as a decoder layer has: backward finds those
that its recomputed forward gathered. Scales, their gradient and AdamW's moments are on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from formats.errors import InputError
from formats.model import Checkpoint

from ..models.experts import Experts
from ..ops.packed import PackedWeight
from ..ranks.group import Ranks, current, largest
from .quant_linear import QuantLinear
from .settings import E2eSettings

__all__ = ["SharedWords", "shared_words"]

AHEAD = 3  # linears on their way: an attention's three are used at once
ALIGNED = 64  # words, so that zero-points begin where kernels may load them in large pieces
SHARE_OF_GPU = 0.5  # of what is free: what packed words may take on every rank


def shared_words(source: Checkpoint, settings: E2eSettings) -> SharedWords | None:
    """What shares out a checkpoint's words over the ranks; None where every rank holds all of them."""
    ranks = current()
    if ranks is None or settings.share_weights == "off":
        return None
    wanted = settings.share_weights == "on"
    if settings.share_weights == "auto" and ranks.device.type == "cuda":
        free = torch.cuda.mem_get_info(ranks.device)[0]
        wanted = _packed_bytes(source) > SHARE_OF_GPU * free
    return SharedWords(ranks) if largest(int(wanted)) else None


def _packed_bytes(source: Checkpoint) -> int:
    tensors = source.reader.tensors
    return sum(tensors[f"{name}.{local}"].nbytes for name in source.layer_names for local in source.layer_shapes(name))


class SharedWeight(PackedWeight):
    """A packed weight whose words are gathered when they are looked at."""

    def __init__(self, words: SharedWords, number: int, whole: PackedWeight) -> None:
        fields: dict[str, Any] = {"bits": whole.bits, "group_size": whole.group_size, "in_features": whole.in_features}
        fields |= {"g_idx": whole.g_idx, "_words": words, "_number": number}
        fields |= {"_features": whole.out_features, "_groups": whole.groups}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def qweight(self) -> Tensor:  # type: ignore[override]
        """Gathered codes."""
        return self._words.of(self._number)[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def qzeros(self) -> Tensor:  # type: ignore[override]
        """Gathered zero-points."""
        return self._words.of(self._number)[1]  # type: ignore[attr-defined, no-any-return]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self._features  # type: ignore[attr-defined, no-any-return]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self._groups  # type: ignore[attr-defined, no-any-return]


class SharedWords:
    """The words of all linears of a model.

    Attributes:
        gathers: how many were begun.
        ahead: how many of those were begun before their words were asked for.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._linears: list[QuantLinear] = []
        self._shapes: list[tuple[torch.Size, torch.Size]] = []
        self._here: dict[int, tuple[Tensor, Tensor]] = {}  # the last that were asked for come last
        self._coming: dict[int, tuple[Tensor, dist.Work]] = {}
        self._kept = 1
        self._asked: list[int] = []  # in this pass
        self._known: dict[bool, list[int]] = {}  # with gradients or not -> what the last such pass asked for
        self._gradients, self._position = False, 0
        self.gathers = self.ahead = 0

    def share_(self, linear: QuantLinear) -> QuantLinear:
        """Leaves a linear with this rank's share of its words."""
        whole = linear.packed_weight()
        parts = [_padded(whole.qweight.flatten(), ALIGNED), whole.qzeros.flatten()]
        words = _padded(torch.cat(parts), ALIGNED * self._ranks.size)
        linear.shared = SharedWeight(self, len(self._linears), whole)
        self._shapes.append((whole.qweight.shape, whole.qzeros.shape))
        linear.qweight = words.chunk(self._ranks.size)[self._ranks.rank].clone()
        linear.qzeros = words.new_empty(0)
        self._linears.append(linear)
        return linear

    def begin(self, model: nn.Module, embedding: nn.Module, layers: Sequence[nn.Module]) -> None:
        """To be called when the model is loaded; a pass begins where the embedding is called.

        Raises:
            InputError: ranks would ask for different words.
        """
        if any(isinstance(module, Experts) for module in model.modules()):
            raise InputError(
                "packed weights of a mixture of experts cannot be shared out: each rank's tokens go to other experts; "
                "use --e2e-share off"
            )
        sizes = (sum(isinstance(module, QuantLinear) for module in layer.modules()) for layer in layers)
        self._kept = max(1, *sizes)
        embedding.register_forward_pre_hook(lambda *_: self._begin_pass())

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Codes and zero-points of a linear."""
        new = not self._asked or self._asked[-1] != number
        if new:
            self._note(number)
        if number not in self._here:
            if number not in self._coming:
                self._gather(number)
            words, work = self._coming.pop(number)
            work.wait()
            codes, zeros = self._shapes[number]
            after = -(-codes.numel() // ALIGNED) * ALIGNED
            made = words[: codes.numel()].view(codes), words[after : after + zeros.numel()].view(zeros)
        else:
            made = self._here.pop(number)
        self._here[number] = made
        while len(self._here) > self._kept:
            del self._here[next(iter(self._here))]
        if new:
            self._look_ahead()
        return made

    def _begin_pass(self) -> None:
        self._known[self._gradients] = self._asked
        self._asked, self._gradients, self._position = [], torch.is_grad_enabled(), 0

    def _note(self, number: int) -> None:
        self._asked.append(number)
        known = self._known.get(self._gradients, [])
        as_before = self._position < len(known) and known[self._position] == number
        self._position = self._position + 1 if as_before else len(known)

    def _look_ahead(self) -> None:
        for number in self._known.get(self._gradients, [])[self._position : self._position + AHEAD]:
            if number not in self._here and number not in self._coming:
                self._gather(number)
                self.ahead += 1

    def _gather(self, number: int) -> None:
        share = self._linears[number].qweight
        words = share.new_empty(len(share) * self._ranks.size)
        self._coming[number] = words, dist.all_gather_into_tensor(words, share, async_op=True)
        self.gathers += 1


def _padded(words: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(words, (0, -len(words) % multiple))
