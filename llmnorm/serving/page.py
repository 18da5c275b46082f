"""The files of the web page: read at the start, and sent with a policy that allows no others.

add_page(app)       GET / and GET /static/NAME, where the package has a page
"""

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from fastapi import FastAPI

DIRECTORY = Path(__file__).parent / "static"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing is loaded from elsewhere, and no script or style stands in a page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: "FastAPI", directory: Path = DIRECTORY) -> None:
    """Add the routes of the files in a directory, as they are now; none where it has no page."""
    if not (directory / INDEX).is_file():
        return
    found = {
        path.name: (path.read_bytes(), TYPES[path.suffix])
        for path in sorted(directory.iterdir())
        if path.suffix in TYPES
    }

    def add(route: str, name: str) -> None:
        content, kind = found[name]

        @app.get(route, include_in_schema=False, response_model=None)
        async def file(request: Request) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

    for name in found:
        add(f"/static/{name}", name)
    add("/", INDEX)
