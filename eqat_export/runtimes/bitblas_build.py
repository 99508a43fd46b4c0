"""What bitblas 0.1.0.post1 needs from its surroundings to import and to build its kernels.

Its libtvm.so links CUDA 12's runtime and compiler libraries, which a torch for CUDA 13 does not bring. And it cannot
build its dequantizing kernels for Hopper: for ``sm_90`` its lowering fails, and the templates it includes there do not
compile. The workaround generates the kernels as ``sm_80``'s, which Hopper runs, and compiles them against a copy of the
templates in which ``warpgroup_wait``, called from another namespace, is qualified. The installed package stays as it
is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import InputError

__all__ = ["HOPPER_TARGET", "hopper_templates", "load_libraries", "patched_templates"]

HOPPER_TARGET = "cuda -arch=sm_80"
LIBRARIES = {
    "libcuda.so.1": "",  # the driver's own
    "libcudart.so.12": "nvidia-cuda-runtime-cu12",
    "libnvrtc.so.12": "nvidia-cuda-nvrtc-cu12",
}
_HEADER = Path("tl_templates", "cuda", "gemm_sm90.h")
_UNQUALIFIED, _QUALIFIED = "  warpgroup_wait<num_mma>();", "  cute::warpgroup_wait<num_mma>();"


def load_libraries() -> None:
    """Loads the libraries of NVIDIA's that libtvm.so links, from the loader's path or from NVIDIA's packages.

    Raises:
        InputError: one is nowhere to be found.
    """
    for name, package in LIBRARIES.items():
        for place in (name, *_packaged(name)):
            try:
                ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
                break
            except OSError:
                continue
        else:
            fix = f"pip install {package}" if package else "install NVIDIA's driver"
            raise InputError(f"bitblas links {name}, which is not installed: {fix}")


@contextmanager
def hopper_templates(package: Path) -> Iterator[None]:
    """While the block runs, kernels are compiled against patched copies of bitblas' templates.

    Args:
        package: bitblas' folder.
    """
    names = ("TL_TEMPLATE_PATH", "NVCC_PREPEND_FLAGS", "LIBRARY_PATH")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="eqat-bitblas-") as scratch:
        templates = patched_templates(package, Path(scratch))
        # bitblas passes its own folder to nvcc whatever TL_TEMPLATE_PATH says; the first folder with the header counts
        os.environ["TL_TEMPLATE_PATH"] = str(templates)
        os.environ["NVCC_PREPEND_FLAGS"] = " ".join(filter(None, [f"-I{templates}", before["NVCC_PREPEND_FLAGS"]]))
        driver = _loaded("libcuda.so")
        if driver is not None:  # nvcc is called with -lcuda, and drivers come without the name it looks for
            (Path(scratch) / "libcuda.so").symlink_to(driver)
            os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [before["LIBRARY_PATH"], scratch]))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def patched_templates(package: Path, scratch: Path) -> Path:
    """A copy of the templates below ``scratch`` that compiles for Hopper.

    Raises:
        InputError: the header is not the one of 0.1.0.post1.
    """
    templates = scratch / "src"
    shutil.copytree(package / "3rdparty" / "tilelang" / "src", templates)
    header = templates / _HEADER
    text = header.read_text()
    if text.count(_UNQUALIFIED) != 1:
        raise InputError(f"{package}: {_HEADER} is not that of bitblas 0.1.0.post1, the version this workaround is for")
    header.chmod(0o644)
    header.write_text(text.replace(_UNQUALIFIED, _QUALIFIED))
    return templates


def _packaged(name: str) -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [str(path) for place in places or () for path in sorted(Path(place).glob(f"*/lib/{name}"))]


def _loaded(name: str) -> Path | None:
    """The file from which this process has mapped a library."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name):
            return path
    return None
