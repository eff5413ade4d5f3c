"""HTTP to servers on this machine: httpx, whose own `get` reads the certificates of all authorities at every call; and such a server.

That is 33 ms of a processor, and tests that ask every 20 ms whether a service is ready took them from the service.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import uvicorn

_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

get = partial(httpx.get, verify=_NO_CERTIFICATES)
post = partial(httpx.post, verify=_NO_CERTIFICATES)
put = partial(httpx.put, verify=_NO_CERTIFICATES)
delete = partial(httpx.delete, verify=_NO_CERTIFICATES)
request = partial(httpx.request, verify=_NO_CERTIFICATES)
stream = partial(httpx.stream, verify=_NO_CERTIFICATES)


@contextmanager
def served(app: Any, **options: Any) -> Iterator[int]:
    """The port of an ASGI app over real HTTP, in a thread; `options` of uvicorn.Config."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, loop="asyncio", ws="none", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)
