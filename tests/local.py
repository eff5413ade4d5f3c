"""HTTP to servers on this machine: httpx, whose own `get` reads the certificates of all authorities at every call.

That is 33 ms of a processor, and tests that ask every 20 ms whether a service is ready took them from the service.
"""

from __future__ import annotations

import ssl
from functools import partial

import httpx

_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

get = partial(httpx.get, verify=_NO_CERTIFICATES)
post = partial(httpx.post, verify=_NO_CERTIFICATES)
put = partial(httpx.put, verify=_NO_CERTIFICATES)
delete = partial(httpx.delete, verify=_NO_CERTIFICATES)
request = partial(httpx.request, verify=_NO_CERTIFICATES)
stream = partial(httpx.stream, verify=_NO_CERTIFICATES)
