"""What waits of a partition is bounded in messages and bytes, comes in its order, and is nobody's any more once it is given up."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import Fenced
from service.metrics import Metrics
from service.sources import Message
from service.sources.partitions import AHEAD, BATCH_BYTES, Partition, Partitions

BATCH = 10


def message(position: int, size: int = 1) -> Message:
    return Message(b"%d" % position, position, 1.7e9, b"x" * size)


def partition(*sizes: int) -> Partition:
    made = Partition("p", 1, -1)
    for position, size in enumerate(sizes):
        made.add(message(position, size))
    return made


def offered(*sizes: int) -> tuple[Partitions[Partition], Partition]:
    """A replica's only partition, whose messages may be received two at a time."""
    partitions, one = Partitions[Partition]("s", Metrics(), 2), partition(*sizes)
    partitions.own([one])
    partitions.offer(one)
    return partitions, one


def positions(messages: list[Message]) -> list[int]:
    return [message.position for message in messages]


def test_a_batch_has_so_many_messages_and_bytes_at_most_and_a_larger_message_is_one_by_itself() -> None:
    half = BATCH_BYTES // 2
    waits = partition(1, half, half, BATCH_BYTES + 1, *[1] * (BATCH + 1))
    assert [positions(waits.take(BATCH)) for _ in range(4)] == [[0, 1], [2], [3], list(range(4, 4 + BATCH))]


def test_what_waits_is_full_by_messages_or_bytes_and_low_at_half_of_either() -> None:
    few, many, large = partition(1), partition(*[1] * AHEAD * BATCH), partition(*[BATCH_BYTES] * AHEAD)
    assert [(waits.full(BATCH), waits.low(BATCH)) for waits in (few, many, large)] == [(False, True), (True, False), (True, False)]
    taken = large.take(1) + large.take(1)
    assert (large.full(BATCH), large.low(BATCH)) == (False, True)
    large.give_back(taken)
    assert (large.full(BATCH), large.bytes) == (True, AHEAD * BATCH_BYTES)
    large.forget()
    assert (large.bytes, large.low(BATCH)) == (0, True)


async def test_what_is_abandoned_comes_again_before_what_came_after_it() -> None:
    partitions, _ = offered(1, 1, 1)
    batch = await partitions.receive()
    assert positions(list(batch.messages)) == [0, 1]
    partitions.abandon(batch)
    assert positions(list((await partitions.receive()).messages)) == [0, 1]


async def test_of_a_partition_that_is_given_up_only_what_is_under_way_is_finished() -> None:
    partitions, one = offered(1, 1, 1)
    batch = await partitions.receive()
    giving = asyncio.create_task(partitions.release([one]))
    await asyncio.sleep(0)
    one.add(message(3))
    partitions.offer(one)
    partitions.settle(batch)
    assert one.batch is None
    await giving
    assert (one.settled, partitions.names) == (1, [])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(partitions.receive(), 0.05)
    with pytest.raises(Fenced):
        partitions.settle(batch)


async def test_a_batch_that_nobody_has_taken_yet_does_not_hold_up_a_handover() -> None:
    partitions, one = offered(1)
    async with asyncio.timeout(5):  # half of HANDOVER_SECONDS
        await partitions.release([one])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(partitions.receive(), 0.05)
