"""Names a model option can take."""

from typing import Literal

Tokeniser = Literal["pixels", "patches", "convolutions"]
PixelChannels = Literal["one", "all"]
Norm = Literal["none", "rms", "layer"]
Direction = Literal["forward", "alternating", "cross"]
Head = Literal["flatten", "mean", "grid"]
Reuse = Literal["none", "concat", "gate"]
