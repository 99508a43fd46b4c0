"""Other tools' checkpoints in every format: exact, or off by what was reported, or refused with a way out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqat_export.convert import Conversion, convert
from eqat_export.runtimes import get_runtime
from formats import Exactness, QuantizedLinear, available_formats, dequantize, get_format
from formats.errors import EqatError, MissingExtraError
from formats.model import Checkpoint, open_checkpoint
from tests.other_tools import SOURCES, Source, Workshop

TARGETS = list(available_formats())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, dense_models: Callable[[str], Path]) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("theirs"), dense_models)


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys(), scope="module")
def source(request: pytest.FixtureRequest) -> Source:
    if request.param.missing:
        pytest.skip(f"{', '.join(request.param.missing)} not installed, which makes this checkpoint")
    return request.param


@pytest.fixture
def theirs(source: Source, workshop: Workshop) -> Path:
    return workshop.make(source)


@dataclass
class Attempt:
    """What became of one conversion: ``done`` or ``error``, and the folder in which nothing but ``out`` may be."""

    out: Path
    done: Conversion | None = None
    error: EqatError | None = None


@pytest.fixture(scope="session")
def attempts(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Source, str], Attempt]:
    """Every conversion, made once."""
    made: dict[tuple[str, str], Attempt] = {}

    def attempt(source: Source, target: str) -> Attempt:
        if (source.name, target) not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            try:
                made[source.name, target] = Attempt(out, convert(workshop.make(source), out, target))
            except EqatError as error:
                made[source.name, target] = Attempt(out, error=error)
        return made[source.name, target]

    return attempt


def test_their_own_reader_has_the_weights_that_we_read(source: Source, theirs: Path) -> None:
    runtime = get_runtime(source.runtime)
    with open_checkpoint(theirs) as checkpoint:
        assert checkpoint.format is not None
        try:
            runtime.check(checkpoint.format.id)
        except MissingExtraError as error:
            pytest.skip(str(error))
        session = runtime.load(checkpoint, torch.device("cpu"))
        for name in checkpoint.layer_names:
            forward = session.layer(name)
            if forward is None or not get_format("dense").holds_module(name):  # an embedding is no linear
                continue
            _, columns = checkpoint.layer_features(name)
            bias = forward(torch.zeros(1, columns, dtype=session.dtype))
            found = forward(torch.eye(columns, dtype=session.dtype))
            layer = checkpoint.layer(name)
            assert (layer.bias is None and not bias.any()) or torch.equal(bias[0], layer.bias.to(session.dtype)), name
            exact = checkpoint.stored_weight(name, layer).to(session.dtype).T + bias
            assert torch.equal(found, exact), name


@pytest.mark.parametrize("target", TARGETS)
def test_any_to_any(
    source: Source, theirs: Path, attempts: Callable[[Source, str], Attempt], target: str, eqat: Callable
) -> None:
    found = attempts(source, target)
    if found.done is None:
        assert list(found.out.parent.iterdir()) == [], found.error
        named = formats_named(str(found.error))
        assert named, f"no way out: {found.error}"
        for form in named:  # how well these hold it is another of these tests
            assert attempts(source, form).done is not None, f"{found.error}, but: {attempts(source, form).error}"
        return
    assert list(found.out.parent.iterdir()) == [found.out]
    with open_checkpoint(theirs) as truth, open_checkpoint(found.out) as checkpoint:
        same_layers(truth, checkpoint, found.done)
        same_tensors(truth, checkpoint, found.done)
    outcome = eqat("verify", found.out, "--against", theirs)
    assert outcome.code == 0, outcome.out + outcome.err


def formats_named(text: str) -> set[str]:
    """Every format that a refusal says to use, or says that it holds the checkpoint."""
    listed = re.search(r"formats that hold every layer: ([^)]*)\)", text)
    return {*re.findall(r"--to ([\w-]+)", text), *(listed.group(1).split(", ") if listed else [])}


def same_layers(truth: Checkpoint, found: Checkpoint, done: Conversion) -> None:
    assert sum(done.exactness.values()) == done.layers == len(truth.layer_names) > 0
    errors, inexact, read = [0.0], 0, 0.0
    kinds: Counter[Exactness] = Counter()
    for name in truth.layer_names:
        layer = truth.layer(name)
        exact = dequantize(layer)
        read = max(read, float((truth.stored_weight(name, layer) - exact).abs().max()))
        error, same = difference(found, name, layer, exact)
        errors.append(error)
        inexact += error > 0
        kinds[Exactness.EXACT if same else Exactness.EXACT_WEIGHTS if not error else Exactness.ROUNDED] += 1
    # what is called exact is exact, at least in as many layers; what is called rounded is off by what was measured
    assert kinds[Exactness.EXACT] >= done.exactness[Exactness.EXACT]
    assert kinds[Exactness.ROUNDED] <= done.exactness[Exactness.ROUNDED] == done.rounded.tensors
    assert max(errors) == pytest.approx(done.rounded.error, rel=1e-3, abs=0)
    assert done.rounded.error <= done.rounded.bound
    assert read == pytest.approx(done.read.error, rel=1e-3, abs=0)


def difference(found: Checkpoint, name: str, truth: QuantizedLinear, exact: Tensor) -> tuple[float, bool]:
    """Largest difference of a layer's weights, and whether codes, zeros and scales are the same, too."""
    if name not in found.layer_names:
        return float((found.get(f"{name}.weight").float() - exact).abs().max()), False
    layer = found.layer(name)
    pairs = [(layer.codes, truth.codes), (layer.zeros, truth.zeros), (layer.scales, truth.scales)]
    same = all(ours.shape == theirs.shape and torch.equal(ours.to(theirs.dtype), theirs) for ours, theirs in pairs)
    return float((found.stored_weight(name, layer) - exact).abs().max()), same


def same_tensors(truth: Checkpoint, found: Checkpoint, done: Conversion) -> None:
    """Biases and everything beside the layers; what a cast changed is counted."""
    ordinary = {
        f"{name}.{local}"
        for name in set(truth.layer_names) - set(found.layer_names)
        for local in ("weight", *(["bias"] if truth.layer(name).bias is not None else []))
    }
    assert set(found.passthrough_names) - ordinary == set(truth.passthrough_names)
    pairs = {name: (found.get(name), truth.get(name)) for name in truth.passthrough_names}
    for name in truth.layer_names:
        ours, theirs = bias(found, name), truth.layer(name).bias
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            pairs[f"{name}.bias"] = (ours, theirs)
    cast = 0
    for name, (ours, theirs) in pairs.items():
        assert torch.equal(ours, theirs.to(ours.dtype)), name
        cast += not torch.equal(ours.to(theirs.dtype), theirs)
    assert cast == done.casts.tensors
    assert (done.casts.error > 0) is (cast > 0)


def bias(checkpoint: Checkpoint, name: str) -> Tensor | None:
    if name in checkpoint.layer_names:
        return checkpoint.layer(name).bias
    return checkpoint.get(f"{name}.bias") if f"{name}.bias" in checkpoint.reader.tensors else None
