"""Shapes in the signatures of em_core are checked while the tests run; what was skipped is told."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
hook = install_import_hook("em_core", "beartype.beartype")

HOST_TESTS = "tests/host/"
EVALUATE_TESTS = ("tests/core/test_encoders.py", "tests/core/test_evaluate.py")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last line says whether the nodes were tested inside ComfyUI, and if not, why."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    compared = [r for r in reporter.stats.get("skipped", ()) if r.nodeid.startswith(EVALUATE_TESTS)]
    if compared:
        why = {str(report.longrepr[2]).removeprefix("Skipped: ") for report in compared}
        reporter.write_line(
            f"Measures of pictures: {len(compared)} tests were SKIPPED. {' '.join(sorted(why))}",
            red=True,
        )
    without_ray = [r for r in reporter.stats.get("skipped", ()) if "test_ray" in r.nodeid]
    if without_ray:
        reporter.write_line(
            'Ray: its tests were SKIPPED. Install it: pip install -e ".[ray]"', red=True
        )
    reports = {
        kind: [r for r in reporter.stats.get(kind, ()) if r.nodeid.startswith(HOST_TESTS)]
        for kind in ("passed", "failed", "skipped")
    }
    ran, skipped = len(reports["passed"]) + len(reports["failed"]), reports["skipped"]
    if skipped:
        reasons = {str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped}
        reporter.write_line(
            f"ComfyUI: {len(skipped)} host tests were SKIPPED, {ran} ran. {' '.join(sorted(reasons))}",
            red=True,
        )
    elif ran:
        reporter.write_line(f"ComfyUI: all {ran} host tests ran, none was skipped.")
