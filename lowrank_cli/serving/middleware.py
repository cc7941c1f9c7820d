"""What every request passes before the application sees it: the bearer token, and the limit of its size."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)  #: paths that need no token


def error(
    status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
) -> JSONResponse:
    """An error as the OpenAI API writes it. ``retry``: seconds after which to try again."""
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    headers = {} if retry is None else {"retry-after": str(retry)}
    return JSONResponse(error_body(message, kind, code, param), status, headers)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of :func:`error`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def too_large(max_bytes: int) -> JSONResponse:
    """The error for a body that is."""
    return error(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")


class Gate:
    """Refuses requests without the token, and bodies of more than ``max_bytes``."""

    def __init__(self, app: ASGIApp, token: str | None, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # there are no websockets and no lifespan
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        given = headers.get(b"authorization", b"")
        needed = self._expected is not None and scope["path"] not in OPEN
        if needed and not hmac.compare_digest(given, self._expected or b""):
            message = "the token is missing or wrong (header 'Authorization: Bearer TOKEN')"
            await error(401, message, code="invalid_api_key")(scope, receive, send)
        elif length.isdigit() and int(length) > self.max_bytes:
            await too_large(self.max_bytes)(scope, receive, send)
        else:
            await self.app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """``receive``, which raises 413 in the application when a body turns out to be too large."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                raise HTTPException(413)
            return message

        return limited
