"""Runs `gossamer train` again and again, in forks of a process that has imported everything, and
kills them: a start that takes 5 s would take most of the kills.

Reads a JSON object per line: `argv` of gossamer, `log` to write to, and when to kill it: `after` so
many seconds (once `written`, a file, is there anew), or as it gives a file its name, at the
`rename`th time, `before` that or after. Writes what came of it: the exit code, or -9.
"""

import json
import os
import signal
import sys
import time

import torch

from gossamer.train import data, flags, html, run  # noqa: F401
from gossamer.train.cli import main

WAIT = os.WEXITED | os.WNOHANG | os.WNOWAIT


def killing_rename(count, before):
    """os.replace, which does not survive the call number `count`."""
    replace, calls = os.replace, 0

    def dying(source, target):
        nonlocal calls
        calls += 1
        if calls == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


def wait_for(path, child):
    """Until the file has been written anew, or the child has ended."""

    def stamp():
        return os.stat(path).st_mtime_ns if os.path.exists(path) else 0

    before = stamp()
    while stamp() == before and not os.waitid(os.P_PID, child, WAIT):
        time.sleep(0.002)


def work(job):
    """In the child: never returns."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "rename" in job:
        killing_rename(job["rename"], job["before"])
    code = 70
    try:
        code = main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    torch.set_num_threads(1)
    data.load_data("digits")  # scikit-learn takes a second
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            work(job)
        if "written" in job:
            wait_for(job["written"], child)
        if "after" in job:
            time.sleep(job["after"])
            os.kill(child, signal.SIGKILL)
        started = time.monotonic()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        sys.stdout.write(json.dumps({"code": code, "seconds": time.monotonic() - started}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
