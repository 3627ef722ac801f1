"""How the tests run: on the CPU unless told otherwise, compiled fast rather than to run fast.

Most of their time is compilation. LLVM's optimisations are half of it, and XLA's emitters by fusion
half of what remains. JAX 0.10 can do without these too; it is told by a flag that libtpu, which
reads the same variable later, does not know, so that the flag is gone when the backend has it.

At the end of a run stands the CPU time of each folder, that of processes it started included.
"""

import collections
import os
from importlib.metadata import version

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
if version("jax").startswith("0.10."):
    import jax

    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.devices("cpu")
    os.environ["XLA_FLAGS"] = flags


def cpu_seconds():
    """Of this process and of those it started that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item):
    item.user_properties.append(("cpu_started", cpu_seconds()))
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item):
    yield
    started = dict(item.user_properties)["cpu_started"]
    item.user_properties.append(("cpu", cpu_seconds() - started))


def pytest_terminal_summary(terminalreporter):
    """CPU seconds by folder, from the reports of all workers."""
    spent = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                folder = "/".join(report.nodeid.split("::")[0].split("/")[:-1])
                spent[folder] += dict(report.user_properties).get("cpu", 0.0)
    if spent:
        parts = ", ".join(f"{folder} {n:.0f} s" for folder, n in spent.most_common())
        terminalreporter.write_line(f"CPU time: {sum(spent.values()):.0f} s ({parts})")
