"""Runs commands of vissl_ext.launch one after another, each in a fork of one process that has VISSL imported.

Reads a JSON list of {"argv": [...], "folder": ..., "kill_when": a file's path, or absent} from standard input, and
writes a list of {"status": ..., "output": ...} to standard output. A child is killed as soon as that file is there, and
after 120 seconds in any case.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback


def run(argv, folder):
    """In the child: what ``python -m vissl_ext.launch`` does."""
    os.chdir(folder)
    sys.argv = ["launch", *argv]
    try:
        runpy.run_module("vissl_ext.launch", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(child, kill_when):
    """Wait for a child; its exit status, or minus the signal that it was killed with."""
    began = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if (kill_when and os.path.exists(kill_when)) or time.monotonic() - began > 120:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def main():
    """Run all."""
    import vissl_ext.checks
    import vissl_ext.compose
    import vissl_ext.ranks  # noqa: F401

    results = []
    for job in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                status = run(job["argv"], job["folder"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            status = wait(child, job.get("kill_when"))
            output.seek(0)
            results.append({"status": status, "output": output.read()})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
