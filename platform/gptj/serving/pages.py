"""Pages for people: the playground at `/` and the API documentation at `/docs`.

Their files come from this package (Swagger UI's from fastapi-offline), are read once, and need no
key, since users enter their key on the page. A content security policy restricts them to their own
host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gptj.environment.extras import require
from gptj.serving.middleware.paths import route_path

MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")


@dataclass(frozen=True)
class Page:
    path_format: str  # its route in metrics, where `/` is an application's work
    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    def response(self, scope: Scope) -> Response:
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # cached, but revalidated
            "ETag": self.etag,
        }
        if dict(scope["headers"]).get(b"if-none-match") == self.etag.encode():
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def docs() -> dict[str, Page]:
    """Swagger UI at `/docs` for the application's `/openapi.json`."""
    ours = files("gptj.serving")
    sources = {
        "/docs": ours / "docs" / "index.html",
        "/docs/start.js": ours / "docs" / "start.js",
        "/docs/icon.svg": ours / "playground" / "icon.svg",
    }
    swagger = files(require("fastapi_offline", "/docs", "fastapi-offline")) / "static"
    sources |= {f"/docs/{name}": swagger / name for name in SWAGGER_UI}
    return {path: _page(path, source) for path, source in sources.items()}


def playground() -> dict[str, Page]:
    """`/`, in metrics `/playground`, and its assets below that."""
    folder = files("gptj.serving") / "playground"
    sources = {f"/playground/{file.name}": file for file in folder.iterdir()}
    page = _page("/playground", sources.pop("/playground/index.html"))
    return {"/": page, **{path: _page(path, source) for path, source in sources.items()}}


def _page(path: str, source: Traversable) -> Page:
    suffix = source.name[source.name.rindex(".") :]
    return Page(path, source.read_bytes(), MEDIA_TYPES[suffix])


class Pages:
    """Middleware: answers GET for its pages and passes everything else on."""

    def __init__(self, app: ASGIApp, pages: Mapping[str, Page]) -> None:
        self._app = app
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page, path = None, ""
        if scope["type"] == "http" and scope["method"] == "GET":
            path = route_path(scope)
            page = self._pages.get(path)
        if page is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = page
        elsewhere = _canonical(scope, is_folder=path == "/")
        response = page.response(scope)
        if elsewhere is not None:
            response = Response(status_code=307, headers={"Location": elsewhere})
        await response(scope, receive, send)


def _canonical(scope: Scope, *, is_folder: bool) -> str | None:
    """The redirect that makes a page's relative links work, if needed: only `/` ends in a slash.

    It is relative, since neither the scheme nor a prefix stripped by a proxy is known.
    """
    raw = scope.get("raw_path", b"").decode("latin-1")
    if not raw or raw.endswith("/") == is_folder:
        return None
    name = raw.rstrip("/").rpartition("/")[2]
    return f"{name}/" if is_folder else f"../{name}"
