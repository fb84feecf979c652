"""`GET /`: the page, with its scripts and styles; from files of the package alone, whatever the service is doing."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.errors import NotFound

_PAGE = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_METHODS = ["GET", "HEAD"]


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def page_router(twin: str | None = None) -> APIRouter:
    """The routes; the page compares this service with that of the origin `twin`."""
    router = APIRouter(include_in_schema=False)
    held = _read_files()
    policy = _policy(twin)

    @router.api_route("/", methods=_METHODS)
    async def page(request: Request) -> Response:
        """The page."""
        return _answer(held[_PAGE], request, policy)

    @router.api_route("/web/page.json", methods=_METHODS)
    async def page_settings() -> Response:
        """What the page cannot know by itself."""
        return JSONResponse({"twin": twin})

    @router.api_route("/web/{name}", methods=_METHODS)
    async def part(name: str, request: Request) -> Response:
        """A file of the page."""
        if name not in held:
            raise NotFound("the page has no such file; GET / is the page", code="unknown_route")
        return _answer(held[name], request, policy)

    return router


def _read_files() -> dict[str, _File]:
    """By name; read once, as they come with the package."""
    held = {}
    for path in files("service").joinpath("web").iterdir():
        media_type = _MEDIA_TYPES.get(PurePath(path.name).suffix)
        if media_type is not None:
            content = path.read_bytes()
            held[path.name] = _File(content, media_type, f'"{sha256(content).hexdigest()}"')
    return held


def _answer(file: _File, request: Request, policy: str) -> Response:
    """The file, or 304 to a browser that has it: each asks again, so that no version is mixed with another."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Content-Security-Policy": policy}
    known = request.headers.get("if-none-match", "")
    if file.etag in (etag.strip().removeprefix("W/") for etag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _policy(twin: str | None) -> str:
    """What browsers let the page do: files of this origin, requests to it and the twin, no script from text."""
    rules = (
        "default-src 'self'",
        f"connect-src 'self' {twin}" if twin else "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)
