"""Default settings for each family of models."""

from dataclasses import replace

from .masks.crf import DEMO
from .masks.settings import MaskSettings
from .settings import EMSettings, JointSettings, WeightKind

DEMO_FAMILY = "sd-64"


def em_settings(family: str) -> EMSettings:
    """Return the EM loop's defaults for a family.

    The demo model's token vectors are small and need larger steps.
    """
    if family != DEMO_FAMILY:
        return EMSettings()
    return EMSettings(
        steps=120,
        learning_rate=0.02,
        batch=2,
        attention_weight=0.2,
        generic_word="thing",
        masks=MaskSettings(threshold=0.2, crf=DEMO, rivals=" and a thing"),
    )


def joint_settings(family: str, kind: WeightKind = "none") -> JointSettings:
    """Return the defaults of a kind of joint phase for a family."""
    if family != DEMO_FAMILY:
        return JointSettings(kind)
    rate = 1e-3 if kind == "lora" else 1e-4
    return JointSettings(kind, steps=100, learning_rate=rate, token_learning_rate=2e-3)


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
        threshold=0.4,
        regions=None,
        rivals="",
        acceptance=0.0,
    )
    return replace(
        settings,
        generic_word="",
        e_step_every=1,
        refresh=1,
        free_statistics=False,
        masks=masks,
    )
