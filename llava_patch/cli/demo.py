"""The command `llava-patch demo`."""

import threading

import typer

from llava_patch.cli.common import BASE, CHECKPOINT, DEVICE, DTYPE, GIN_FILE, GIN_PARAM, check_checkpoint, configured
from llava_patch.core.extras import needs


@needs("demo", "demo")
def demo(
    checkpoint: str = CHECKPOINT,
    base: str = BASE,
    host: str = typer.Option("127.0.0.1", help="to listen at; 0.0.0.0: whoever reaches this machine may ask"),
    port: int = typer.Option(0, min=0, max=65535, help="default: the first free one from 7860 on", show_default=False),
    tokens: int = typer.Option(64, min=1, help="that an answer has at most"),
    device: str = DEVICE,
    dtype: str = DTYPE,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """A web page: an image and a question, stock beside patched answer, what became of the image tokens.

    A patched CKPT stands beside its base (--base, or what its record names);
    a stock one beside itself with the patch of the gin options or, without
    any, with what is chosen on the page. Ctrl-C ends it.
    """
    from llava_patch.core.paths import default_name

    check_checkpoint(checkpoint)
    if base:
        check_checkpoint(base, "--base")
    with configured(gin_file, gin_param):
        from llava_patch.tools.demo.compute import open_models
        from llava_patch.tools.demo.page import served

        models = open_models(checkpoint, base, device, dtype)
        with served(models, default_name(checkpoint), tokens, host, port or None) as address:
            typer.echo(f"open {address}")
            threading.Event().wait()
