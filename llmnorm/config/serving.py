"""Settings of the HTTP server, the section `serving`; the engine behind it reads `generation`."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import LocalPath
from llmnorm.part import Settings

# A word counts before a file of that name.
_IN_ORDER = Field(union_mode="left_to_right")


class ServingSettings(Settings):
    """The HTTP server: where it listens, who may ask, and how much."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen at; `0.0.0.0`: every one of this machine."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0: any that is free."""
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What requests call the model; left out, the name of its directory."""
    api_key_file: LocalPath | None = None
    """A file of keys, one a line, that only its owner may read; a request brings one of them as
    `Authorization: Bearer KEY`. Left out, the variable LLMNORM_API_KEY holds the key; without it
    no key is asked for."""
    root_path: Annotated[str, Field(pattern="^(/[A-Za-z0-9._~-]+)*$")] = ""
    """The path under which a proxy shows the server, e.g. `/llm`, and which it takes away."""
    cors: list[str] = []
    """Web pages of these origins may ask, e.g. `https://example.org`; `*`: all."""
    queue: Annotated[int, Field(ge=0, le=100_000)] = 64
    """Answers that may wait for a slot; a request beyond them gets the status 429."""
    body_limit: Annotated[int, Field(ge=1_000, le=2**30)] = 2**22
    """Bytes of a request's body; a longer one gets the status 413."""
    request_timeout: Annotated[float, Field(gt=0, le=1e6)] | None = 600.0
    """Seconds after which a request is given up, waiting included; `null`: never."""
    shutdown_timeout: Annotated[float, Field(ge=0, le=1e5)] = 30.0
    """Seconds that running requests have to finish after SIGTERM or SIGINT."""
    chat_template: Annotated[Literal["fallback"] | LocalPath | None, _IN_ORDER] = None
    """A file with the Jinja template for messages, in the place of the model's own; `fallback`:
    `User: ...` and `Assistant: ...` on lines of their own, for a model without one."""
    access_log: Annotated[Literal["stdout", "none"] | LocalPath, _IN_ORDER] = "stdout"
    """Where a line of JSON is written for each request, which holds no text of it: a file, which is
    appended to, or `stdout`."""

    @model_validator(mode="after")
    def _check(self) -> "ServingSettings":
        for origin in self.cors:
            if origin != "*" and not re.fullmatch("https?://[^/ ]+", origin):
                raise ValueError(
                    f"serving.cors: '{origin}' is no origin; it is written as https://example.org"
                )
        return self
