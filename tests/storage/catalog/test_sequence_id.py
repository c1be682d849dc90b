"""The names of sequences, and the split made from them."""

import hashlib
import struct

import numpy as np

from specx.storage.catalog.sequence_id import sequence_id, unit_interval


def identifiers(n: int) -> np.ndarray:
    """Ids (n, 16) uint8 of n short sequences."""
    names = [sequence_id(np.asarray([i, 1], np.int32)) for i in range(n)]
    return np.frombuffer(b"".join(names), np.uint8).reshape(n, 16)


def test_a_sequence_is_named_by_blake2b_of_its_little_endian_ids() -> None:
    ids = [1, 0, 65536, 201087]
    expected = hashlib.blake2b(struct.pack("<4i", *ids), digest_size=16)
    assert sequence_id(np.asarray(ids, np.int32)) == expected.digest()
    assert expected.hexdigest() == "2e60bf96e451f2c66466a12640797cf4"


def test_the_name_does_not_depend_on_memory_layout() -> None:
    ids = np.arange(7, dtype=np.int32)
    name = sequence_id(ids)
    assert sequence_id(ids.astype(">i4")) == name
    assert sequence_id(ids.astype(np.int64)) == name
    assert sequence_id(np.repeat(ids, 2)[::2]) == name


def test_one_more_one_less_or_one_other_token_is_another_sequence() -> None:
    ids = np.arange(7, dtype=np.int32)
    other = ids.copy()
    other[3] += 1
    assert len({sequence_id(row) for row in (ids, ids[:-1], np.append(ids, np.int32(0)), other)}) == 4


def test_split_fractions_are_uniform() -> None:
    fractions = unit_interval(identifiers(20_000))
    counts, _ = np.histogram(fractions, bins=20, range=(0, 1))
    # Chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand draws; the ids are fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert counts.sum() == 20_000


def test_a_sequence_keeps_its_fraction_whatever_else_is_there() -> None:
    names = identifiers(500)
    fractions = unit_interval(names)
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(unit_interval(names[shuffled]), fractions[shuffled])
    assert np.array_equal(unit_interval(names[:7]), fractions[:7])


def test_fractions_follow_the_first_8_bytes_and_stay_below_one() -> None:
    names = np.zeros((4, 16), np.uint8)
    names[0, 8:] = 255
    names[1, 0] = 64
    names[2, :2] = 128, 1
    names[3] = 255
    assert unit_interval(names).tolist() == [0.0, 0.25, 0.5 + 1 / 65536, 1 - 2**-53]
