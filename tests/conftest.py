"""Shared by all tests: paths, no network, a fixed seed, and a table of what the golden tests measured."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")              # models so small that threads cost more than they save
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402

import golden_cases  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """What each golden test measured: largest difference, and its share of the manifest's bound."""
    if golden_cases.REPORT:
        terminalreporter.section("golden: largest difference, share of the bound")
        for method, kind, file, tensors, worst, share in sorted(golden_cases.REPORT):
            terminalreporter.write_line(f"{method:8} {kind:17} {file:34} {tensors:4} compared  {worst:9.2e}  "
                                        f"{share:8.2%}")
