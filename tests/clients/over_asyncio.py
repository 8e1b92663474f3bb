"""The asyncio client, driven so that the tests of the blocking one hold for it too."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from sandboxd.client import AsyncSandbox
from sandboxd.client.async_sockets import AsyncAttachment
from sandboxd.client.asynchronous import AsyncEvents


class OverAsyncio:
    """An :class:`AsyncSandbox` each of whose calls is waited for."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._sandbox = AsyncSandbox(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._sandbox, name)
        return self._waiting(attribute) if callable(attribute) else attribute

    def _waiting(self, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            if isinstance(result, (AsyncEvents, AsyncAttachment)):
                return DrivenEvents(self._loop, result)
            return self._loop.run_until_complete(result) if inspect.isawaitable(result) else result

        return call

    def close(self) -> None:
        self._loop.run_until_complete(self._sandbox.close())
        # As asyncio.run does: what a task that is left has open would else be found by the garbage collector.
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:  # gather would want a loop that runs
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


class DrivenEvents:
    """An :class:`AsyncEvents` or :class:`AsyncAttachment` each of whose steps is waited for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: AsyncEvents[Any] | AsyncAttachment) -> None:
        self._loop = loop
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def __iter__(self) -> DrivenEvents:
        return self

    def __next__(self) -> Any:
        try:
            return self._loop.run_until_complete(self._events.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> DrivenEvents:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run_until_complete(self._events.close())
