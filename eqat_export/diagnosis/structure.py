"""Tensors that are missing, left over, or in a file of their own."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from eqat_export.findings import Finding, error, warning
from formats.model import Checkpoint
from formats.safetensors_header import read_header

__all__ = ["check_structure", "has_tokenizer", "stray_files"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json", "vocab.txt")
_SUFFIX = ".safetensors"
_BLOCK = re.compile(r"(?P<list>.+?)\.(?P<index>\d+)\.(?P<member>.+)")


def check_structure(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Missing tensors of layers, missing linears of blocks, missing blocks, and shards that nothing names."""
    yield from _orphans(checkpoint)
    yield from _missing_members(checkpoint)
    yield from _missing_blocks(checkpoint)
    yield from _shards(checkpoint)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """True when one stands beside the weights; a model that is one file has it inside."""
    folder = checkpoint.reader.folder
    return not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZERS)


def stray_files(checkpoint: Checkpoint) -> list[str]:
    """Safetensors files in the folder that hold none of the checkpoint's tensors."""
    used = {info.shard for info in checkpoint.reader.tensors.values()}
    if not all(name.endswith(_SUFFIX) for name in used):
        return []
    return sorted(path.name for path in checkpoint.reader.folder.glob(f"*{_SUFFIX}") if path.name not in used)


def _orphans(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Parts of a quantized layer without the tensor that makes it one."""
    form = checkpoint.format
    if form is None:
        return
    telling = [local for local in form.local_names if local not in (form.marker, "bias", "weight")]
    parts = defaultdict(list)
    for name in checkpoint.passthrough_names:
        module, _, local = name.rpartition(".")
        if local in telling:
            parts[module].append(local)
    for module, found in parts.items():
        yield error(module, f"has {', '.join(sorted(found))} but no {form.marker}")


def _missing_members(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Modules that one block lacks although its neighbours of the same kind have them.

    A block that has something the others lack is of another kind, not damaged: a dense one among expert blocks.
    """
    members: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in (*checkpoint.layer_names, *(name.rpartition(".")[0] for name in checkpoint.passthrough_names)):
        match = _BLOCK.fullmatch(name)
        if match is not None:
            parent, _, member = match["member"].rpartition(".")
            members[match["list"], parent][int(match["index"])].add(member)
    for (blocks, parent), by_index in members.items():
        kinds = Counter(map(frozenset, by_index.values()))
        usual = max(kinds, key=lambda kind: (kinds[kind], len(kind)))
        short = {index: usual - found for index, found in sorted(by_index.items()) if found < usual}
        lacking = Counter(member for absent in short.values() for member in absent)
        for index, absent in short.items():
            for member in sorted(absent):
                path = ".".join(part for part in (blocks, str(index), parent, member) if part)
                tell = error if lacking[member] == 1 else warning  # several blocks without it may be meant so
                yield tell(path, f"is missing; {len(by_index) - lacking[member]} other blocks have it")


def _missing_blocks(checkpoint: Checkpoint) -> Iterator[Finding]:
    stated = checkpoint.reader.config.get("num_hidden_layers")
    indices: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.reader.tensors:
        found = _BLOCK.fullmatch(name)
        if found is not None:
            indices[found["list"]].add(int(found["index"]))
    if not indices:
        return
    blocks, present = max(indices.items(), key=lambda item: len(item[1]))
    wanted = stated if isinstance(stated, int) else max(present) + 1
    absent = sorted(set(range(wanted)) - present)
    if absent and len(absent) < wanted:
        which = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
        yield error(blocks, f"has no tensors of block {which}; {wanted} blocks are expected")


def _shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    stray = stray_files(checkpoint)
    if stray:
        yield warning(
            ", ".join(stray[:4]) + (" ..." if len(stray) > 4 else ""),
            "is part of no checkpoint here; readers that take every *.safetensors file (mlx-lm, onnxruntime-genai) "
            "load it too: remove it",
        )
    by_file: dict[str, set[str]] = defaultdict(set)
    for name, info in checkpoint.reader.tensors.items():
        by_file[info.shard].add(name)
    for file, named in by_file.items():
        if not file.endswith(_SUFFIX):
            continue
        unnamed = sorted(set(read_header(checkpoint.reader.folder / file)) - named)
        if unnamed:
            yield warning(file, f"holds {len(unnamed)} tensors that the index does not name, e.g. {unnamed[0]}")
