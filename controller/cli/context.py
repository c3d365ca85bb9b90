"""`ferry context`: controllers remembered by name."""

import click

from common.errors import InvalidInput, NotFound
from controller.cli.connection import Context, Contexts, load_contexts, save_contexts
from controller.cli.output import table


@click.group("context")
def context() -> None:
    """Remember controllers and tokens by name."""


@context.command("set")
@click.argument("name")
@click.option("--url", required=True, metavar="URL", help="The controller's URL.")
@click.option("--token", default="", metavar="TOKEN", help="The token; kept in a file that only you can read.")
@click.option("--token-file", default="", metavar="FILE", help="A file that holds the token; it is read each time.")
def set_(name: str, url: str, token: str, token_file: str) -> None:
    """Remember a controller as NAME; the first one becomes the current one."""
    if not url.startswith(("http://", "https://")):
        raise InvalidInput(f"{url!r} is not a URL", field="url", fix="use http://HOST:PORT or https://HOST")
    known = load_contexts()
    contexts = {**known.contexts, name: Context(url, token, token_file)}
    save_contexts(Contexts(known.current or name, contexts))
    click.echo(f"context {name} is {url}", err=True)


@context.command("list")
def list_() -> None:
    """List the remembered controllers; the current one has a star."""
    known = load_contexts()
    rows = [["", "NAME", "URL", "TOKEN"]]
    for name, one in sorted(known.contexts.items()):
        secret = one.token_file or ("kept here" if one.token else "-")
        rows.append(["*" if name == known.current else "", name, one.url, secret])
    click.echo(table(rows))


@context.command("use")
@click.argument("name")
def use(name: str) -> None:
    """Make NAME the current context."""
    known = load_contexts()
    if name not in known.contexts:
        raise NotFound(f"there is no context {name!r}", field="context", fix="see: ferry context list")
    save_contexts(Contexts(name, known.contexts))
    click.echo(f"using {name}", err=True)
