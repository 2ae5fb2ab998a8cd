"""Processes that a killed launcher leaves behind stop by themselves."""

import os
import subprocess
import sys

import pytest

WORKER = """
import time
from tokenizer.stop import check_launcher
print("ready", flush=True)
for _ in range(100):
    check_launcher()
    time.sleep(0.05)
print("still there")
"""


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_process_stops_where_torchrun_was_killed(by_torchrun: bool) -> None:
    """One that was not started by a launcher outlives its parent, as `nohup` has it."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    if by_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    launcher = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, WORKER],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.kill()
    stdout, stderr = launcher.communicate(timeout=60)
    assert (stdout == "") == by_torchrun
    assert ("error: the launcher of this process was killed" in stderr) == by_torchrun
