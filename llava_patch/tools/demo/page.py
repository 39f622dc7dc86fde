"""The demo's web page. Gradio draws it, and this file alone knows gradio."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_patch.core.errors import LlavaPatchError
from llava_patch.core.extras import optional
from llava_patch.measurements.base import default_split
from llava_patch.settings.methods import FastV, Routing
from llava_patch.settings.routing import VARIANTS
from llava_patch.tools.demo import draw
from llava_patch.tools.demo.compute import Answer, Models

NONE = "none"
QUESTION = "What is written in the image?"
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:"
)
"""What a browser may load: gradio's own page asks for fonts and scripts of other hosts in some versions."""


class OwnHostOnly:
    """Sends `POLICY` with every answer; an ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, sent)


@contextmanager
def served(models: Models, name: str, tokens: int, host: str, port: int | None) -> Iterator[str]:
    """Inside the block the page is there; gives its address.

    Args:
        models: what answers.
        name: what the page calls the checkpoint.
        tokens: how many an answer has at most.
        host: name or address to listen at.
        port: None: the first free one from 7860 on.

    Raises:
        LlavaPatchError: the port is taken, or the host is none of this machine's.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with tempfile.TemporaryDirectory(prefix="llava_patch_demo_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(optional("gradio", "demo"), models, name, tokens)
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                show_error=True, app_kwargs={"middleware": [(OwnHostOnly, (), {})]},
                _frontend=False,  # it would ask itself for the page, and give up after three seconds
            )  # fmt: skip
        except OSError as error:
            raise LlavaPatchError(f"--host {host} --port {port or '7860 and up'}: {error}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def build(gradio: Any, models: Models, name: str, tokens: int) -> Any:
    """The page as gradio's Blocks."""
    fixed = models.patched is not None or bool(models.methods)
    depth = models.depth

    def ask(image: Any, question: str, variant: str = NONE, split: int = 0, layer: int = 2, pruned: float = 0) -> tuple:
        if image is None:
            raise gradio.Error("choose an image first")
        try:
            methods = None if fixed else chosen(variant, int(split), int(layer), float(pruned))
            both = models.answers(image, question, tokens, methods)
        except LlavaPatchError as error:
            raise gradio.Error(str(error)) from error
        head, rows = draw.timings(*both)
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
        shown = [part for one in both for part in (one.text, draw.tokens_picture(one), described(one))]
        return (both, *shown, *look(both, depth - 1), table)

    def look(both: tuple[Answer, Answer] | None, layer: int) -> list[Any]:
        if both is None:
            return [None, "", None, ""]
        found = []
        for one in both:
            share = draw.mass(one.attention[int(layer)])
            words = f"layer {int(layer)}: {share:.1%} of the attention lies on these image tokens"
            found += [draw.attention_picture(one, int(layer)), words]
        return found

    with gradio.Blocks(title=f"{name}: stock and patched", analytics_enabled=False) as page:
        gradio.Markdown(f"# {name}: stock and patched\n{about(models)}")
        answers = gradio.State(None)
        with gradio.Row():
            image = gradio.Image(
                type="pil", label="image", sources=["upload", "clipboard"], elem_id="image", height=320
            )
            with gradio.Column():
                question = gradio.Textbox(QUESTION, label="question", elem_id="question")
                controls = [] if fixed else _controls(gradio, depth)
                button = gradio.Button("ask both", variant="primary", elem_id="ask")
        with gradio.Row():
            shown, looks = [], []
            for which in ("stock", "patched"):
                with gradio.Column():
                    shown += [
                        gradio.Textbox(label=f"{which}: answer", elem_id=f"{which}-answer", interactive=False),
                        gradio.Image(label=f"{which}: image tokens", elem_id=f"{which}-tokens", interactive=False),
                        gradio.Markdown(elem_id=f"{which}-words"),
                    ]
                    looks += [
                        gradio.Image(label=f"{which}: attention", elem_id=f"{which}-attention", interactive=False),
                        gradio.Markdown(elem_id=f"{which}-mass"),
                    ]
        gradio.Markdown(
            "Image tokens: as in the image: passes every decoder layer; blue: leaves some out and comes back; dark: "
            "leaves for good; the stronger, the more layers it leaves out. Attention of the position that the answer "
            "begins at, mean over heads, brightest: this picture's highest; grey and dark: no such token in the layer."
        )
        layer = gradio.Slider(0, depth - 1, value=depth - 1, step=1, label="layer of the attention", elem_id="layer")
        times = gradio.Markdown(elem_id="times")
        gradio.Markdown("Times are of this one run, image encoding in the first token's; `llava-patch bench` measures.")
        asked = {"inputs": [image, question, *controls], "outputs": [answers, *shown, *looks, times]}
        button.click(ask, **asked).then(lambda: depth - 1, None, layer)
        question.submit(ask, **asked).then(lambda: depth - 1, None, layer)
        layer.release(look, [answers, layer], looks)
    return page


def _controls(gradio: Any, depth: int) -> list[Any]:
    """What to put on a stock checkpoint: variant, split, layer and share of the pruning."""
    return [
        gradio.Dropdown([*VARIANTS, NONE], value="lf", label="routing (untrained side branch)", elem_id="variant"),
        gradio.Slider(0, depth - 1, value=default_split(depth), step=1, label="split", elem_id="split"),
        gradio.Slider(1, depth - 1, value=min(2, depth - 1), step=1, label="FastV: layer", elem_id="prune-layer"),
        gradio.Slider(0, 0.95, value=0, step=0.05, label="FastV: share to prune", elem_id="prune-ratio"),
    ]


def chosen(variant: str, split: int, layer: int, pruned: float) -> dict[str, Any]:
    """The methods that the page's controls ask for, by kind."""
    routing = {} if variant == NONE else {"routing": Routing(variant=variant, split=split)}
    return {**routing, **({"pruning": FastV(layer, pruned)} if pruned else {})}


def described(answer: Answer) -> str:
    """Below a model's tokens: what is on it, and which layers they pass."""
    patch = ", ".join(map(str, answer.methods.values())) or "no patch"
    rest = answer.image_tokens - answer.runs[0].numel()
    more = f" ({rest} more of tiles, line ends or taps are not drawn)" if rest else ""
    return f"{patch}: {draw.tokens_words(answer)}{more}"


def about(models: Models) -> str:
    """What is compared, in a sentence."""
    if models.patched is not None:
        return "The patched checkpoint beside the model that it was trained from."
    if models.methods:
        methods = ", ".join(map(str, models.methods.values()))
        return f"The checkpoint beside itself with {methods}, which was not trained."
    return "The checkpoint beside itself with what is chosen here, which was not trained."
