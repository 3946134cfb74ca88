"""The processes of a pool end with the command that started them, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import os, time
from sp_yolo.experiments.compare.pools import local_pool

if __name__ == "__main__":
    with local_pool(2) as pool:
        print(pool.executor.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_processes_of_a_killed_command_end(tmp_path: object) -> None:
    script = f"{tmp_path}/command.py"
    with open(script, "w", encoding="utf-8") as file:
        file.write(COMMAND)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert command.stdout is not None
    worker = int(command.stdout.readline())
    assert alive(worker)
    command.send_signal(signal.SIGKILL)
    command.wait()
    for _ in range(600):
        if not alive(worker):
            break
        time.sleep(0.1)
    assert not alive(worker)
