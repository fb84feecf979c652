"""What a request may take before the engine has it: its chat rendered, its text cut into tokens, its grammar tried."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from service.api.errors import ClientDisconnected
from service.api.state import ServiceState
from service.errors import RequestTimedOut


@asynccontextmanager
async def preparation(state: ServiceState, request: Request) -> AsyncIterator[None]:
    """End the work inside when the client leaves, or when it has taken as long as a request may wait.

    The request's body must have been read.

    Raises:
        RequestTimedOut: the limit has passed.
        ClientDisconnected: nobody waits for an answer.
    """
    limit_s = min(state.queue_timeout_s, state.request_timeout_s)
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watchers: list[asyncio.Task[None]] = []
    # What takes no turn of the event loop is done before anybody could leave.
    start = asyncio.get_running_loop().call_soon(lambda: watchers.append(asyncio.create_task(watch())))
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        message = f"the request took longer than {limit_s:g} s, the limit, before its turn could come; retry later"
        raise RequestTimedOut(message, code="queue_timeout") from error
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise ClientDisconnected from None
    finally:
        start.cancel()
        for watcher in watchers:
            watcher.cancel()
