"""Plans of batches, from lengths alone."""

import numpy as np

from specx.train.packing import BatchShape, batch_shape, plan_epoch

LENGTHS = np.random.default_rng(0).integers(20, 300, 200)


def test_every_sequence_is_in_an_epoch_once_and_no_row_overflows() -> None:
    shape = batch_shape(LENGTHS, 2048)
    plans = plan_epoch(LENGTHS, shape, seed=0, epoch=0)
    assert sorted(index for plan in plans for row in plan for index in row) == list(range(len(LENGTHS)))
    assert all(LENGTHS[row].sum() <= shape.row_tokens for plan in plans for row in plan)
    assert all(len(plan) <= shape.rows for plan in plans)


def test_rows_are_well_filled() -> None:
    shape = batch_shape(LENGTHS, 4096)
    plans = plan_epoch(LENGTHS, shape, seed=0, epoch=0)
    assert LENGTHS.sum() / (len(plans) * shape.rows * shape.row_tokens) > 0.85


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    shape = batch_shape(LENGTHS, 2048)
    plan = plan_epoch(LENGTHS, shape, seed=1, epoch=2)
    assert plan == plan_epoch(LENGTHS, shape, seed=1, epoch=2)
    assert plan != plan_epoch(LENGTHS, shape, seed=1, epoch=3)
    assert plan != plan_epoch(LENGTHS, shape, seed=2, epoch=2)


def test_the_longest_sequence_always_fits() -> None:
    assert batch_shape(np.array([10, 5000]), 1024) == BatchShape(rows=1, row_tokens=5000)


def test_no_sequences_give_no_batches() -> None:
    assert plan_epoch(np.array([], np.int64), BatchShape(rows=2, row_tokens=10), seed=0, epoch=0) == []
