"""Plans of batches, from lengths alone."""

import numpy as np
import pytest

from specx.train.data.packing import BatchPlan, BatchShape, batch_shape, of_rank, plan_epoch, shuffled

LENGTHS = np.random.default_rng(0).integers(20, 300, 200)
PARTS = np.repeat(np.arange(40), 5)
ORDER = shuffled(PARTS, None, seed=0, epoch=0)


def numbers(plans: list[BatchPlan]) -> list[int]:
    return [index for plan in plans for row in plan for index in row]


def test_every_sequence_is_in_an_epoch_once_and_no_row_overflows() -> None:
    shape = batch_shape(LENGTHS, 2048)
    plans = plan_epoch(LENGTHS, shape, ORDER)
    assert sorted(numbers(plans)) == list(range(len(LENGTHS)))
    assert all(LENGTHS[list(row)].sum() <= shape.row_tokens for plan in plans for row in plan)
    assert all(len(plan) <= shape.rows for plan in plans)


def test_rows_are_well_filled() -> None:
    shape = batch_shape(LENGTHS, 4096)
    plans = plan_epoch(LENGTHS, shape, ORDER)
    assert LENGTHS.sum() / (len(plans) * shape.rows * shape.row_tokens) > 0.85


@pytest.mark.parametrize("window", [None, 8, 1000])
def test_the_order_depends_on_seed_and_epoch_only(window: int | None) -> None:
    order = shuffled(PARTS, window, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(len(PARTS)))
    assert np.array_equal(order, shuffled(PARTS, window, seed=1, epoch=2))
    assert not np.array_equal(order, shuffled(PARTS, window, seed=1, epoch=3))
    assert not np.array_equal(order, shuffled(PARTS, window, seed=2, epoch=2))


def test_no_more_parts_than_the_window_are_in_use_at_a_time() -> None:
    parts = np.repeat(np.arange(100), 50)
    met = parts[shuffled(parts, 8, seed=0, epoch=0)]
    first = {part: int(np.flatnonzero(met == part)[0]) for part in range(100)}
    last = {part: int(np.flatnonzero(met == part)[-1]) for part in range(100)}
    in_use = [sum(first[part] <= at <= last[part] for part in range(100)) for at in range(0, len(met), 25)]
    assert max(in_use) <= 9, "8, and one that gives way to the next"
    # Yet neighbours come from many parts, and parts in no order.
    assert np.mean([len(set(met[at : at + 16])) for at in range(200, 4800, 16)]) > 6
    assert list(first.values()) != sorted(first.values())


def test_the_longest_sequence_always_fits() -> None:
    assert batch_shape(np.array([10, 5000]), 1024) == BatchShape(rows=1, row_tokens=5000)


def test_no_sequences_give_no_batches() -> None:
    none = np.array([], np.int64)
    assert len(shuffled(none, 4, seed=0, epoch=0)) == 0
    assert plan_epoch(none, BatchShape(rows=2, row_tokens=10), none) == []


def test_a_great_many_short_sequences_are_planned_quickly_into_full_batches() -> None:
    lengths = np.ones(200_000, np.int64)
    plans = plan_epoch(lengths, BatchShape(rows=4096, row_tokens=1), np.arange(200_000))
    assert [len(plan) for plan in plans[:-1]] == [4096] * (200_000 // 4096)
    assert numbers(plans) == list(range(200_000))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_get_disjoint_batches_and_as_many_each(world_size: int) -> None:
    plans = plan_epoch(LENGTHS, batch_shape(LENGTHS, 1024), ORDER)
    shares = [of_rank(plans, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(plans) // world_size}
    met = [number for share in shares for number in numbers(share)]
    assert len(met) == len(set(met))
    # Step by step they are what one process trains on.
    together = [share[step] for step in range(len(shares[0])) for share in shares]
    assert together == plans[: len(together)]
