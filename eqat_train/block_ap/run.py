"""Block-AP: block-wise training of all parameters (EfficientQAT, arXiv 2407.11062, section 3.2).

Blocks are trained in turn. Two streams of hidden states run through the model: the full-precision stream through the
original blocks, the quantized stream through the finished ones. A block is trained to map its quantized input to the
full-precision block's output of the full-precision input, in mean squared error; weights, scales, zero-points, norms
and biases are all trained, scales and zero-points from the weights' minima and maxima. Then its quantized layers are
written, the quantized stream advances through the block as written, and the block is freed.

Weights are fp32 and computed with under autocast to ``compute_dtype``. Hidden states enter every block as fp32, so the
residual stream keeps its digits; they are kept between blocks in ``activation_dtype``, fp32 unless memory or disk asks
for half of it.

A run that stopped goes on from its finished blocks: the streams are taken through them again, by the same computations
as the first time, so the next block starts from the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from formats import Format, QuantizedLinear, QuantScheme, get_format
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.errors import CheckpointError, InputError, TrainingDivergedError
from formats.model_writer import write_model_config

from ..hardware import peak_memory
from ..models.experts import check_experts, count_tokens
from ..models.loading import build_skeleton, check_names, load_parameters_, persistent_tensors, unload_
from ..models.targets import check_linear, find_targets, refuse_quantized
from ..overrides import describe_overrides
from ..ranks.divergence import check_same
from ..ranks.group import largest, local_size, suffixed, together
from ..reporting.progress import Reporter
from ..resume.stage import StageRecord
from .activations import ActivationStore, Place, bytes_to_train, choose_place
from .block_files import BlockFiles, Blocks
from .capture import BlockCall, Capture
from .checks import check_tokens
from .output_head import check_head, encoded_head
from .passes import Streams, advance_, forward_spans, validate
from .settings import BlockApReport, BlockApSettings, BlockReport
from .shares import call_followers, own_samples, own_settings, slowest, tokens_of_all
from .starved_experts import report_experts, starved_linears
from .telling import tell_block
from .trainable_block import TrainableBlock, put_numbers_
from .trainer import train_block
from .unfinished import block_ap_identity, block_report, going_on, report_from
from .untouched import untouched_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockApReport", "BlockApSettings", "BlockReport", "check_block_ap", "run_block_ap"]

Finished = tuple[dict[str, QuantizedLinear], dict[str, Tensor]]  # quantized layers and other tensors by local name


def check_block_ap(model_folder: Path, settings: BlockApSettings, *, trust_remote_code: bool = False) -> None:
    """Refuses a model or a scheme that ``run_block_ap`` would refuse, in seconds and before any data is needed.

    Raises:
        InputError: the model has no decoder blocks that can be trained.
        UnsupportedSchemeError: the scheme does not fit a layer; the text names it and what works.
        CheckpointError: the model folder is damaged, or its tensors are not those of the architecture.
    """
    with CheckpointReader(model_folder) as reader:
        model = build_skeleton(model_folder, torch.float32, trust_remote_code=trust_remote_code)
        BlockApRun(reader, model, own_settings(settings), Reporter()).check()


def run_block_ap(
    model_folder: Path,
    train: Tensor,
    val: Tensor,
    settings: BlockApSettings,
    out: Path,
    *,
    work_dir: Path,
    reporter: Reporter,
    shard_size: int = 5 * 2**30,
    force: bool = False,
    trust_remote_code: bool = False,
) -> BlockApReport:
    """Trains a model block by block and writes a native checkpoint.

    Args:
        model_folder: full-precision model with safetensors, configuration and tokenizer.
        train: token ids, int64 ``[samples, seq]``; not looked at when ``settings.epochs`` is 0.
        val: validation token ids, int64 ``[samples, seq]`` with the same ``seq``; may have no samples.
        settings: see :class:`BlockApSettings`.
        out: the checkpoint; nothing is there until it is complete.
        work_dir: folder for finished blocks and for activations on disk. Finished blocks of a run that stopped are
            taken from it when everything that they depend on is as it was.
        reporter: is told of progress.
        shard_size: bytes of a shard of the checkpoint.
        force: replace an existing checkpoint.
        trust_remote_code: allow Python files of the model folder to run.

    Raises:
        InputError: settings, tokens or a model that cannot be trained, or not those of the run in ``work_dir``.
        UnsupportedSchemeError: the scheme does not fit a layer; the text names it and what works.
        CheckpointError: the model folder is damaged or the output cannot be written.
        OutputExistsError: ``out`` exists and ``force`` is not given.
        TrainingDivergedError: a loss became NaN or infinite; finished blocks are kept in ``work_dir``.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    with CheckpointReader(model_folder) as reader:
        refuse_quantized(reader, "Block-AP")
        model = build_skeleton(model_folder, torch.float32, trust_remote_code=trust_remote_code)
        run = BlockApRun(reader, model, own_settings(settings), reporter)
        run.check()
        if settings.epochs:
            check_tokens(train, val, run.model.config.get_text_config().vocab_size)
        work_dir.mkdir(parents=True, exist_ok=True)
        identity = block_ap_identity(model_folder, train, val, settings)
        record = StageRecord(work_dir / "block-ap.written.json", identity)
        if (written := record.written(out)) is not None:
            reporter.message(f"Block-AP's checkpoint is finished: {out}")
            return report_from(written)
        if told := describe_overrides(run.schemes, settings.scheme):
            reporter.message(told)
        with CheckpointWriter(out, shard_size=shard_size, force=force) as writer:
            files = BlockFiles(work_dir / ("blocks" if settings.epochs else "rounding"), identity)
            blocks, place = run.train(train, val, files, work_dir)
            seconds = time.perf_counter() - started
            report = BlockApReport(blocks, seconds, max(block.peak_memory for block in blocks), place)
            record.begin(out, asdict(report))
            run.write(writer, files)
        record.done(out, asdict(report))
        files.remove()
    return report


class BlockApRun:
    """One run over an open full-precision checkpoint, on one rank."""

    def __init__(
        self, reader: CheckpointReader, model: PreTrainedModel, settings: BlockApSettings, reporter: Reporter
    ) -> None:
        self.reader, self.model, self.settings, self.reporter = reader, model, settings, reporter
        self._said: set[str] = set()
        self.format: Format = get_format("native")
        self.device, self.dtype = settings.resolved_device(), settings.resolved_compute_dtype()
        self.targets = find_targets(model, reader, settings.scheme, settings.overrides)
        self.path, self.layers, self.schemes = self.targets.path, self.targets.layers, self.targets.schemes
        self.parameters = {
            f"{self.path}.{i}.{name}"
            for i, layer in enumerate(self.layers)
            for name in {name for name, _ in layer.named_parameters()}.difference(
                untouched_parameters(layer, self._block_schemes(i))
            )
        }

    def check(self) -> None:
        """Refuses what would fail later: a scheme that does not fit, or a file whose tensors are not the model's."""
        check_names(self.model, self.reader.tensors, self.reader.folder)
        check_head(self.model, self.targets.head, self.format)
        for index, layer in enumerate(self.layers):
            check_experts(layer, f"{self.path}.{index}")
            for name, module in layer.named_modules():
                scheme = self.schemes.get(f"{self.path}.{index}.{name}")
                if scheme is not None:
                    check_linear(f"{self.path}.{index}.{name}", module, scheme, self.format)
            for _, _, name in persistent_tensors(layer):
                full = f"{self.path}.{index}.{name}"
                if full not in self.reader.tensors:
                    raise CheckpointError(
                        f"{self.reader.folder} has no tensor {full}, which {type(self.model).__name__} needs; "
                        "save the model again with transformers' save_pretrained"
                    )

    def train(
        self, train: Tensor, val: Tensor, files: Blocks, work_dir: Path
    ) -> tuple[tuple[BlockReport, ...], Place | None]:
        """Trains and saves every block that is not finished, or rounds it to the nearest when there are no epochs."""
        count, done = len(self.layers), files.finished
        blocks = [block_report(values) for values in files.reports]
        if done or files.damaged is not None:
            self.reporter.message(going_on(done, count, files))
        if not self.settings.epochs or done == count:
            blocks += [self._round_block(files, index) for index in range(done, count)]
            return tuple(blocks), None
        call_followers(files.folder, done, train, val)
        with ExitStack() as stack:
            stack.enter_context(together())
            train, val = own_samples(train, val, self.settings.batch_size)
            calls, splits, place = self._capture(stack, train, val, work_dir)
            for index in range(done):
                self._replay_block(files, index, calls[index], *splits)
            blocks += [self._train_block(files, index, calls[index], *splits) for index in range(done, count)]
        return tuple(blocks), place

    def write(self, writer: CheckpointWriter, files: BlockFiles) -> None:
        """Puts the checkpoint together."""
        owner = {name: index for name in self.reader.tensors if (index := self._block_of(name)) is not None}
        head = encoded_head(self.reader, self.targets.head, self.format, self.settings.scale_dtype)
        files.assemble(writer, self.reader, owner, self.parameters, head)
        usual = self.settings.scheme
        overrides = self.targets.overrides(usual)
        write_model_config(writer, self.reader.config, self.format, usual, self.targets.ignore, overrides=overrides)
        writer.copy_companions(self.reader.folder)

    def _block_of(self, name: str) -> int | None:
        index = name.removeprefix(f"{self.path}.").partition(".")[0]
        inside = name.startswith(f"{self.path}.") and index.isdigit() and int(index) < len(self.layers)
        return int(index) if inside else None

    def _capture(
        self, stack: ExitStack, train: Tensor, val: Tensor, work_dir: Path
    ) -> tuple[list[BlockCall], tuple[Streams, Streams], Place]:
        """Arguments of the blocks, and the streams filled with the first block's input."""
        with Capture(self.model, self.path, self.layers, self.reader, self.device) as capture:
            calls = capture.calls(train[:1])
            hidden = capture.inputs(train[:1]).shape[-1]
            activation_dtype = self.settings.resolved_activation_dtype()
            samples = 2 * (len(train) + len(val))  # two streams
            nbytes = samples * train.shape[1] * hidden * activation_dtype.itemsize
            choice = choose_place(
                self.settings.activations,
                nbytes,
                self.device,
                work_dir,
                reserved=bytes_to_train(self.layers, min(self.settings.batch_size, len(train)) * train.shape[1]),
                dtype=activation_dtype,
                sharing=local_size(),
            )
            choice = replace(choice, place=slowest(choice.place))
            self.reporter.message(str(choice))
            splits = []
            for name, tokens in (("train", train), ("val", val)):
                shape = (len(tokens), train.shape[1], hidden)
                files = (work_dir / suffixed(f"{name}-{stream}.bin") for stream in ("full", "quantized"))
                full, quantized = (
                    stack.enter_context(ActivationStore(shape, activation_dtype, choice.place, self.device, file))
                    for file in files
                )
                for start, stop in forward_spans(full):
                    full.write(start, capture.inputs(tokens[start:stop]))
                full.check_range()
                quantized.copy_from(full)
                splits.append(Streams(full, quantized))
        return calls, (splits[0], splits[1]), choice.place

    def _load(self, index: int) -> nn.Module:
        prefix, layer = f"{self.path}.{index}", self.layers[index]
        load_parameters_(layer, prefix, self.reader, self.device, torch.float32)
        finite = torch.stack([parameter.isfinite().all() for parameter in layer.parameters()]).tolist()
        for (name, _), good in zip(layer.named_parameters(), finite, strict=True):
            if not good:
                raise CheckpointError(
                    f"{self.reader.folder}: tensor {prefix}.{name} holds NaN or infinity; fetch it again"
                )
        return layer

    def _trainable(self, index: int, rounded: Container[str] = ()) -> TrainableBlock:
        prefix = f"{self.path}.{index}"
        stored = {
            name: self.reader.tensors[f"{prefix}.{name}"].dtype for name, _ in self.layers[index].named_parameters()
        }
        settings, schemes = self.settings, self._block_schemes(index)
        return TrainableBlock(
            self.layers[index], schemes, settings.scale_dtype, stored, settings.zero_range, rounded, settings.start
        )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.reporter.message(text)

    def _block_schemes(self, index: int) -> dict[str, QuantScheme]:
        """Local path of each linear of a block that is quantized -> its scheme."""
        prefix = f"{self.path}.{index}."
        found = {name.removeprefix(prefix): scheme for name, scheme in self.schemes.items() if name.startswith(prefix)}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def _save(self, files: Blocks, report: BlockReport, finished: Finished) -> BlockReport:
        layers, tensors = finished
        prefix = f"{self.path}.{report.index}"
        encoded = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
        for name, layer in layers.items():
            encoded |= {f"{prefix}.{name}.{local}": tensor for local, tensor in self.format.encode(layer).items()}
        files.save(report.index, encoded, asdict(report))
        tell_block(self.reporter, report)
        return report

    def _read(self, files: Blocks, index: int) -> Finished:
        """A finished block's quantized layers and other tensors, by local name, as ``finish_`` gave them."""
        prefix = f"{self.path}.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in files.read(index).items()}
        layers: dict[str, QuantizedLinear] = {}
        for name, scheme in self._block_schemes(index).items():
            own = [full for full in tensors if full.startswith(f"{name}.")]
            encoded = {full.removeprefix(f"{name}."): tensors.pop(full) for full in own}
            layers[name] = self.format.decode(encoded, scheme)
        return layers, tensors

    def _replay_block(self, files: Blocks, index: int, call: BlockCall, train: Streams, val: Streams) -> None:
        """Takes the streams through a finished block."""
        layer = self._load(index)
        for split in (train, val):
            advance_(split.full, layer, call, self.dtype)
        put_numbers_(layer, *self._read(files, index))
        for split in (train, val):
            advance_(split.quantized, layer, call, self.dtype)
        unload_(layer)

    def _round_block(self, files: Blocks, index: int) -> BlockReport:
        started = time.perf_counter()
        self._load(index)
        finished = self._trainable(index).finish_()
        unload_(self.layers[index])
        return self._save(files, self._report(index, None, [], [], started), finished)

    def _train_block(self, files: Blocks, index: int, call: BlockCall, train: Streams, val: Streams) -> BlockReport:
        started = time.perf_counter()
        settings = self.settings
        torch.manual_seed(settings.seed + index)  # the same numbers whether earlier blocks were trained or replayed
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        layer = self._load(index)
        with count_tokens(layer) as seen:
            advance_(train.full, layer, call, self.dtype)  # the full-precision stream becomes the target
        advance_(val.full, layer, call, self.dtype)
        if not self._block_schemes(index):
            return self._pass_block(files, index, call, train, val, started)
        seen = tokens_of_all(seen)
        report_experts(self.reporter, index, seen, settings.min_expert_tokens)
        block = self._trainable(index, starved_linears(layer, seen, settings.min_expert_tokens))
        start_val_loss = validate(block, call, val, self.dtype)
        if start_val_loss is not None and not math.isfinite(start_val_loss):
            raise InputError(
                f"block {index} ({self.path}.{index}): validation loss is {start_val_loss} before any training; "
                "its hidden states overflow, compute with --dtype float32"
            )
        steps = settings.epochs * -(-len(train.full) // settings.batch_size)
        with self.reporter.task(f"block {index + 1}/{len(self.layers)}", steps) as task:
            try:
                train_losses, val_losses = train_block(block, call, train, val, settings, task, self._say_once)
            except TrainingDivergedError as exc:
                done = f"{index} finished block{'s are' if index > 1 else ' is'} kept in {files.folder}"
                kept = done if index else "no block was finished"
                raise TrainingDivergedError(
                    f"block {index} ({self.path}.{index}): {exc}; {kept}; lower the learning rates"
                ) from exc
        check_same(dict(layer.named_parameters()), f"block {index} ({self.path}.{index})")
        finished = block.finish_()
        if index + 1 < len(self.layers):
            for split in (train, val):
                advance_(split.quantized, layer, call, self.dtype)
        unload_(layer)
        report = self._report(index, start_val_loss, train_losses, val_losses, started)
        return self._save(files, report, finished)

    def _pass_block(
        self, files: Blocks, index: int, call: BlockCall, train: Streams, val: Streams, started: float
    ) -> BlockReport:
        """A block that stays as it is; the full-precision stream has gone through it already."""
        for split in (train, val):
            advance_(split.quantized, self.layers[index], call, self.dtype)
        unload_(self.layers[index])
        return self._save(files, self._report(index, None, [], [], started), ({}, {}))

    def _report(
        self,
        index: int,
        start_val_loss: float | None,
        train_losses: list[float],
        val_losses: list[float | None],
        started: float,
    ) -> BlockReport:
        return BlockReport(
            index,
            start_val_loss,
            tuple(train_losses),
            tuple(val_losses),
            time.perf_counter() - started,
            largest(peak_memory(self.device)),
        )
