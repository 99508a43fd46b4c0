"""The layout of single layers together with the folder that holds a whole model."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint_reader import read_json
from ..container import ModelReader, ModelWriter, SourceModel
from .graph import GRAPH_NAME
from .layout import OnnxLayout
from .reader import OnnxReader
from .writer import OnnxWriter

__all__ = ["OnnxFormat"]


class OnnxFormat(OnnxLayout):
    """MatMulNBits layers in an ONNX graph of the whole model; options are those of the layout."""

    def reads(self, path: Path) -> bool:
        """A folder with a graph, and a configuration that calls it ours."""
        if not (path / GRAPH_NAME).is_file() or not (path / "config.json").is_file():
            return False
        config = read_json(path / "config.json").get("quantization_config")
        return isinstance(config, dict) and self.detect(config, ())

    def open(self, path: Path) -> ModelReader:
        """The tensors behind the graph."""
        return OnnxReader(path)

    def create(self, out: Path, source: SourceModel, *, shard_size: int, force: bool) -> ModelWriter:
        """A folder with graph, external data, configuration and tokenizer."""
        return OnnxWriter(self, out, source, shard_size=shard_size, force=force)
