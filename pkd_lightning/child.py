"""Another process of a run that `trainer.devices` gives several: `python -m pkd_lightning.child CONFIG`."""

import os
import sys
import threading
import time

from omegaconf import DictConfig, OmegaConf

from pkd_lightning.errors import PKDError
from pkd_lightning.processes import leave_signals_to_the_first
from pkd_lightning.run import run


def main() -> None:
    """Work on the run of a configuration; what it says is read where it fails."""
    leave_signals_to_the_first()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    config = OmegaConf.load(sys.argv[1])
    assert isinstance(config, DictConfig)
    try:
        run(config)
    except (PKDError, RuntimeError) as error:  # the first process has the same error, or is gone
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def end_with(parent: int) -> None:
    """End this process once its parent has ended, at whatever it is: the next message may be far, or never come."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
