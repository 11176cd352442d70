"""``actstore serve``: serve stores over HTTP."""

import contextlib
import importlib.util
import json
from pathlib import Path

import click

from actstore.cli.byte_size import byte_size
from actstore.cli.loader_options import loader_option
from actstore.errors import JobError, MissingExtraError

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("serve")
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option("--root", help="Folder or bucket: every store below it is served, including later ones.")
@click.option(
    "--allow-links",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Links in stores may also lead into this folder. Default: only within the folder of the store.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option(
    "--uds",
    type=_FILE,
    help="Also listen at this Unix socket, which is faster for clients on the same machine: "
    "http+unix://%2Fpath/v1/stores/NAME.",
)
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option(
    "--token-file",
    type=_FILE,
    help="File with one token per line, then name=WHOSE and globs of its stores. Needed beyond loopback; "
    "reread while the server runs.",
)
@loader_option("cache_dir", " Default: a temporary folder.", type=click.Path(file_okay=False, path_type=Path))
@loader_option("cache_limit", " Default: half of what is free there.", type=byte_size())
@click.option(
    "--max-reply",
    type=byte_size(),
    default="4GiB",
    show_default=True,
    help="Most bytes of one reply.",
)
@click.option(
    "--max-batch",
    type=byte_size(),
    default="256MiB",
    show_default=True,
    help="Most bytes of one batch; a few batches are kept.",
)
@click.option(
    "--memory",
    type=byte_size(1 << 20),
    default="1GiB",
    show_default=True,
    help="Most bytes that a process may hold for clients: batches, windows, replies. One client gets at most half.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Most requests at once in a process.",
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
    help="Seconds after which a client that reads nothing of its reply is cut off.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Most connections at once in a process; beyond that, the one idle for longest is closed.",
)
@click.option(
    "--head-timeout",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Seconds within which the URL and headers of a request must come.",
)
@click.option(
    "--keep-alive",
    type=click.IntRange(min=1),
    default=75,
    show_default=True,
    help="Seconds for which a connection is kept between two requests; a load balancer in front should use less.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    help="Another name or address by which clients may reach a server without tokens; can be repeated.",
)
@click.option(
    "--forwarded-allow-ips",
    metavar="LIST",
    help="Addresses and networks of proxies, joined by commas: the client is the last address of X-Forwarded-For "
    "that is none of them. * alone is one proxy, at whatever address. Default: no proxy is trusted.",
)
@click.option(
    "--access-log",
    type=click.Path(path_type=Path),
    help="Append a line of JSON for each request to this file; - is stderr.",
)
@click.option(
    "--scans",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Most scans at once in a process: searches, and finding the rows that are not dropped.",
)
@click.option("--ssl-certfile", type=_FILE, help="PEM certificate: serve HTTPS.")
@click.option("--ssl-keyfile", type=_FILE, help="Its key.")
@click.option("--verbose", is_flag=True, help="Log to stderr each request, and what the HTTP server does.")
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as JSON.")
def serve_command(
    urls: tuple[str, ...],
    root: str | None,
    allow_links: tuple[Path, ...],
    host: str,
    port: int,
    uds: Path | None,
    workers: int,
    token_file: Path | None,
    cache_dir: Path | None,
    cache_limit: int | None,
    max_reply: int,
    max_batch: int,
    memory: int,
    concurrency: int,
    timeout: float,
    stall: float,
    connections: int,
    head_timeout: float,
    keep_alive: int,
    allowed_host: tuple[str, ...],
    forwarded_allow_ips: str | None,
    access_log: Path | None,
    scans: int,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Serve the stores at URLs, and all stores below --root, over HTTP.

    The name of a store is the last component of its URL, or NAME in NAME=URL. Read one with
    actstore.open("http://127.0.0.1:8000/v1/stores/NAME").
    """
    if not urls and root is None:
        raise JobError("there is nothing to serve; name stores, or a folder of stores with --root")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        raise MissingExtraError("serving needs the extra 'serve'; pip install 'actstore[serve]'")
    from actstore.query.server.admission.access import check_token_file
    from actstore.query.server.admission.hosts import Hosts
    from actstore.query.server.catalog.catalog import Catalog, check, named
    from actstore.query.server.connections.addresses import Proxies
    from actstore.query.server.connections.room import ConnectionLimits
    from actstore.query.server.monitoring.access_log import AccessLog
    from actstore.query.server.run import Listening, bound, serve, shared, url_of
    from actstore.query.server.settings import Settings

    settings = Settings(
        stores=named(urls),
        root=root,
        allow_links=tuple(folder.expanduser().absolute() for folder in allow_links),
        token_file=token_file,
        cache_dir=cache_dir,
        cache_limit=cache_limit,
        max_reply=max_reply,
        max_batch=max_batch,
        max_held=memory,
        concurrency=concurrency,
        concurrency_per_client=max(1, concurrency // 2),
        timeout_s=timeout,
        stall_s=stall,
        connection_limits=ConnectionLimits(connections, max(1, connections // 2), head_timeout, keep_alive),
        allowed_hosts=allowed_host,
        forwarded_allow_ips=forwarded_allow_ips,
        access_log=access_log or (Path("-") if verbose else None),
        scans=scans,
    )
    listening = Listening(host, port, uds, workers, ssl_certfile, ssl_keyfile, verbose)
    Proxies(forwarded_allow_ips)
    Hosts(allowed_host)
    if token_file is not None:
        check_token_file(token_file)
    catalog = Catalog(settings.stores, settings.root, settings.allow_links)
    check(catalog, settings.stores)
    if access_log is not None:
        AccessLog(access_log)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server) for server in bound(listening, settings)]
        settings = stack.enter_context(shared(settings))
        _say([url_of(listening, server) for server in sockets], sorted(catalog.urls()), as_json)
        serve(settings, listening, sockets)


def _say(urls: list[str], names: list[str], as_json: bool) -> None:
    url = urls[0]
    if as_json:
        click.echo(json.dumps({"url": url, "urls": urls, "stores": names}))
        return
    click.echo(f"serving {len(names)} store{'s' if len(names) != 1 else ''} at {url}")
    for other in urls[1:]:
        click.echo(f"and at {other}")
    for name in names[:20]:
        click.echo(f"  {url}/v1/stores/{name}")
    if len(names) > 20:
        click.echo(f"  and {len(names) - 20} more: GET {url}/v1/stores")
    click.echo(f"API: {url}/docs; stop with Ctrl-C")
