"""The one bit packer: every shift of packed integers in eqat is here.

``values`` packs and unpacks; ``words`` goes from one packed layout to another.
"""

from .values import pack_bits, packed_length, unpack_bits
from .words import add_to_fields_, permute_blocks_, permute_fields, restream, widen_fields

__all__ = [
    "add_to_fields_",
    "pack_bits",
    "packed_length",
    "permute_blocks_",
    "permute_fields",
    "restream",
    "unpack_bits",
    "widen_fields",
]
