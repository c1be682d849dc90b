"""The lossy codecs keep what they say they keep."""

import numpy as np
import pytest
import torch

from specx.storage.codecs import quantization
from specx.storage.codecs.quantization import (
    OUTLIERS,
    Bits,
    LossyName,
    QuantizationError,
    decode,
    encode,
    from_bits,
    from_fp8,
    from_int8,
    to_bits,
    to_fp8,
    to_int8,
)

KINDS: list[LossyName] = ["int8", "fp8"]


def states(rows: int, channels: int, seed: int = 0) -> Bits:
    """Values like a model's hidden states: some channels, the same in all rows, are hundreds of times the rest."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, channels)).astype(np.float32)
    values[:, random.permutation(channels)[: channels // 64]] *= 300
    return to_bits(values)


def relative_error(rows: Bits, restored: Bits) -> float:
    error = QuantizationError()
    error.add(rows, restored)
    return error.relative


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0]  # halfway between two, and zeros
    assert np.array_equal(
        to_bits(values), torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def test_every_bfloat16_gets_the_e4m3_that_torch_gives_it() -> None:
    values = from_bits(np.arange(1 << 16, dtype=np.uint16))
    finite = np.isfinite(values)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(quantization._ENCODE[finite], expected[finite])
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    is_number = np.isfinite(decoded)
    assert np.array_equal(quantization._DECODE[is_number], decoded[is_number])


def test_int8_keeps_outliers_to_the_bit_and_the_rest_within_half_a_level() -> None:
    rows = states(50, 512)
    quantised = to_int8(rows)
    restored = from_int8(quantised)
    largest = np.argsort(np.abs(from_bits(rows)), axis=1, kind="stable")[:, -OUTLIERS:]
    for row in range(50):
        assert (
            np.abs(from_bits(rows[row, quantised.channels[row]])).min()
            >= np.abs(from_bits(rows[row, largest[row]])).min()
        )
        assert np.array_equal(restored[row, quantised.channels[row]], rows[row, quantised.channels[row]])
    # Half a level, and what rounding to bfloat16 adds to that.
    allowed = quantised.scale[:, None] * 0.5 + np.abs(from_bits(rows)) * 2.0**-8
    assert (np.abs(from_bits(restored) - from_bits(rows)) <= allowed).all()


@pytest.mark.parametrize("channels", [31, 32, 47, 100, 512, 2880])
@pytest.mark.parametrize("kind", ["noise", "few different values", "zeros"])
def test_outliers_are_those_a_plain_sort_finds_last(channels: int, kind: str) -> None:
    values = np.random.default_rng(channels).standard_normal((60, channels)).astype(np.float32)
    values[::7] = 0
    rows = to_bits({"noise": values, "few different values": np.round(values), "zeros": 0 * values}[kind])
    # Stable: of equal sizes the higher channel comes later.
    order = np.argsort(rows & 0x7FFF, axis=1, kind="stable")
    outliers = min(OUTLIERS, channels // 32)
    quantised = to_int8(rows)
    assert np.array_equal(quantised.channels, np.sort(order[:, channels - outliers :], axis=1))
    largest_left = np.take_along_axis(rows & 0x7FFF, order[:, channels - outliers - 1, None], 1)[:, 0]
    assert np.array_equal(quantised.scale, from_bits(largest_left) / np.float32(127))


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_are_restored_as_all_are(kind: LossyName) -> None:
    rows = states(300, 2880)
    content = encode(kind, rows)
    every = decode(kind, content, rows.shape)
    buffer = np.full((200, 2, 2880), 7, np.uint16)
    decode(kind, content, rows.shape, buffer[:, 1], 70)
    assert np.array_equal(buffer[:, 1], every[70:270])
    assert (buffer[:, 0] == 7).all()


def test_with_massive_activations_the_bulk_loses_a_tenth_of_what_plain_int8_loses() -> None:
    values = np.random.default_rng(0).standard_normal((200, 2880)).astype(np.float32)
    values[:, :4] *= 300
    rows = to_bits(values)
    scale = np.abs(values).max(1, keepdims=True) / 127
    plain = to_bits(np.rint(values / scale) * scale)
    bulk = np.s_[:, 4:]
    assert relative_error(rows[bulk], from_int8(to_int8(rows))[bulk]) < 0.1 * relative_error(rows[bulk], plain[bulk])


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.01), ("fp8", 0.03)])
def test_the_error_of_plain_noise_is_small(kind: LossyName, limit: float) -> None:
    rows = to_bits(np.random.default_rng(0).standard_normal((300, 2880)).astype(np.float32))
    restored = decode(kind, encode(kind, rows).tobytes(), rows.shape)
    assert 0 < relative_error(rows, restored) < limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [2, 8, 9, 16, 2880])
def test_any_width_comes_back_whole(kind: LossyName, channels: int) -> None:
    rows = states(7, channels, seed=channels)
    assert decode(kind, encode(kind, rows).tobytes(), rows.shape).shape == rows.shape


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_one_value_come_back_as_they_were(kind: LossyName) -> None:
    rows = to_bits(np.repeat(np.asarray([0.0, 1.0, -3.5, 2.0**-100, 2.0**100], np.float32)[:, None], 32, axis=1))
    restored = decode(kind, encode(kind, rows).tobytes(), rows.shape)
    assert np.allclose(from_bits(restored), from_bits(rows), rtol=1e-2, atol=0)


def test_values_just_below_a_power_of_two_are_not_cut_off_by_fp8() -> None:
    rows = to_bits(np.asarray([[1.99, -1.99, 0.5, 0.1]], np.float32))
    assert np.allclose(from_bits(from_fp8(to_fp8(rows))), from_bits(rows), rtol=2**-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_of_another_shape_are_refused(kind: LossyName, change: int) -> None:
    content = encode(kind, states(5, 32)).tobytes()
    with pytest.raises(ValueError, match=r"bytes|buffer"):
        decode(kind, content[:change] if change < 0 else content + b"\0", (5, 32))


def test_the_error_over_all_is_not_the_mean_of_errors() -> None:
    error = QuantizationError()
    large, small = (to_bits(np.full((1, 4), value, np.float32)) for value in (100.0, 1.0))
    error.add(large, large)
    error.add(small, np.zeros_like(small))
    assert error.relative == pytest.approx((4 / (4 + 4 * 100**2)) ** 0.5)
    assert QuantizationError().relative == 0.0
