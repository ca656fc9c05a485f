"""Default settings for each family of models."""

from dataclasses import replace

from .masks.crf import DEMO
from .masks.settings import MaskSettings
from .settings import EMSettings, JointSettings, VisualSettings, WeightKind

DEMO_FAMILY = "sd-64"


def em_settings(family: str) -> EMSettings:
    """Return the EM loop's defaults for a family.

    SD 1.x, SD 2.x and SDXL have the defaults of :class:`EMSettings`; what their docstrings give as a
    paper's value is that paper's. Masks are read from 16x16 cells and finer, which at 512 px are SD
    1.x's and 2.x's 16, 32 and 64, and at 1024 px SDXL's 32 and 64, as it has no others.

    The demo model's token vectors are small and need larger steps, and its objects are a tenth of a
    picture. Its peak is the maximum, since its maps have 256 cells. In each family the rates are full
    for as many steps as the defaults have, and fall after that.
    """
    if family != DEMO_FAMILY:
        return EMSettings()
    return EMSettings(
        steps=120,
        learning_rate=0.02,
        decay_after=120,
        batch=2,
        generic_word="thing",
        attention_weight=0.2,
        masks=MaskSettings(peak=1.0, threshold=0.2, crf=DEMO, rivals=" and a thing"),
    )


def joint_settings(family: str, kind: WeightKind = "none") -> JointSettings:
    """Return the defaults of a kind of joint phase for a family.

    The demo model's text encoder has two layers and learns as fast as its UNet.
    """
    if family != DEMO_FAMILY:
        return JointSettings(kind)
    rate = 1e-3 if kind == "lora" else 3e-4
    return JointSettings(
        kind,
        steps=100,
        learning_rate=rate,
        text_learning_rate=rate,
        token_learning_rate=2e-3,
        decay_after=100,
        alpha=1.0,
    )


def visual_settings(family: str) -> VisualSettings:
    """Return the visual condition's defaults for a family.

    The demo model's blocks are narrow and need larger steps.
    """
    if family != DEMO_FAMILY:
        return VisualSettings()
    return VisualSettings(steps=200, batch=2, learning_rate=3e-4)


def vico(
    em: EMSettings, visual: VisualSettings, batch: int = 4
) -> tuple[EMSettings, VisualSettings]:
    """Return settings of both phases that follow ViCo as it was published.

    Tokens start from their words and are learned together with randomly initialised blocks; there are
    no masks on the loss. Prompts are the examples' own, where ViCo draws one of some eighty templates.

    Args:
        em: settings for what ViCo leaves open, such as the side of pictures.
        visual: the number of steps is taken from it.
        batch: noise samples per step; ViCo's 1 on each of 4 cards. The tokens' learning rate grows with
            it.
    """
    published = VisualSettings(
        steps=visual.steps,
        batch=batch,
        learning_rate=1e-5,
        token_learning_rate=5e-3 * batch,
        token_weight_decay=0.01,
        after_em=False,
        zero_init=False,
        key_masks="otsu",
        gated=False,
        reference_gradient=True,
        end_of_text_weight=5e-4,
        disturb=False,
        own_prompts=True,
    )
    return replace(em, mode="none", flip=False, end_of_text_weight=0.0), published


def literal(settings: EMSettings) -> EMSettings:
    """Return settings that follow VCD to the letter.

    Masks are read from all timesteps and layers, and again after every step from one new timestep.
    The threshold, which VCD leaves open, is 0.4, as in DAAM.
    """
    masks = replace(
        settings.masks,
        timesteps=(0.0, 1.0),
        soft=False,
        all_layers=True,
        peak=1.0,
        threshold=0.4,
        regions=None,
        rivals="",
        orders=False,
        naming_passes=0,
        presence_passes=0,
        acceptance=0.0,
    )
    return replace(
        settings,
        generic_word="",
        decay_after=None,
        e_step_every=1,
        refresh=1,
        free_statistics=False,
        masks=masks,
    )
