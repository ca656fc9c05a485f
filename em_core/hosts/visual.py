"""A visual condition in diffusers' own sampling loop."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Notice
from ..model.protocol import Conditioning
from ..model.visual_drawing import Seen, Viewer, VisualUse


def say_unseen(use: VisualUse) -> str:
    """What to tell where a prompt has none of a condition's concepts."""
    return (
        f"The prompt has none of the visual condition's concepts ({', '.join(use.concepts) or 'none'}), so the "
        "condition does not act. (ViCo would look at the end of the text instead.) Write <name> in the prompt."
    )


@contextmanager
def looking(host: Any, use: VisualUse | None, encoded: Conditioning, count: int) -> Iterator[None]:
    """Let a condition act in the UNet's passes while the context is open.

    Args:
        host: the diffusers host.
        use: the condition; None is none.
        encoded: the empty prompt and the prompt.
        count: number of pictures in each half of a pass.
    """
    if use is None or use.strength == 0:
        yield
        return
    stream = encoded.streams["text"]
    columns = stream.columns[1]
    if not set(use.concepts) & set(columns):
        warnings.warn(say_unseen(use), Notice, stacklevel=4)
        yield
        return
    viewer = Viewer(use, host.unet, host.image_places)
    last, inside = float(len(host.schedule.alphas_cumprod) - 1), False

    def seen(half: int, t: Tensor) -> Seen:
        def run(latent: Tensor) -> None:
            host.predict(latent.to(host.device), t.reshape(1), encoded.rows([half]))

        return viewer.look(run, columns, stream.length)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal inside
        if inside:
            return
        x, t = args[0], torch.as_tensor(args[1]).flatten()[0].to(host.device).float()
        if not use.acts_at(float(t), last):
            viewer.chunks = ()
            return
        inside = True
        try:
            conditional = seen(1, t)
            halves = len(x) // count
            if halves == 1:
                viewer.chunks = (conditional,)
            else:
                viewer.chunks = (seen(0, t) if use.own_prompts else conditional, conditional)
        finally:
            inside = False

    handle = host.unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with viewer.attached():
            yield
    finally:
        handle.remove()
