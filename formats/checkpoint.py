"""Checkpoint folders: sharded safetensors with their JSON files, read lazily and written atomically."""

from .checkpoint_reader import CheckpointReader
from .checkpoint_writer import CheckpointWriter
from .safetensors_header import TensorInfo

__all__ = ["CheckpointReader", "CheckpointWriter", "TensorInfo"]
