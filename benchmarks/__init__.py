"""What `make bench` and `make bench-gpu` run: timings, never part of the tests."""

import pkd_lightning  # noqa: F401  # before torch, as in a run: it sets how torch's threads wait for one another
