"""``actstore serve``: serve stores over HTTP."""

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from actstore.cli.options.byte_size import byte_size
from actstore.cli.options.loader_options import loader_option
from actstore.cli.showing.json_document import print_json
from actstore.errors import JobError, MissingExtraError
from actstore.query.server.connections.room import ConnectionLimits
from actstore.query.server.settings import Settings

_FILE = click.Path(dir_okay=False, path_type=Path)


def _setting(
    option: str, name: str | None = None, of: type[Any] = Settings, **attributes: Any
) -> Callable[[Any], Any]:
    """The option that sets a field of `Settings` or `ConnectionLimits`, with its default and what is said of it there.

    Args:
        option: the option.
        name: the field, where it is called otherwise.
        of: the class of the field.
        attributes: as for `click.option`.
    """
    name = name or option.removeprefix("--").replace("-", "_")
    default = getattr(of, name)
    if isinstance(default, int) and default >= 1 << 20:
        default = f"{default >> 30}GiB" if default % (1 << 30) == 0 else f"{default >> 20}MiB"
    known = {
        "default": default,
        "show_default": default not in (None, ()),
        "help": get_args(of.__annotations__[name])[1],
    }
    return click.option(option, name, **known | attributes)


@click.command("serve")
@click.argument("urls", nargs=-1, metavar="[URL]...")
@_setting("--root")
@_setting("--allow-links", multiple=True, type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER")
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
@_setting("--token-file", type=_FILE)
@loader_option("cache_dir", " Default: a temporary folder.", type=click.Path(file_okay=False, path_type=Path))
@loader_option("cache_limit", " Default: half of what is free there.", type=byte_size())
@_setting("--max-reply", type=byte_size())
@_setting("--max-batch", type=byte_size())
@_setting("--memory", "max_held", type=byte_size(1 << 20))
@_setting("--concurrency", type=click.IntRange(min=1))
@_setting("--timeout", "timeout_s", type=click.FloatRange(min=0.1))
@_setting("--stall", "stall_s", type=click.FloatRange(min=0.1))
@_setting("--connections", "n_connections", ConnectionLimits, type=click.IntRange(min=1))
@_setting("--head-timeout", "head_s", ConnectionLimits, type=click.FloatRange(min=0.1))
@_setting("--keep-alive", "keep_alive_s", ConnectionLimits, type=click.IntRange(min=1))
@_setting("--allowed-host", "allowed_hosts", multiple=True)
@_setting("--forwarded-allow-ips", metavar="LIST")
@_setting("--access-log", type=click.Path(path_type=Path))
@_setting("--scans", type=click.IntRange(1, 64))
@_setting("--compute", metavar="MODEL")
@_setting("--compute-tokens", type=click.IntRange(min=1))
@_setting("--compute-pending", type=click.IntRange(1, 1024))
@_setting("--compute-limit", type=byte_size(1))
@click.option("--ssl-certfile", type=_FILE, help="PEM certificate: serve HTTPS.")
@click.option("--ssl-keyfile", type=_FILE, help="Its key.")
@click.option("--verbose", is_flag=True, help="Log to stderr each request, and what the HTTP server does.")
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as JSON.")
def serve_command(
    urls: tuple[str, ...],
    host: str,
    port: int,
    uds: Path | None,
    workers: int,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve the stores at URLs, and all stores below --root, over HTTP.

    The name of a store is the last component of its URL, or NAME in NAME=URL. Read one with
    actstore.open("http://127.0.0.1:8000/v1/stores/NAME").
    """
    if not urls and options["root"] is None:
        raise JobError("there is nothing to serve; name stores, or a folder of stores with --root")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        raise MissingExtraError("serving needs the extra 'serve'; pip install 'actstore[serve]'")
    if options["compute"] is not None:
        if workers > 1:
            raise JobError(
                f"--compute has one process with the model, and --workers is {workers}; leave --workers out"
            )
        from actstore.hooks.loading.pretrained import load_config

        load_config(options["compute"])
    from actstore.query.server.admission.access import check_token_file
    from actstore.query.server.admission.hosts import Hosts
    from actstore.query.server.catalog.catalog import Catalog, check, name_stores
    from actstore.query.server.connections.addresses import Proxies
    from actstore.query.server.monitoring.access_log import AccessLog
    from actstore.query.server.run import Listening, bind_sockets, serve, share_folders, url_of

    n_connections = options.pop("n_connections")
    limits = ConnectionLimits(
        n_connections, max(1, n_connections // 2), options.pop("head_s"), options.pop("keep_alive_s")
    )
    links, access_log = options.pop("allow_links"), options.pop("access_log")
    settings = Settings(
        stores=name_stores(urls),
        allow_links=tuple(folder.expanduser().absolute() for folder in links),
        concurrency_per_client=max(1, options["concurrency"] // 2),
        connection_limits=limits,
        access_log=access_log or (Path("-") if verbose else None),
        **options,
    )
    listening = Listening(host, port, uds, workers, ssl_certfile, ssl_keyfile, verbose)
    Proxies(settings.forwarded_allow_ips)
    Hosts(settings.allowed_hosts)
    if settings.token_file is not None:
        check_token_file(settings.token_file)
    catalog = Catalog(settings.stores, settings.root, settings.allow_links)
    check(catalog, settings.stores)
    if access_log is not None:
        AccessLog(access_log)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server) for server in bind_sockets(listening, settings)]
        settings = stack.enter_context(share_folders(settings))
        _say([url_of(listening, server) for server in sockets], sorted(catalog.urls()), as_json)
        serve(settings, listening, sockets)


def _say(urls: list[str], names: list[str], as_json: bool) -> None:
    url = urls[0]
    if as_json:
        print_json({"url": url, "urls": urls, "stores": names}, indent=None)
        return
    click.echo(f"serving {len(names)} store{'s' if len(names) != 1 else ''} at {url}")
    for other in urls[1:]:
        click.echo(f"and at {other}")
    for name in names[:20]:
        click.echo(f"  {url}/v1/stores/{name}")
    if len(names) > 20:
        click.echo(f"  and {len(names) - 20} more: GET {url}/v1/stores")
    click.echo(f"API: {url}/docs; stop with Ctrl-C")
