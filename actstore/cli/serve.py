"""``actstore serve``: stores over HTTP."""

import importlib.util
import json
from pathlib import Path

import click

from actstore.errors import JobError, MissingExtraError

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("serve")
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option("--root", help="Folder or bucket: every store below it is served, also those that come later.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes one that is free.",
)
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option(
    "--token-file",
    type=_FILE,
    help="One token a line, then globs of stores that it is for. Needed beyond loopback; read again when it changes.",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keeps shards of remote stores for batches. Default: a temporary folder.",
)
@click.option(
    "--cache-limit",
    type=click.IntRange(min=1),
    help="Bytes that it may take. Default: half of what is free there.",
)
@click.option(
    "--max-reply",
    type=click.IntRange(min=1),
    default=4 << 30,
    show_default=True,
    help="Bytes of one reply.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=256 << 20,
    show_default=True,
    help="Bytes of one batch; some of them are kept.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Requests at once in a process.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="Seconds until a reply must begin.",
)
@click.option(
    "--stall",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds after which a client that takes nothing of its reply is cut off.",
)
@click.option("--ssl-certfile", type=_FILE, help="PEM certificate: serve HTTPS.")
@click.option("--ssl-keyfile", type=_FILE, help="Its key.")
@click.option("--verbose", is_flag=True, help="Log each request.")
@click.option("--json", "as_json", is_flag=True, help="Print where it listens as JSON.")
def serve_command(
    urls: tuple[str, ...],
    root: str | None,
    host: str,
    port: int,
    workers: int,
    token_file: Path | None,
    cache_dir: Path | None,
    cache_limit: int | None,
    max_reply: int,
    max_batch: int,
    concurrency: int,
    timeout: float,
    stall: float,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Serve the stores at URLs, and all below --root, over HTTP.

    A store is called by the last component of its URL, or as in NAME=URL. Read one with
    actstore.open("http://127.0.0.1:8000/v1/stores/NAME").
    """
    if not urls and root is None:
        raise JobError("there is nothing to serve; name stores, or a folder of stores with --root")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        raise MissingExtraError("serving needs the extra 'serve'; pip install 'actstore[serve]'")
    from actstore.query.server.access import Access
    from actstore.query.server.catalog import Catalog, check, named
    from actstore.query.server.run import Listening, bound, serve, shared, url_of
    from actstore.query.server.settings import Settings

    settings = Settings(
        stores=named(urls),
        root=root,
        token_file=token_file,
        cache_dir=cache_dir,
        cache_limit=cache_limit,
        max_reply=max_reply,
        max_batch=max_batch,
        max_held=max(1 << 30, 4 * max_batch),
        concurrency=concurrency,
        concurrency_per_client=max(1, concurrency // 2),
        timeout_s=timeout,
        stall_s=stall,
    )
    listening = Listening(host, port, workers, ssl_certfile, ssl_keyfile, verbose)
    if token_file is not None:
        Access(token_file)
    catalog = Catalog(settings.stores, settings.root)
    check(catalog, settings.stores)
    with bound(listening, settings) as at, shared(settings) as settings:
        _say(url_of(listening, at), sorted(catalog.urls()), as_json)
        serve(settings, listening, at)


def _say(url: str, names: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "stores": names}))
        return
    click.echo(f"serving {len(names)} store{'s' if len(names) != 1 else ''} at {url}")
    for name in names[:20]:
        click.echo(f"  {url}/v1/stores/{name}")
    if len(names) > 20:
        click.echo(f"  and {len(names) - 20} more: GET {url}/v1/stores")
    click.echo(f"what can be asked for: {url}/docs; end with Ctrl-C")
