"""Plans of steps and batches, from lengths alone."""

import numpy as np
import pytest

from specx.train.data.packing import (
    BatchPlan,
    Group,
    batches_per_device,
    grouped,
    of_rank_filled,
    seeds_of_step,
    shuffled,
    split,
)

PARTS = np.repeat(np.arange(40), 5)


def numbers(groups: list[Group]) -> list[int]:
    return [sequence for group in groups for sequence in group]


def made_up(seed: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Lengths of some sequences, a budget that a few of them exceed, and an order."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(4, 1, random.integers(1, 300))).astype(np.int64) + 1
    return lengths, int(random.integers(1, 3000)), random.permutation(len(lengths))


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_is_in_one_group_and_no_group_exceeds_its_tokens(seed: int) -> None:
    lengths, tokens, order = made_up(seed)
    groups = grouped(lengths, tokens, order)
    assert sorted(numbers(groups)) == list(range(len(lengths)))
    assert all(lengths[list(group)].sum() <= tokens or len(group) == 1 for group in groups)


@pytest.mark.parametrize("seed", range(30))
def test_a_step_is_split_into_batches_that_fit_and_no_fewer_would(seed: int) -> None:
    lengths, tokens, order = made_up(seed)
    steps = grouped(lengths, 4 * tokens, order)

    def fits(batches: int) -> bool:
        shares = [[lengths[step[i]] for i in share] for step in steps for share in split(lengths[list(step)], batches)]
        return all(len(share) <= 1 or sum(share) <= tokens for share in shares)

    for devices in (1, 2, 8):
        each = batches_per_device(steps, lengths.tolist(), devices, tokens)
        assert fits(each * devices)
        assert each == 1 or not fits((each - 1) * devices)


@pytest.mark.parametrize("batches", [1, 2, 3, 8])
def test_the_batches_of_a_step_have_all_of_it_and_about_as_much_each(batches: int) -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 200).tolist()
    shares = split(lengths, batches)
    assert sorted(numbers(shares)) == list(range(200))
    assert all(list(share) == sorted(share) for share in shares)
    loads = [sum(lengths[position] for position in share) for share in shares]
    assert max(loads) < 1.02 * sum(loads) / batches
    assert shares == split(lengths, batches)


def test_a_step_of_few_sequences_leaves_batches_empty() -> None:
    assert split([5, 9], 4) == [(1,), (0,), (), ()]


def test_groups_are_well_filled() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 2000)
    groups = grouped(lengths, 4096, np.arange(2000))
    assert lengths.sum() / (len(groups) * 4096) > 0.99


@pytest.mark.parametrize("step_tokens", [4096, 16_384])
def test_one_long_sequence_does_not_change_how_short_ones_are_packed(step_tokens: int) -> None:
    short = np.random.default_rng(0).integers(150, 250, 500)
    lengths = np.append(short, 4096)
    order = np.random.default_rng(1).permutation(501)
    without = grouped(short, step_tokens, order[order < 500])
    groups = grouped(lengths, step_tokens, order)
    assert sorted(numbers(groups)) == list(range(501))
    assert len(groups) <= len(without) + 1
    # What a batch has is laid one after the other: room is left at the end of a step only.
    filled = [lengths[list(group)].sum() / step_tokens for group in groups[:-1]]
    assert min(filled) > 0.95


def test_a_sequence_longer_than_a_step_is_one() -> None:
    assert grouped(np.array([10, 5000, 20]), 1024, np.arange(3)) == [(0, 2), (1,)]
    assert batches_per_device([(0, 2), (1,)], [10, 5000, 20], 1, 1024) == 1


def test_no_sequences_give_no_groups() -> None:
    none = np.array([], np.int64)
    assert len(shuffled(none, 4, seed=0, epoch=0)) == 0
    assert grouped(none, 10, none) == []


def test_a_great_many_short_sequences_are_planned_quickly_into_full_groups() -> None:
    groups = grouped(np.ones(200_000, np.int64), 4096, np.arange(200_000))
    assert [len(group) for group in groups[:-1]] == [4096] * (200_000 // 4096)
    assert numbers(groups) == list(range(200_000))


def test_seeds_depend_on_the_place_in_the_run_alone() -> None:
    few, many = seeds_of_step(0, 7, 3), seeds_of_step(0, 7, 100)
    assert few == many[:3]
    assert all(0 <= seed < 1 << 63 for seed in many)
    every = [seed for step in range(50) for seed in seeds_of_step(0, step, 100)]
    assert len(set(every)) == len(every)
    assert not set(every) & set(seeds_of_step(1, 7, 100))


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_held_out_batches_and_have_as_many_each(world_size: int) -> None:
    plans = [BatchPlan((number,)) for number in range(10)]
    shares = [of_rank_filled(plans, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-10 // world_size)}
    assert sorted(plan for share in shares for plan in share if plan.sequences) == plans
