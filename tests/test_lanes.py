"""The vectors that the CPU kernels are made of, the compiling and caching of kernels, the sharing out of work."""

import errno
import importlib.util
import logging
import math
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from llvmlite import binding
from numba import njit
from numba.core import caching, config
from numba.core.errors import TypingError

from pkd_lightning.kernels import lanes, threads
from pkd_lightning.kernels.lanes import WIDTH

f32 = np.float32
GUARD = f32(-12345.0)  # marks memory that nobody may write


@njit(error_model="numpy")
def apply_exp2(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.exp2(lanes.load(x, i)))


@njit(error_model="numpy")
def apply_exp(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.exp(lanes.load(x, i)))


@njit(error_model="numpy")
def apply_softplus(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.softplus(lanes.load(x, i)))


@njit(error_model="numpy")
def apply_sigmoid(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.sigmoid(lanes.load(x, i)))


@njit(error_model="numpy")
def apply_exp2_falling(x, to):
    for i in range(0, x.size, WIDTH):
        x_i = lanes.load(x, i)
        a, b, c, d = lanes.exp2_falling(x_i, f32(0.5) * x_i, f32(0.25) * x_i, x_i)
        lanes.store(to, i, a)
        for half, value in ((lanes.load(x, i), d), (f32(0.5) * x_i, b), (f32(0.25) * x_i, c)):
            if lanes.total(lanes.absolute(value - lanes.exp2(half))) > f32(1e-5):
                lanes.store(to, i, value)  # the four are alike


@njit(error_model="numpy")
def apply_slope(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.softplus_and_slope(lanes.load(x, i))[1])


@njit(error_model="numpy")
def apply_wide_softplus(x, to):
    for i in range(0, x.size, lanes.WIDE):
        lanes.store(to, i, lanes.softplus_and_slope(lanes.load_wide(x, i))[0])


@njit(error_model="numpy")
def apply_root(x, to):
    for i in range(0, x.size, WIDTH):
        lanes.store(to, i, lanes.root(lanes.load(x, i)))


@njit
def apply_spread(x, index, to):
    lanes.store(to, 0, lanes.spread(x, index))


@njit(error_model="numpy")
def apply_operators(a, b, c, scalar, to):
    x, y, z = lanes.load(a, 0), lanes.load(b, 0), lanes.load(c, 0)
    results = (x + y, x - y, x * y, x / y, scalar - x, x / scalar, lanes.fma(x, y, z), lanes.fma(scalar, y, scalar))
    at = 0
    for value in results:
        lanes.store(to, at, value)
        at += WIDTH
    lanes.store(to, at, lanes.absolute(x))
    lanes.store(to, at + WIDTH, lanes.positive(x))
    to[at + 2 * WIDTH] = lanes.total(x)


@njit
def apply_transpose(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns):
    lanes.transpose(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns)


@njit
def apply_first(source, index, count, to, to_index, to_count):
    lanes.store_first(to, to_index, lanes.load_first(source, index, count), to_count)


@njit
def apply_total_of_each(source, index, stride, to):
    lanes.store(to, 0, lanes.total_of_each(source, index, stride))


@njit
def apply_floats(address, index, to):
    lanes.store(to, 0, lanes.load(lanes.floats(address), index))


def mapped(function, x):
    """`function` of every value of x, with the last vector padded."""
    padded = np.zeros(-(-x.size // WIDTH) * WIDTH, f32)
    padded[: x.size] = x
    to = np.full_like(padded, GUARD)
    function(padded, to)
    return to[: x.size]


# ---------------------------------------------------------------------------------- arithmetic


def test_exp2_over_its_whole_range():
    x = np.concatenate([np.linspace(-126, 127.4, 400_000), np.linspace(-2, 2, 100_000)]).astype(f32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(mapped(apply_exp2, x) / expected - 1).max() < 1.35e-7


def test_exp2_of_whole_numbers_and_beyond_its_range():
    whole = np.arange(-126, 128).astype(f32)
    assert np.array_equal(mapped(apply_exp2, whole), np.ldexp(f32(1), np.arange(-126, 128)))
    assert np.array_equal(mapped(apply_exp2, f32([-126.6, -127, -150, -1e30, -np.inf])), np.zeros(5, f32))
    assert np.array_equal(mapped(apply_exp2, f32([127.6, 128, 150, 1e30, np.inf])), np.full(5, np.inf, f32))
    assert np.array_equal(mapped(apply_exp2, f32([0.0, -0.0, 1e-40])), np.ones(3, f32))
    mixed = mapped(apply_exp2, f32([1, np.nan, -np.nan, 2]))
    assert mixed[[0, 3]].tolist() == [2, 4]
    assert np.isnan(mixed[[1, 2]]).all()


def test_exp():
    x = np.concatenate([np.linspace(-87, 88, 400_000), np.linspace(-2, 2, 100_000)]).astype(f32)
    assert np.abs(mapped(apply_exp, x) / np.exp(x.astype(np.float64)) - 1).max() < 1.6e-7
    edges = mapped(apply_exp, f32([-np.inf, -1e30, -88.1, 0, 88.73, 1e30, np.inf, np.nan]))
    assert edges[:7].tolist() == [0, 0, 0, 1, np.inf, np.inf, np.inf]
    assert np.isnan(edges[7])


def test_exp2_of_what_is_not_positive():
    x = np.concatenate([np.linspace(-126, 0, 400_000), np.linspace(-2, 0, 100_000)]).astype(f32)
    assert np.abs(mapped(apply_exp2_falling, x) / np.exp2(x.astype(np.float64)) - 1).max() < 1.35e-7
    whole = np.arange(-126, 1).astype(f32)
    assert np.array_equal(mapped(apply_exp2_falling, whole), np.ldexp(f32(1), np.arange(-126, 1)))
    assert np.array_equal(mapped(apply_exp2_falling, f32([-127, -150, -1e30, -np.inf])), np.zeros(4, f32))
    falling = mapped(apply_exp2_falling, np.linspace(-127, -125, 1000).astype(f32))
    assert falling.min() >= 0
    assert falling.max() <= 2.0**-125
    assert np.array_equal(np.isnan(mapped(apply_exp2_falling, f32([-1, np.nan, -np.nan]))), [False, True, True])


def test_softplus_with_its_slope():
    x = np.linspace(-87, 87, 200_000).astype(f32)
    slope = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(mapped(apply_slope, x) / slope - 1).max() < 3e-7
    padded = np.resize(x, -(-x.size // lanes.WIDE) * lanes.WIDE)
    assert np.array_equal(mapped(apply_wide_softplus, padded), mapped(apply_softplus, padded))
    edges = mapped(apply_slope, f32([-np.inf, -1e30, 0, 1e30, np.inf, np.nan]))
    assert np.array_equal(edges[:5], f32([0, 0, 0.5, 1, 1]))
    assert np.isnan(edges[5])


def test_roots_and_spread_numbers():
    x = f32([0, 1, 2, 4, 1e30, 1e-30, np.inf])
    assert np.array_equal(mapped(apply_root, x), np.sqrt(x))
    to = np.zeros(WIDTH, f32)
    apply_spread(x, 3, to)
    assert np.array_equal(to, np.full(WIDTH, 4, f32))


def test_softplus():
    x = np.concatenate([np.linspace(-87, 90, 200_000), np.linspace(-1, 1, 10_000), [0]]).astype(f32)
    expected = np.logaddexp(0, x.astype(np.float64))
    assert np.abs(mapped(apply_softplus, x) / expected - 1).max() < 2.6e-7
    edges = mapped(apply_softplus, f32([-np.inf, -1e30, 1e30, np.inf, np.nan]))
    assert edges[:4].tolist() == [0, 0, f32(1e30), np.inf]
    assert np.isnan(edges[4])


def test_sigmoid():
    x = np.linspace(-87, 90, 200_000).astype(f32)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(mapped(apply_sigmoid, x) / expected - 1).max() < 2e-7
    edges = mapped(apply_sigmoid, f32([-np.inf, -1e30, 0, 1e30, np.inf, np.nan]))
    assert edges[:5].tolist() == [0, 0, 0.5, 1, 1]
    assert np.isnan(edges[5])


def test_operators():
    generator = np.random.default_rng(0)
    a, b, c = generator.normal(size=(3, WIDTH)).astype(f32)
    a[3], scalar = np.nan, f32(1.7)
    to = np.full(11 * WIDTH, GUARD)
    apply_operators(a, b, c, scalar, to)
    wide = [x.astype(np.float64) for x in (a, b, c)]
    expected = [a + b, a - b, a * b, a / b, scalar - a, a / scalar]
    expected += [(wide[0] * wide[1] + wide[2]).astype(f32), (float(scalar) * wide[1] + float(scalar)).astype(f32)]
    expected += [np.abs(a), np.where(a > 0, a, f32(0))]
    np.testing.assert_array_equal(to[: 10 * WIDTH].reshape(10, WIDTH), expected)
    assert np.isnan(to[10 * WIDTH])
    apply_operators(b, b, c, scalar, to)
    assert abs(to[10 * WIDTH] - b.astype(np.float64).sum()) < 1e-5


# ---------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("count", range(-1, WIDTH + 2))
def test_only_the_first_lanes_are_read_and_written(count):
    source = np.arange(1, 3 * WIDTH + 1, dtype=f32)
    inside = np.arange(WIDTH) < count
    to = np.full(3 * WIDTH, GUARD)
    apply_first(source, 5, count, to, 7, WIDTH)  # reads some, writes all
    assert np.array_equal(to[7 : 7 + WIDTH], np.where(inside, source[5 : 5 + WIDTH], f32(0)))
    to = np.full(3 * WIDTH, GUARD)
    apply_first(source, 5, WIDTH, to, 7, count)  # reads all, writes some
    assert np.array_equal(to[7 : 7 + WIDTH], np.where(inside, source[5 : 5 + WIDTH], GUARD))
    assert (to[:7] == GUARD).all()
    assert (to[7 + WIDTH :] == GUARD).all()


SIZES = [(16, 16, 16, 16), (20, 17, 16, 30), (16, 16, 16, 5), (5, 16, 16, 16), (16, 3, 3, 16), (1, 1, 1, 1)]
SIZES += [
    (7, 11, 11, 7),
    (7, 11, 16, 16),
    (16, 16, 4, 9),
    (0, 16, 16, 16),
    (16, 0, 16, 16),
    (16, 16, 0, 3),
    (3, -5, 4, 4),
]


@pytest.mark.parametrize(("rows", "columns", "to_rows", "to_columns"), SIZES)
@pytest.mark.parametrize(("stride", "to_stride"), [(16, 16), (37, 21)])
def test_transpose_of_a_part_touches_nothing_else(rows, columns, to_rows, to_columns, stride, to_stride):
    source = np.random.default_rng(0).normal(size=7 + 20 * stride).astype(f32)
    to = np.full(5 + 20 * to_stride, GUARD)
    tile = np.zeros((WIDTH, WIDTH), f32)
    expected = to.copy()
    for r in range(min(rows, WIDTH)):
        for c in range(min(columns, WIDTH)):
            tile[c, r] = source[7 + r * stride + c]
    for r in range(min(to_rows, WIDTH)):
        expected[5 + r * to_stride :][: min(to_columns, WIDTH)] = tile[r][: min(to_columns, WIDTH)]
    apply_transpose(source, 7, stride, rows, columns, to, 5, to_stride, to_rows, to_columns)
    assert np.array_equal(to, expected)


def test_what_a_transpose_does_not_read_may_be_unmapped():
    mmap = pytest.importorskip("mmap")
    page = mmap.PAGESIZE
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        pytest.skip("needs anonymous memory")
    # the file has one page of the two that are mapped: a load from the second ends the process
    code = f"""
        import mmap, os, tempfile
        import numpy as np
        from tests.test_lanes import apply_first, apply_transpose
        with tempfile.TemporaryFile() as file:
            file.truncate({2 * page})
            memory = mmap.mmap(file.fileno(), {2 * page})
            os.ftruncate(file.fileno(), {page})
            source = np.frombuffer(memory, np.float32)
            last = {page // 4} - 5
            source[last:last + 5] = range(1, 6)
            to = np.zeros(256, np.float32)
            apply_transpose(source, last, 16, 1, 5, to, 0, 16, 16, 16)
            assert to[::16].tolist() == [1, 2, 3, 4, 5] + [0] * 11
            apply_first(source, last, 5, source, last, 5)
            assert source[last:last + 5].tolist() == [1, 2, 3, 4, 5]
    """
    assert process(code).returncode == 0


@pytest.mark.parametrize("stride", [16, 37])
def test_total_of_each(stride):
    source = np.random.default_rng(0).normal(size=3 + 17 * stride).astype(f32)
    to = np.full(2 * WIDTH, GUARD)
    apply_total_of_each(source, 3, stride, to)
    expected = [source[3 + r * stride :][:WIDTH].astype(np.float64).sum() for r in range(WIDTH)]
    np.testing.assert_allclose(to[:WIDTH], expected, atol=2e-6)
    assert (to[WIDTH:] == GUARD).all()


def test_memory_by_its_address():
    x = torch.arange(100.0)
    to = np.zeros(WIDTH, f32)
    apply_floats(x[10:].data_ptr(), 7, to)
    assert to.tolist() == list(range(17, 17 + WIDTH))


# ---------------------------------------------------------------------------------- compiling

TINY = """
    from numba import types
    from pkd_lightning.kernels.lanes import kernel

    @kernel(types.float32[::1])
    def double(x):
        x[0] *= 2

    @kernel(types.float32[::1])
    def triple(x):
        x[0] *= 3
"""


@pytest.fixture
def load(tmp_path, caplog, monkeypatch):
    """Import a module of two small kernels anew, check them, and return what was logged and how many were compiled."""
    path = tmp_path / "tiny.py"
    path.write_text(textwrap.dedent(TINY))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(lanes, "NOTICE_AFTER", 0.01)
    lanes._warn_uncached.cache_clear()
    lanes._say_compiling.cache_clear()

    def load():
        caplog.clear()
        with caplog.at_level(logging.INFO, lanes.log.name):
            spec = importlib.util.spec_from_file_location("tiny", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        x = np.ones(1, f32)
        module.double(x)
        module.triple(x)
        assert x[0] == 6
        messages = [(record.levelname, record.getMessage()) for record in caplog.records]
        return messages, sum(not kernel.stats.cache_hits for kernel in (module.double, module.triple))

    yield load
    lanes._warn_uncached.cache_clear()
    lanes._say_compiling.cache_clear()


def test_compiling_is_announced_once_and_loading_is_not(load, tmp_path):
    messages, compiled = load()
    assert compiled == 2
    assert [level for level, text in messages if "compiling the CPU kernels" in text] == ["INFO"]
    assert any((tmp_path / "cache").rglob("*.nbc"))
    lanes._say_compiling.cache_clear()
    lanes.NOTICE_AFTER = 1.0
    assert load() == ([], 0)


def test_a_change_of_any_source_of_the_scan_compiles_anew(load, monkeypatch):
    assert load()[1] == 2
    original = lanes._SOURCES
    monkeypatch.setattr(lanes, "_SOURCES", "another")
    assert load()[1] == 2
    monkeypatch.setattr(lanes, "_SOURCES", original)
    assert load()[1] == 0


def test_the_sources_are_those_of_all_kernels(tmp_path, monkeypatch):
    folder = Path(lanes.__file__).parent
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert {"lanes.py", "threads.py", "residuals.py", "scan/states.py", "scan/cpu.py", "scan/block.py"} <= names

    def stamp(changed=None):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text((folder / name).read_text() + ("\n" if name == changed else ""))
        with open(tmp_path / "lanes.py") as file:  # the statement alone: types are registered with numba only once
            text = file.read()
        begin = text.index("_SOURCES = hashlib")
        statement = text[begin : text.index("hexdigest()", begin) + len("hexdigest()")]
        namespace = {"__file__": str(tmp_path / "lanes.py"), "hashlib": lanes.hashlib, "Path": lanes.Path}
        exec(statement, namespace)
        return namespace["_SOURCES"]

    assert stamp() == lanes._SOURCES
    assert len({stamp(name) for name in (None, *names)}) == len(names) + 1


def block_path(path):
    """Make a directory at `path` impossible, for root as well: permissions do not hold root back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def refuse_temporary_files(**options):
    raise PermissionError(errno.EACCES, "read-only")


@pytest.mark.parametrize("fault", ["missing", "a file", "read-only"])
def test_a_cache_directory_that_cannot_be_used(fault, load, tmp_path, monkeypatch):
    directory = tmp_path / "below" / "cache"
    monkeypatch.setattr(config, "CACHE_DIR", str(directory))
    if fault == "missing":  # is made
        assert [load()[1], load()[1]] == [2, 0]
        return
    # then the kernels are cached where they are without the setting
    if fault == "a file":
        block_path(directory)
        assert [load()[1], load()[1]] == [2, 0]
        assert any((tmp_path / "__pycache__").glob("*.nbc"))
    else:  # a read-only disk
        monkeypatch.setattr(caching.tempfile, "TemporaryFile", refuse_temporary_files)
        assert_compiled_without_a_cache(load)


def assert_compiled_without_a_cache(load):
    messages, compiled = load()
    assert compiled == 2
    warnings = [text for level, text in messages if level == "WARNING"]
    assert len(warnings) == 1
    assert "numba has no cache it can use" in warnings[0]
    assert not any(level == "WARNING" for level, _ in load()[0])  # said once


def test_without_any_place_for_a_cache(load, tmp_path, monkeypatch):
    for name in ("cache", "__pycache__", "home"):
        block_path(tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert_compiled_without_a_cache(load)


def test_a_disk_that_fills_up(load, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)
    assert_compiled_without_a_cache(load)


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "empty": lambda content: b"",  # where the machine went down while it was written
    "cut off": lambda content: content[: len(content) // 2],
    "other bytes": lambda content: b"x" * len(content),
    "one bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_is_dropped_and_written_anew(load, tmp_path, suffix, damage):
    load()
    damaged = list((tmp_path / "cache").rglob(f"*.{suffix}"))
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    messages, compiled = load()
    if suffix == "nbc" or damage != "one bit":  # a bit of an index may lie where it changes nothing
        assert compiled == 2
        assert sum("damaged" in text for level, text in messages if level == "WARNING") == 2
    assert load() == ([], 0)  # and is paid for once


def test_a_cache_that_is_damaged_where_it_cannot_be_written(load, tmp_path, monkeypatch):
    load()
    for path in (tmp_path / "cache").rglob("*.nbc"):
        path.write_bytes(b"")

    def refuse(*_):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", refuse)
    messages, compiled = load()
    assert compiled == 2
    assert any("numba has no cache it can use" in text for _, text in messages)


def test_a_kernel_without_a_source_file_compiles(caplog):
    from numba import types

    lanes._warn_uncached.cache_clear()
    namespace = {}
    exec("def double(x):\n    x[0] *= 2", namespace)
    with caplog.at_level(logging.WARNING):
        double = lanes.kernel(types.float32[::1])(namespace["double"])
    x = np.ones(1, f32)
    double(x)
    assert x[0] == 2
    assert "numba has no cache it can use" in caplog.text
    lanes._warn_uncached.cache_clear()


def test_a_mistake_in_a_kernel_is_raised():
    from numba import types

    with pytest.raises(TypingError):

        @lanes.kernel(types.float32[::1])
        def wrong(x):
            x[0] = lanes.load(x, 0)


# ---------------------------------------------------------------------------------- processes


def process(code, **environment):
    """A Python process in the repository's root, with some variables of the environment changed."""
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": root} | environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_without_a_compiler_the_kernels_run_and_come_from_the_cache():
    import pkd_lightning.kernels.scan.block
    import pkd_lightning.kernels.scan.cpu  # noqa: F401  # which compiles where nothing has been cached

    result = process(
        """
        import shutil
        assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang")))
        from pkd_lightning.kernels import lanes
        compiled, njit = [], lanes.njit
        def watched(*types, **options):
            def compile_(function):
                compiled.append(njit(*types, **options)(function))
                return compiled[-1]
            return compile_
        lanes.njit = watched
        from tests.test_block import make_block, make_tokens, results
        from tests.test_scan import check_cpu, make_inputs
        check_cpu(make_inputs(3, 4, 20, 5))
        results(make_block(2), make_tokens(3, 20, 2))
        assert len(compiled) >= 4
        assert not any(kernel.stats.cache_misses for kernel in compiled)
        """,
        PATH="",
    )
    assert result.returncode == 0, result.stderr
    assert "cache" not in result.stdout + result.stderr


AVX2 = "+64bit,+cmov,+cx16,+fxsr,+mmx,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="registers of x86")
@pytest.mark.parametrize("module", ["cpu", pytest.param("block", marks=pytest.mark.slow)])
def test_processors_without_avx512(module, tmp_path):
    if not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("needs AVX2")
    result = process(
        f"""
        import importlib, logging, sys
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        module = importlib.import_module("pkd_lightning.kernels.scan.{module}")
        for compiled in (module._forward, module._backward):
            for code in compiled.inspect_asm().values():
                assert "zmm" not in code
                assert "ymm" in code and "vfmadd" in code
        if "{module}" == "cpu":
            from tests import test_scan
            for shape in ((2, 3, 40, 17), (17, 2, 33, 9), (3, 20, 20, 70)):
                test_scan.check_cpu(test_scan.make_inputs(*shape))
        else:
            from tests import test_block
            for shape in ((2, 40, 3), (17, 20, 1)):
                mixer, tokens = test_block.make_block(shape[-1], 17), test_block.make_tokens(*shape)
                test_block.assert_agrees(test_block.results(mixer, tokens), *test_block.in_float64(mixer, tokens))
        """,
        NUMBA_CPU_NAME="haswell",
        NUMBA_CPU_FEATURES=AVX2,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("compiling the CPU kernels") == 1


# ---------------------------------------------------------------------------------- sharing out


@pytest.mark.parametrize(("units", "count"), [(1, 1), (5, 1), (5, 2), (7, 3), (3, 3), (16, 5)])
def test_every_unit_is_given_to_one_thread(units, count):
    given = []
    threads.share(lambda *call: given.append(call), units, count)
    assert sorted(thread for thread, _, _ in given) == list(range(count))
    assert sorted(unit for _, first, last in given for unit in range(first, last)) == list(range(units))
    assert max(last - first for _, first, last in given) - min(last - first for _, first, last in given) <= 1


def test_small_work_and_single_units_stay_in_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert threads.threads_for(8, threads.WORTHWHILE) == 4
        assert threads.threads_for(8, threads.WORTHWHILE - 1) == 1
        assert threads.threads_for(3, 10 * threads.WORTHWHILE) == 3
        assert threads.threads_for(1, 10 * threads.WORTHWHILE) == 1
    finally:
        torch.set_num_threads(before)


def test_the_pool_grows_and_shares_run_at_once():
    for count in (2, 3, 2, 6, 4):
        barrier = threading.Barrier(count, timeout=30)
        threads.share(lambda *_, barrier=barrier: barrier.wait(), count, count)  # or BrokenBarrierError


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_share_is_raised_when_all_others_have_ended(failing):
    """The memory that the others write to is freed when the error leaves the scan."""
    ended = []

    def call(thread, first, last):
        if thread == failing:
            raise MemoryError("workspace")
        time.sleep(0.05)
        ended.append(thread)

    with pytest.raises(MemoryError, match="workspace"):
        threads.share(call, 3, 3)
    assert sorted(ended) == [thread for thread in range(3) if thread != failing]
    threads.share(lambda *_: None, 3, 3)  # and the pool still works


def test_pools_that_were_outgrown_end():
    for count in (2, 9, 10, 11, 12):
        threads.share(lambda *_: math.sqrt(2), count, count)
    deadline = time.monotonic() + 20
    while True:
        alive = sum(thread.name.startswith("pkd-scan") for thread in threading.enumerate())
        if alive <= threads._size:
            return
        assert time.monotonic() < deadline, f"{alive} threads for a pool of {threads._size}"
        time.sleep(0.01)
