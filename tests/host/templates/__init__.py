"""The bundled workflows and blueprints, described."""

from templates.beyond import BEYOND
from templates.blueprints import BLUEPRINTS, blueprint
from templates.checkpoints import CHECKPOINTS
from templates.demo import DEMO
from templates.masked import MASKED

__all__ = ["ALL", "BLUEPRINTS", "blueprint"]

ALL = (*DEMO, *CHECKPOINTS, *MASKED, *BEYOND)
