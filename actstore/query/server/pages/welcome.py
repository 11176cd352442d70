"""Pages for people: the welcome page with the stores, and the description of the API."""

import base64
import hashlib
import importlib.resources
from functools import cache
from html import escape
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from actstore._version import __version__
from actstore.query.documents import StoreSummary
from actstore.query.problem import Problem
from actstore.query.server.routes.stores import summary
from actstore.query.server.state import scope_of, state_of

router = APIRouter(include_in_schema=False)

_SHOWN: Final = 100
"""Stores on the page at most; each of them is opened for it."""
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY: Final = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'"
_DOCS_POLICY: Final = (
    # Swagger UI writes styles of its own, and has its icons in them.
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)
_HEADINGS: Final = "<tr><th>store<th>model<th>sequences x positions<th>hooks<th></tr>"
_ALWAYS: Final = "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_DOCS: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>actstore: API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START: Final = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  validatorUrl: null,
});
"""
_TYPES: Final = {"css": "text/css", "js": "text/javascript"}


@router.get("/")
def welcome(request: Request) -> Response:
    """The welcome page, with the stores that the client may read."""
    base = escape(f"{request.url.scheme}://{request.headers.get('Host', '127.0.0.1')}")
    scope, catalog = scope_of(request), state_of(request).catalog
    names = sorted(name for name in catalog.urls() if scope.allows(name)) if scope.globs else []
    if names:
        rows = "".join(_row(summary(request, name)) for name in names[:_SHOWN])
        table = f"<table>{_HEADINGS}{rows}</table>"
        more = len(names) - _SHOWN
        stores = f"{table}<p>and {more} more: <a href='/v1/stores'>/v1/stores</a></p>" if more > 0 else table
    elif scope.globs:
        stores = "<p>There is no store here yet; one that is written below the root appears within ten seconds.</p>"
    else:
        stores = "<p>The stores need a token: send it as <code>Authorization: Bearer ...</code>.</p>"
    name = escape(names[0]) if names else "NAME"
    token = "" if scope.globs else ', token="..."'
    text = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>actstore</title><style>{_STYLE}</style></head>
<body>
<h1>actstore {escape(__version__)}</h1>
<p>Stored activations of language models: slices, batches for training, and searches over HTTP.</p>
{stores}
<h2>From Python</h2>
<pre>import actstore

store = actstore.open("{base}/v1/stores/{name}"{token})
print(store)</pre>
<p><a href="/docs">Description of the API</a>, also as <a href="/openapi.json">OpenAPI</a>.</p>
</body>
</html>
"""
    headers = {"Content-Security-Policy": _POLICY + _ALWAYS, "Cache-Control": "no-store"}
    return HTMLResponse(text, headers=headers)  # the list of stores is for this client, as of now


def _row(store: StoreSummary) -> str:
    name = escape(store.name)
    shape = "" if store.shape is None else " x ".join(f"{size:,}" for size in store.shape)
    state = "cannot be read" if store.problem else "" if store.is_complete else "not complete yet"
    cells = (
        f"<a href='/v1/stores/{name}'>{name}</a>",
        escape(store.model or ""),
        shape,
        str(store.n_hooks or ""),
        state,
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


@router.get("/docs")
def docs() -> Response:
    """The description of the API, to read and to try; it loads nothing from elsewhere."""
    return HTMLResponse(_DOCS, headers={"Content-Security-Policy": _DOCS_POLICY + _ALWAYS})


@router.get("/docs/{name}")
def asset(name: str) -> Response:
    """A file of the description of the API.

    Raises:
        Problem: there is no file of this name.
    """
    data = _assets().get(name)
    if data is None:
        raise Problem(404, "not-found", "there is nothing here; /docs lists what there is")
    headers = {"Cache-Control": "public, max-age=3600"}
    return Response(data, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


@cache
def _assets() -> dict[str, bytes]:
    """Files of Swagger UI, from its package, and the script that starts it."""
    folder = importlib.resources.files("fastapi_offline") / "static"
    names = ("swagger-ui.css", "swagger-ui-bundle.js")
    return {"start.js": _START.encode(), **{name: (folder / name).read_bytes() for name in names}}
