"""Packed rows: every bit comes back, in C and in numpy the same, and bytes that are no records are refused."""

import importlib
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from specx.storage.codecs import pfor
from specx.storage.codecs import pfor_numpy as pfor_plain
from specx.storage.codecs.quantization import Bits, Bytes, to_bits

BITS = st.one_of(st.integers(0, 0xFFFF), st.integers(0x3C00, 0x4100), st.just(0))
ROWS = arrays.arrays(np.uint16, st.tuples(st.integers(0, 6), st.integers(1, 40)), elements=BITS)


@pytest.fixture(scope="module", params=["specx.storage.codecs._pfor", "specx.storage.codecs.pfor_numpy"])
def implementation(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return importlib.import_module(request.param)
    except ImportError:
        pytest.skip("built without a C compiler")


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return pytest.importorskip("specx.storage.codecs._pfor", reason="built without a C compiler")


def normal(rows: int, channels: int, seed: int = 0) -> Bits:
    return to_bits(np.random.default_rng(seed).standard_normal((rows, channels)).astype(np.float32))


def packed(implementation: ModuleType, rows: Bits) -> Bytes:
    room = np.zeros(pfor.most_bytes(rows.shape), np.uint8)
    return room[: implementation.pack(rows, room)]


def unpacked(implementation: ModuleType, stored: Bytes, shape: tuple[int, int], skipped: int = 0) -> Bits:
    out = np.full(shape, 7, np.uint16)
    implementation.unpack(stored, skipped, out)
    return out


def outcome(implementation: ModuleType, stored: Bytes, shape: tuple[int, int]) -> bytes | None:
    """Return the bits, or None where the bytes are refused."""
    try:
        return unpacked(implementation, stored, shape).tobytes()
    except ValueError:
        return None


def test_a_row_is_the_bytes_that_the_format_says(implementation: ModuleType) -> None:
    # Exponents 127, 128, 127, 126, 125, 124, 130, 120 and eight times 127: from 123 on, 120 is an exception.
    row = np.array([[1.0, -2.5, 1.5, 0.5, 0.25, 0.125, 8.0, 2.0**-7, *[1.0] * 8]], np.float32)
    low = [0x00, 0xA0, 0x40, *[0] * 13]
    # Codes in eighths of two: 4 5, 4 3, 2 1, 7 0, and four times 4 4.
    runs = [4 | 4 << 3, 5 | 3 << 3, 2 | 7 << 3 | 0b11 << 6, 1 | 0 << 3 | 0b11 << 6, 4 | 4 << 3, 4 | 4 << 3]
    stored = packed(implementation, to_bits(row))
    assert stored.tolist() == [1, 123, 1, 0, *low, *runs, 7, 120]
    assert np.array_equal(unpacked(implementation, stored, row.shape), to_bits(row))


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_both_make_the_same_bytes_and_every_bit_comes_back(rows: Bits) -> None:
    native = pytest.importorskip("specx.storage.codecs._pfor")
    stored = packed(native, rows)
    assert stored.tolist() == packed(pfor_plain, rows).tolist()
    for implementation in (native, pfor_plain):
        assert np.array_equal(unpacked(implementation, stored, rows.shape), rows)


@pytest.mark.parametrize("channels", [1, 7, 8, 128, 2880, 2885, 70_001])
def test_rows_of_any_width_come_back(implementation: ModuleType, channels: int) -> None:
    rows = normal(5, channels)
    rows[1] = np.random.default_rng(1).integers(0, 1 << 16, channels)
    rows[2] = 0
    # One far from any other exception, and one in the last place.
    rows[3] = 0x3F80
    rows[3, channels * 2 // 3] = 0x0001
    rows[3, -1] = 0x7F80
    assert np.array_equal(unpacked(implementation, packed(implementation, rows), rows.shape), rows)


def test_what_a_model_makes_takes_7_tenths_and_noise_hardly_more_than_it_has(implementation: ModuleType) -> None:
    rows = normal(64, 2880)
    assert 0.69 < len(packed(implementation, rows)) / rows.nbytes < 0.705
    noise = np.random.default_rng(0).integers(0, 1 << 16, rows.shape, np.uint16)
    assert len(packed(implementation, noise)) == noise.nbytes + len(noise)
    assert len(packed(implementation, np.zeros_like(rows))) == len(rows)


def test_rows_in_the_middle_are_told_where_they_lie(implementation: ModuleType) -> None:
    rows = normal(20, 300)
    stored = packed(implementation, rows)
    out = np.empty((5, 300), np.uint16)
    start, stop = implementation.unpack(stored, 11, out)
    assert np.array_equal(out, rows[11:16])
    assert 0 < start < stop < len(stored)
    assert np.array_equal(unpacked(implementation, stored[start:stop], (5, 300)), rows[11:16])
    assert implementation.unpack(stored, 20, out[:0]) == (len(stored), len(stored))


def test_rows_that_do_not_lie_side_by_side_are_filled_and_nothing_else(implementation: ModuleType) -> None:
    rows = normal(6, 100)
    buffer = np.full((6, 3, 100), 7, np.uint16)
    implementation.unpack(packed(implementation, rows), 0, buffer[:, 1])
    assert np.array_equal(buffer[:, 1], rows)
    assert (buffer[:, [0, 2]] == 7).all()


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100, 500, -1])
def test_records_cut_short_are_refused(implementation: ModuleType, kept: int) -> None:
    stored = packed(implementation, normal(3, 300))
    with pytest.raises(ValueError, match="is no record of 300 values"):
        unpacked(implementation, stored[:kept], (3, 300))


@pytest.mark.parametrize(
    ("at", "value"), [(0, 3), (0, 255), (1, 249), (2, 255), (3, 255), (-2, 255)], ids=lambda each: str(each)
)
def test_a_record_that_says_what_cannot_be_is_refused(implementation: ModuleType, at: int, value: int) -> None:
    row = np.full((1, 300), 0x3F80, np.uint16)
    row[0, 290] = 0
    stored = packed(implementation, row).copy()
    stored[at] = value
    with pytest.raises(ValueError, match="row 0 is no record of 300 values"):
        unpacked(implementation, stored, (1, 300))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 12), st.integers(0, 4))
def test_any_bytes_are_refused_or_read_the_same_by_both(content: bytes, channels: int, rows: int) -> None:
    native = pytest.importorskip("specx.storage.codecs._pfor")
    stored = np.frombuffer(content, np.uint8)
    assert outcome(native, stored, (rows, channels)) == outcome(pfor_plain, stored, (rows, channels))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_records_are_refused_or_read_the_same_by_both(data: st.DataObject) -> None:
    native = pytest.importorskip("specx.storage.codecs._pfor")
    stored = packed(native, normal(3, 70, data.draw(st.integers(0, 9)))).copy()
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(native, stored, (3, 70)) == outcome(pfor_plain, stored, (3, 70))


def test_what_is_no_rows_is_refused(native: ModuleType) -> None:
    room = np.zeros(10_000, np.uint8)
    for rows in (np.zeros(10, np.uint16), np.zeros((5, 10), np.float32), np.zeros((10, 5), np.uint16).T):
        with pytest.raises(ValueError, match="rows are not"):
            native.pack(rows, room)
        with pytest.raises(ValueError, match="rows are not"):
            native.unpack(room, 0, rows)
    fixed = np.zeros((1, 4), np.uint16)
    fixed.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        native.unpack(room, 0, fixed)


def test_too_little_room_is_refused(implementation: ModuleType) -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 16, (2, 50), np.uint16)
    with pytest.raises(ValueError, match="too little room"):
        implementation.pack(rows, np.zeros(pfor.most_bytes(rows.shape) - 1, np.uint8))


def test_what_is_packed_is_the_caller_s_own(implementation: ModuleType) -> None:
    first, second = pfor.pack(normal(3, 100, 1)), pfor.pack(normal(3, 100, 2))
    assert np.array_equal(unpacked(implementation, first, (3, 100)), normal(3, 100, 1))
    assert np.array_equal(unpacked(implementation, second, (3, 100)), normal(3, 100, 2))
    out = np.empty((2, 100), np.uint16)
    part = pfor.unpack(first, 1, out)
    assert np.array_equal(out, normal(3, 100, 1)[1:])
    assert part == slice(part.start, len(first))
