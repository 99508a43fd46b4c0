"""Conversion of a quantized checkpoint to another format, layer by layer.

Every layer goes source bytes -> canonical layer -> target bytes, so nothing is ever re-quantized. Several layers are
encoded at a time, by threads of this process or by worker processes (``parallel``), and placed in their order; peak
memory is bounded by a budget, or the largest layer, whatever the model's size. Codes stay packed where both sides store
the same bit stream. All layers are checked against the target from metadata alone before anything is written. Tensors
that belong to no quantized layer keep their bytes and dtype unless the format says otherwise (``dense`` is one dtype
throughout).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eqat_export.encoding import EncodedPart, PartReport, copy_tensor, encode_part, passed_through
from eqat_export.parallel.plan import choose_crew, plan_tasks
from eqat_export.parallel.processes import Processes
from eqat_export.parallel.ranks import Group, Ranks
from eqat_export.parallel.schedule import Task, spread
from eqat_export.rounding import Rounding
from eqat_export.workers import Job, in_order
from formats import available_formats, get_format
from formats.atomic_output import writing
from formats.base import Exactness, Format
from formats.container import Choice, ModelWriter, PlacingWriter
from formats.errors import EqatError, InputError, UnsupportedSchemeError
from formats.model import Checkpoint, open_checkpoint
from formats.model_writer import create_model
from formats.types import QuantScheme

__all__ = ["Conversion", "convert"]


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        exactness: exactness class of every layer written.
        rounded: layers whose weights were rounded.
        read: layers whose source stores zero-points as rounded products; what taking whole ones costs.
        casts: biases and passthrough tensors whose cast was not exact.
        weights: parameters inside quantized layers.
        layer_bytes: bytes that the layers take in the output.
        total_bytes: bytes of all tensors in the output.
        choices: how each tensor was stored, where the container has several ways.
        exact_option: an option of the format that holds more layers exactly, if there is one.
    """

    source: Path
    out: Path
    source_format: str
    target_format: str
    scheme: QuantScheme
    layers: int
    exactness: Counter[Exactness] = field(default_factory=Counter)
    rounded: Rounding = field(default_factory=Rounding)
    read: Rounding = field(default_factory=Rounding)
    casts: Rounding = field(default_factory=Rounding)
    weights: int = 0
    layer_bytes: int = 0
    total_bytes: int = 0
    choices: tuple[Choice, ...] = ()
    exact_option: str | None = None

    def add(self, part: PartReport) -> None:
        """Takes a part that was written into account."""
        self.rounded.merge(part.rounded)
        self.read.merge(part.read)
        self.casts.merge(part.casts)
        self.total_bytes += part.nbytes
        if part.exactness is not None:
            self.exactness[part.exactness] += 1
        if part.in_format:
            self.weights += part.weights
            self.layer_bytes += part.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of a quantized layer takes in the output, everything stored with it included."""
        return 8 * self.layer_bytes / self.weights

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "source_format": self.source_format,
            "format": self.target_format,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "layers": self.layers,
            "exactness": {kind.value: count for kind, count in self.exactness.items()},
            "rounded": vars(self.rounded),
            "read": vars(self.read),
            "casts": vars(self.casts),
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.total_bytes,
            "choices": [vars(choice) for choice in self.choices],
        }


def convert(
    source: Path,
    out: Path,
    target: str,
    *,
    source_format: str | None = None,
    options: Mapping[str, str] | None = None,
    shard_size: int = 5 * 10**9,
    force: bool = False,
    workers: int | None = None,
    group: Group | None = None,
    start: Callable[[int], Callable[[str], None]] = lambda total: lambda name: None,
) -> Conversion:
    """Writes the checkpoint ``source`` to ``out`` in another format.

    Args:
        source: a quantized checkpoint in any known format.
        out: output folder; it appears complete or not at all.
        target: format id.
        source_format: read ``source`` as this format instead of detecting it.
        options: what the target format's constructor takes (``Format.options``).
        shard_size: bytes of a file.
        force: replace an existing checkpoint at ``out``.
        workers: processes that encode and write; 1, or None, is this one alone.
        group: the ranks that share the work, this being rank 0; the others are in ``serve_rank``.
        start: called with the number of tensors to write; returns what is called with each layer's name when done.

    Raises:
        EqatError: the source cannot be read, the target cannot hold a layer, or the output exists.
    """
    form = get_format(target, **(options or {}))
    with open_checkpoint(source, source_format) as checkpoint:
        if checkpoint.format is None or checkpoint.scheme is None:
            raise InputError(
                f"{source} is a full-precision model, and export converts quantized ones: eqat train {source}"
            )
        _check_output(source, out)
        try:
            writer = create_model(form, out, checkpoint, shard_size=shard_size, force=force)
            check_layers(checkpoint, form)
        except UnsupportedSchemeError as error:
            raise _with_ways_out(error, checkpoint, out) from error
        result = Conversion(source, out, checkpoint.format.id, form.id, checkpoint.scheme, len(checkpoint.layer_names))
        tasks = plan_tasks(checkpoint, form, writer)
        crew = choose_crew(workers, tasks, writer, group)
        if crew.workers > 1 and isinstance(writer, PlacingWriter):
            settings = {
                "source": str(source.resolve()),
                "source_format": source_format,
                "target": target,
                "options": dict(options or {}),
                "out": str(out),
                "keep_memory": crew.keep_memory,
                "durable": False,
            }
            team = Processes(crew.workers, settings) if group is None else Ranks(group, settings)
            parts = _spread(tasks, team, crew.memory, writer, checkpoint)
        else:
            parts = _alone(tasks, checkpoint, form, writer, out)
        with writer, closing(parts):
            step = start(len(checkpoint.layer_names))
            for part in parts:
                result.add(part)
                if part.exactness is not None:
                    step(part.name)
            writer.finish()
        result.choices = writer.choices()
        result.exact_option = form.exact_option()
    return result


def check_layers(checkpoint: Checkpoint, form: Format) -> None:
    """Checks every layer against a format, from metadata only.

    Raises:
        UnsupportedSchemeError: the first layer that the format cannot hold, by name, or cannot hold beside the others.
    """
    for name in checkpoint.layer_names:
        if not form.holds_module(name):
            continue
        try:
            form.check(checkpoint.layer_scheme(name), *checkpoint.layer_features(name))
        except UnsupportedSchemeError as error:
            raise error.at(f"layer {name}") from error
    if checkpoint.scheme is not None:  # some formats have no words for layers that differ
        form.quantization_config(checkpoint.scheme, checkpoint.ignore, checkpoint.overrides_for(form))


def _with_ways_out(error: UnsupportedSchemeError, checkpoint: Checkpoint, out: Path) -> UnsupportedSchemeError:
    """A refusal that names the formats that hold every layer, and suggests no other."""
    source = checkpoint.format.id if checkpoint.format else None
    others = (get_format(name) for name in available_formats() if name != source)
    holding = [form.id for form in others if _holds_all(checkpoint, form, out)]
    narrowed = UnsupportedSchemeError(error.reason, instead=[name for name in error.instead if name in holding])
    return UnsupportedSchemeError(f"{narrowed} (formats that hold every layer: {', '.join(holding) or 'none'})")


def _holds_all(checkpoint: Checkpoint, form: Format, out: Path) -> bool:
    """True when a conversion is certain not to be refused; dense, which always holds the weights, aside."""
    schemes = {checkpoint.layer_scheme(name) for name in checkpoint.layer_names if form.holds_module(name)}
    if not form.readable or any(map(form.depends_on_values, schemes)):
        return False
    try:
        create_model(form, out.with_name(f".{out.name}.{secrets.token_hex(4)}"), checkpoint)  # writes nothing yet
        check_layers(checkpoint, form)
    except EqatError:
        return False
    return True


def _alone(
    tasks: Sequence[Task], checkpoint: Checkpoint, form: Format, writer: ModelWriter, out: Path
) -> Generator[PartReport, None, None]:
    """Does everything in this process."""
    with closing(in_order(Job(_work(task, checkpoint, form), task.memory) for task in tasks)) as parts:
        for task, part in zip(tasks, parts, strict=True):
            if task.unchanged is None:
                write_part(writer, part)
            elif isinstance(writer, PlacingWriter):
                place = writer.reserve(task.unchanged)
                with writing(out), place.path.open("r+b") as file:
                    copy_tensor(checkpoint, task.name, file.fileno(), place.offset, out)
            yield part


def _spread(
    tasks: Sequence[Task], team: Processes, memory: int, writer: PlacingWriter, checkpoint: Checkpoint
) -> Generator[PartReport, None, None]:
    """Has everything done by other processes."""
    with team:
        yield from spread(tasks, team, writer.reserve, memory, checkpoint.expect)
        team.finish()


def _work(task: Task, checkpoint: Checkpoint, form: Format) -> Callable[[], EncodedPart]:
    checkpoint.expect(task.name)
    if task.unchanged is not None:
        return partial(EncodedPart, task.name, nbytes=task.unchanged.nbytes)
    return partial(encode_part if task.kind == "layer" else passed_through, checkpoint, form, task.name)


def write_part(writer: ModelWriter, part: EncodedPart) -> None:
    """Hands a part's tensors to the writer."""
    if part.in_format:
        writer.add_layer(part.name, part.tensors)
        return
    for name, tensor in part.tensors.items():
        writer.add(name, tensor)


def _check_output(source: Path, out: Path) -> None:
    inside, outside = source.resolve(), out.resolve()
    if inside == outside or outside in inside.parents:
        raise InputError(f"--out {out} is or contains the checkpoint {source}; choose another folder")
