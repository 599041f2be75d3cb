"""Runs commands of vissl_ext.launch one after another, each in a fork of one process that has VISSL imported.

Reads a JSON list of {"argv": [...], "folder": ..., "kill": seconds or null} from standard input, and writes a list of
{"status": ..., "output": ..., "seconds": ...} to standard output.
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


def main():
    """Run all."""
    import vissl_ext.checks
    import vissl_ext.compose
    import vissl_ext.ranks  # noqa: F401

    results = []
    for job in json.load(sys.stdin):
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                status = run(job["argv"], job["folder"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            wait = job.get("kill_when")
            while wait and not os.path.exists(wait):
                if os.waitpid(child, os.WNOHANG)[0]:
                    child = None
                    break
                time.sleep(0.005)
            if wait and child:
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else None
            output.seek(0)
            text = output.read()
        results.append({"status": status, "output": text, "seconds": time.perf_counter() - began})
        print(job["argv"][:1], status, file=sys.stderr)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
