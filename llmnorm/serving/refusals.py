"""What a request is refused with: a status, and OpenAI's error object.

    raise Refusal(400, "n: must be at least 1, got 0", "invalid_value", param="n")

    {"error": {"message": ..., "type": "invalid_request_error", "param": "n", "code": ...}}

What would surprise: OpenAI's client sends a request again by itself at 408, 409, 429 and all from
500 on. Where that cannot help, `x-should-retry: false` tells it so.
"""

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout_error",
}
MOST = 500  # characters of a message


class Refusal(Exception):
    """Ends a request with an error.

    Args:
        status: of HTTP, one of `TYPES`.
        message: one line, which never holds a trace or the server's paths.
        code: a word for programs.
        param: the field that is wrong.
        wait: seconds after which the client may ask again; None: asking again does not help, if the
            status is one at which clients do so.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        wait: int | None = None,
    ) -> None:
        message = " ".join(message.split())
        self.status, self.code, self.param, self.wait = status, code, param, wait
        self.message = message if len(message) <= MOST else message[: MOST - 3] + "..."
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": TYPES[self.status]}
        return {"error": {**error, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes with it: when to ask again, how to bring a key."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.wait is not None:
            headers["Retry-After"] = str(self.wait)
        elif self.status == 429 or self.status >= 500:
            headers["x-should-retry"] = "false"
        return headers
