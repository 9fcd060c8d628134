"""kernels/pack.py: the C++ against its meaning in NumPy, bit for bit, on any processor."""

import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import pack, plain
from lib import filters
from tests.recipes import ROOT, contents, run, write_small

any_values = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def both(monkeypatch):
    """Calls with the C++ and with NumPy; fails unless all bits of the two are equal."""
    compiled = plain.library()
    if compiled is None:
        pytest.skip("no C++ here: python kernels/build.py says why")

    def compare(call):
        results = []
        for library in (compiled, None):
            monkeypatch.setattr(pack, "library", lambda library=library: library)
            results.append(np.array(call()))
        assert results[0].dtype == results[1].dtype and results[0].tobytes() == results[1].tobytes()
        return results[0]

    return compare


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Of float32, at an address that is a multiple of 4 and of no more."""
    room = np.empty(math.prod(shape) + 16, np.float32)
    first = (-room.ctypes.data // 4) % 16 + 1
    x = room[first : first + math.prod(shape)].reshape(shape)
    x[...] = np.random.default_rng(seed).standard_normal(shape)
    return x


@pytest.mark.parametrize("sample_bytes", [2, 3])
def test_decode(both, sample_bytes):
    rng = np.random.default_rng(0)
    records, samples, record_bytes = 5, 37, 3 * 37 * sample_bytes + 7
    block = rng.integers(0, 256, 4 + records * record_bytes, np.uint8)
    offset_C, gain_C, bias_C = [4 + 2 * 37 * sample_bytes, 4 + 5], [0.1, -3.7], [1 / 3, 1e3]

    def call():
        x_CRN = np.full((2, records + 2, samples), np.nan, np.float32)
        pack.decode(block, record_bytes, sample_bytes, offset_C, gain_C, bias_C, x_CRN[:, 1:-1])
        return x_CRN

    x_CRN = both(call)
    assert np.isnan(x_CRN[:, [0, -1]]).all()
    for c, offset in enumerate(offset_C):
        for r in (0, records - 1):
            data = block[offset + r * record_bytes :][: samples * sample_bytes].tobytes()
            words = (data[i : i + sample_bytes] for i in range(0, len(data), sample_bytes))
            expected = [int.from_bytes(word, "little", signed=True) * gain_C[c] + bias_C[c] for word in words]
            np.testing.assert_allclose(x_CRN[c, r + 1], expected, rtol=1e-5, atol=1e-2)


@given(
    samples=st.integers(1, 3000), points=st.integers(1, 2500), place=st.floats(0, 1), taps=st.integers(1, 16), seed=...
)
@any_values
def test_halve(both, samples, points, place, taps, seed: int):
    points = 2 * max(points, (samples + 1) // 2)
    left, x_CT, taps_J = int(place * (points - samples)), noise(3, samples + 5)[:, 2:-3], noise(taps, seed=abs(seed))
    y_CN = both(lambda: pack.halve(x_CT, left, points, noise(3, seed=1), taps_J))
    e_CT = pack.extend(x_CT, left, points, noise(3, seed=1)).astype(np.float64)
    odd = np.arange(1, 2 * taps, 2)
    expected = e_CT / 2 + sum(
        w * (np.roll(e_CT, -k, 1) + np.roll(e_CT, k, 1)) for w, k in zip(taps_J, odd, strict=True)
    )
    np.testing.assert_allclose(y_CN, expected[:, ::2], rtol=1e-4, atol=1e-4)


@given(
    points=st.integers(1, 3000), period=st.integers(1, 3000), first=st.integers(0, 4000), outputs=st.integers(1, 9000)
)
@any_values
def test_interpolate(both, points, period, first, outputs):
    cubes_48 = noise(4, 8)
    y_CK = both(lambda: pack.interpolate(noise(2, points), period, first, outputs, cubes_48))
    k = outputs - 1
    at, rest = divmod((first + k) * points, period)
    taps_8 = np.polynomial.polynomial.polyval(rest / period - 0.5, cubes_48)
    expected = noise(2, points)[:, np.arange(at - 3, at + 5) % points] @ taps_8
    np.testing.assert_allclose(y_CK[:, k], expected, rtol=1e-3, atol=1e-3)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(1, 50),
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
@any_values
def test_order_statistics(both, values, times, places):
    """Of anything: outliers, infinities, ties, not a number (last, as NumPy has it)."""
    x_CT = np.array([values * times, (values * times)[::-1]], np.float32)
    ranks = sorted(int(p * (x_CT.shape[1] - 1)) for p in places)
    y_CR = both(lambda: pack.order_statistics(x_CT, ranks) + 0.0)  # of equal zeros any sign may come first
    np.testing.assert_array_equal(y_CR, np.sort(x_CT, axis=1)[:, ranks])


def test_order_statistics_of_a_long_channel(both):
    x_CT = noise(2, 61_441) * np.float32([[1], [1e-3]]) + 5
    x_CT[0, 77] = 1e9
    ranks = [0, 15_360, 15_361, 30_720, 46_080, 61_440]
    np.testing.assert_array_equal(both(lambda: pack.order_statistics(x_CT, ranks)), np.sort(x_CT, axis=1)[:, ranks])


@pytest.mark.parametrize("seen, unseen", [(np.inf, -np.inf), (-np.inf, np.inf), (3e38, -3e38), (np.nan, -np.inf)])
def test_order_statistics_of_extremes(both, seen, unseen):
    x_CT = noise(1, 1000)
    x_CT[0, :2] = seen, unseen  # the histogram's range is of every fourth value
    ranks = [0, 1, 500, 998, 999]
    np.testing.assert_array_equal(both(lambda: pack.order_statistics(x_CT, ranks)), np.sort(x_CT, axis=1)[:, ranks])


def test_pack_rounds_every_float16_as_numpy(both):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    between = (np.sort(every)[1:] + np.sort(every)[:-1]) / 2
    values = [every, between, np.nextafter(between, np.float32(np.inf)), np.nextafter(between, np.float32(-np.inf))]
    odd = np.array([65504, 65519, 65520, 1e9, np.inf, -np.inf, np.nan, 1e-45, -1e-45], np.float32)
    y_CK = np.concatenate([*values, odd])[None]
    z_KC = both(lambda: pack.pack(y_CK, np.zeros(1), np.ones(1)))
    expected = np.clip(y_CK.T, -pack.FLOAT16_MAX, pack.FLOAT16_MAX).astype(np.float16)
    np.testing.assert_array_equal(z_KC, expected)


@pytest.mark.parametrize("channels, outputs", [(1, 1), (21, 64), (129, 200), (3, 9000)])
def test_pack(both, channels, outputs):
    y_CK = noise(channels, outputs + 9)[:, 4:-5]
    offset_C, scale_C = noise(channels, seed=1), np.abs(noise(channels, seed=2)) + np.float32(0.1)
    z_KC = both(lambda: pack.pack(y_CK, offset_C, scale_C))
    assert z_KC.flags.c_contiguous
    np.testing.assert_allclose(z_KC.T, (y_CK - offset_C[:, None]) / scale_C[:, None], rtol=1e-3, atol=1e-6)


@given(st.binary(max_size=700), st.integers(0, 2**32 - 1))
@any_values
def test_crc32_is_zlibs(both, data, crc):
    assert both(lambda: pack.crc32(data, crc)) == zlib.crc32(data, crc)


def test_a_cache_does_not_show_who_made_it(tmp_path):
    (one,) = filters.Spectral(500, 100, (0.5, 45.0)).passes(36 * 500)
    assert filters.half_bands(one.points, one.new) and filters.grid_points(one.new) != one.new, "every loop is used"
    write_small(tmp_path / "raw", subjects=1, seconds=36, rate_hz=500)
    said = {}
    for kernels in ("0", "1"):
        words = ("--source", tmp_path / "raw", "--cache", tmp_path / kernels, "--workers", 1)
        code, _, said[kernels] = run(*words, env={"BERGER_KERNELS": kernels})
        assert code == 0
    assert "BERGER_KERNELS=0" in said["0"] and "BERGER_KERNELS=0" not in said["1"]
    shards = [{name: data for name, data in contents(tmp_path / k).items() if "shards" in name} for k in "01"]
    assert shards[0] == shards[1] and len(shards[0]) == 2


def test_processors_without_avx2():
    if plain.library() is None:
        pytest.skip("no C++ here: python kernels/build.py says why")
    words = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not made_it and not without_avx2"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"BERGER_KERNELS": "generic"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
