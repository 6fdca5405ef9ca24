"""Lets torchvision's wheel import beside the CPU build of torch."""

import importlib.util
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # a Library's definitions live as long as the object


def define_missing_operators() -> None:
    """Define the schemas `torchvision::nms` and `torchvision::qnms` where torchvision's extension cannot load.

    torchvision's wheel is linked against the CUDA build of torch. Beside a CPU build its extension fails to load, and
    its import then fails while it registers fake kernels for two operators nobody defined. torchmetrics, and through it
    lightning, import torchvision, so this must run before either. Where the extension loads, nothing is changed.
    """
    spec = importlib.util.find_spec("torchvision")
    if _libraries or spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
