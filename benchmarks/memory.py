"""Peak memory of a call."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines about each of its starts


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that `call` has allocated at any time, what it returns included, on the CPU.

    From the allocations that torch's profiler records.
    """
    call()  # what is allocated once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    del result
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def bytes_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)
