"""The store's connections, whatever becomes of those that use them."""

from __future__ import annotations

import asyncio

from service.stores.redis import MAX_CONNECTIONS, RedisStore


async def test_who_is_cancelled_at_whatever_moment_keeps_no_connection(redis_store: RedisStore) -> None:
    pool = redis_store._pool
    for turns in range(200):
        calls = [asyncio.create_task(redis_store.ping()) for _ in range(MAX_CONNECTIONS)]
        for turn in range(turns):
            if turn % 5 == 0:
                await pool.connect_anew()  # as a call that fails beside them does
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert not pool._in_use_connections


async def test_calls_beside_one_that_fails_are_answered(redis_store: RedisStore) -> None:
    """Only what is idle, or was begun before, is closed."""
    pool = redis_store._pool
    await asyncio.gather(*(redis_store.ping() for _ in range(MAX_CONNECTIONS)))
    for _ in range(50):
        closing = asyncio.create_task(pool.connect_anew())
        await asyncio.gather(closing, *(redis_store.ping() for _ in range(MAX_CONNECTIONS)))
