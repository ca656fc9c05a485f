"""The bundled workflows, described."""

from templates.checkpoints import CHECKPOINTS
from templates.demo import DEMO
from templates.masked import MASKED

ALL = (*DEMO, *CHECKPOINTS, *MASKED)
