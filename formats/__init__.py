"""What a quantized layer is, and its bytes in every layout.

Importing this package loads torch and nothing heavier; formats load when asked for through ``get_format``.
"""

from .affine import dequantize, quantize, round_to_nearest
from .base import Exactness, Format
from .errors import EqatError
from .packing import pack_bits, unpack_bits
from .registry import available_formats, get_format, get_format_class
from .types import QuantizedLinear, QuantScheme

__all__ = [
    "EqatError",
    "Exactness",
    "Format",
    "QuantScheme",
    "QuantizedLinear",
    "available_formats",
    "dequantize",
    "get_format",
    "get_format_class",
    "pack_bits",
    "quantize",
    "round_to_nearest",
    "unpack_bits",
]
