"""Let `import torchvision` succeed where PyPI's CUDA build of it sits beside a CPU build of torch.

Target:   torchvision's registration of `torchvision::nms` and `torchvision::qnms`.
Versions: torchvision 0.26 to 0.28; SGLang 0.5.17 and 0.5.23.
Reason:   SGLang imports torchvision at start (`sglang/srt/utils/common.py`). PyPI has only CUDA
          builds; without CUDA their `_C` extension cannot load, the two operators are never
          declared, and torchvision's Python side raises "operator torchvision::nms does not exist".
Goes:     when PyPI carries a CPU torchvision, or SGLang imports it lazily.

The import comes before any SGLang plugin can run, in every spawned process, so a `.pth` file arms a
finder when the interpreter starts. `python -m spherical_patches.torchvision_cpu` writes that file
into the running environment. The finder costs nothing until torchvision is imported, and leaves
every working pair of torch and torchvision alone.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this module is imported at every interpreter start: keep that cheap
    from collections.abc import Sequence
    from types import ModuleType

PTH_NAME = "sglang_spherical_cpu.pth"
# A broken line in a .pth file prints a traceback at every start: stay silent once uninstalled.
PTH_LINE = (
    "import importlib.util as u; u.find_spec('spherical_patches') and "
    "__import__('spherical_patches.torchvision_cpu').torchvision_cpu.arm()\n"
)
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[object] = []  # torch.library.Library undoes its definitions when collected


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        declare_schemas(Path(self.path).parent)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def arm() -> None:
    """Declare the schemas just before torchvision's first import in this process."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def declare_schemas(torchvision_dir: Path) -> bool:
    """Declare the operators that torchvision's own extension cannot; True if that was needed."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    for extension in torchvision_dir.glob("_C*.so"):
        try:  # a CPU build of torchvision loads, and declares them itself
            torch.ops.load_library(str(extension))
            return False
        except OSError:
            pass
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return True


def install() -> Path:
    """Write the `.pth` file into this environment's site-packages and return its path."""
    pth = Path(sysconfig.get_path("purelib")) / PTH_NAME
    pth.write_text(PTH_LINE)
    return pth


if __name__ == "__main__":
    print(f"wrote {install().name}")
