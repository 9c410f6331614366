"""The HTML pages over HTTP, without a browser: access, and their content security policy."""

from __future__ import annotations

import httpx
import pytest
from serving_client import assert_error

from gptj.serving.pages import POLICY, docs, playground

pytest_plugins = ["serving_fixtures"]

PAGES = sorted({**playground(), **docs()})


@pytest.mark.parametrize("path", PAGES)
def test_pages_need_no_key_and_are_restricted_to_their_host(service: str, path: str) -> None:
    for prefix in ("", "/guarded"):
        reply = httpx.get(f"{service}{prefix}{path}")
        assert reply.status_code == 200
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        head = httpx.head(f"{service}{prefix}{path}")
        assert (head.status_code, head.content) == (200, b"")
        known = {"If-None-Match": reply.headers["etag"]}
        again = httpx.get(f"{service}{prefix}{path}", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        other = {"If-None-Match": '"another"'}
        assert httpx.get(f"{service}{prefix}{path}", headers=other).content == reply.content
    assert "unsafe" not in POLICY


def test_every_other_path_of_a_guarded_service_needs_its_key(service: str) -> None:
    for method, path in (
        ("POST", "/"),
        ("GET", "/playground"),
        ("GET", "/playground/nothing.js"),
        ("GET", "/playground/../v1/models"),
        ("GET", "/playground//v1/models"),
        ("GET", "/docs/nothing"),
        ("POST", "/docs"),
        ("GET", "/v1/models"),
        ("GET", "/redoc"),
    ):
        reply = httpx.request(method, f"{service}/guarded{path}")
        assert_error(reply, 401, "needs a key")


def test_the_openapi_document_needs_no_key(service: str) -> None:
    assert "/v1/completions" in httpx.get(f"{service}/guarded/openapi.json").json()["paths"]


def test_relative_links_resolve_from_every_page_address(service: str) -> None:
    """By a redirect that is relative too: neither scheme nor host are known behind a proxy."""
    for asked, location, there in (
        ("/guarded", "guarded/", "/guarded/"),
        ("/docs/", "../docs", "/docs"),
        ("/classification/docs/", "../docs", "/classification/docs"),
    ):
        reply = httpx.get(service + asked)
        assert (reply.status_code, reply.headers["location"]) == (307, location)
        assert httpx.get(service + asked, follow_redirects=True).url.path == there


def test_only_generation_has_the_playground(service: str) -> None:
    assert_error(httpx.get(f"{service}/classification"), 405, "does not take GET")
    reply = httpx.get(f"{service}/question-answering/playground/main.js")
    assert_error(reply, 404, "/question-answering/playground/main.js: see /question-answering/docs")
    assert httpx.get(f"{service}/classification/docs").status_code == 200
