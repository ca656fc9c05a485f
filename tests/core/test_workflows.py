"""The bundled workflows, as far as their files tell."""

import json
import uuid
from pathlib import Path

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))


def test_ids_are_those_that_the_front_end_takes() -> None:
    """A UUID each, no two alike: at any other id v0.8.0's front end shows an alert that stays."""
    ids = [json.loads(file.read_text(encoding="utf-8"))["id"] for file in WORKFLOWS]
    assert ids and len({uuid.UUID(each) for each in ids}) == len(ids)
