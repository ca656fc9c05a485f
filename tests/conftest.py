"""Shapes in the signatures of em_core are checked while the tests run."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
hook = install_import_hook("em_core", "beartype.beartype")
