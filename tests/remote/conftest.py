"""A real S3 server for the tests of this room, and a fresh address for each of them."""

from collections.abc import Iterator

import pytest

pytest.importorskip("moto.server", reason="moto has the S3 server: bash tools/bootstrap.sh dev")
pytest.importorskip("s3fs", reason="the extra remote: bash tools/bootstrap.sh remote")

from tests.remote.served import Line, environment, s3_server


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """The port of a server that has an empty bucket."""
    with s3_server() as port:
        yield port


@pytest.fixture
def line(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A line to the server, by which S3 clients of this process and its children find it."""
    found = Line(server)
    for name, value in environment(found.port).items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.fixture
def address(line: Line, request: pytest.FixtureRequest) -> str:
    """An address below which there is nothing yet."""
    return f"s3://bucket/{request.node.name.replace('[', '-').strip(']')}"
