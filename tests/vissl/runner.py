"""Runs commands of vissl_ext.launch one after another, each in a fork of one process that has VISSL imported.

Reads jobs from standard input, each a line of JSON, and answers each with a line {"status": ..., "output": ...,
"left": ...}; "left" is whether a process that the command started outlived it. A job is {"argv": [...],
"folder": ...}, and may have a signal that is sent as soon as a file is there: {"when": the file's path,
"signal": "SIGKILL"}. With "group" it goes to all processes of the command, as a terminal's Ctrl-C does. With "watch"
the hooks and the trunk of in_ranks/watched.py are there, and ranks are forked, not started anew; the rank "kill_rank"
is killed after a step, and the rows whose quality is logged go to the folder "rows". With "toys" the method of
in_ranks/toys.py is there. With "largest_file" no file can have more bytes than that. All processes are killed after 300
seconds.
"""

import gc
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback


def run(job):
    """Run ``python -m vissl_ext.launch`` in the child process."""
    os.chdir(job["folder"])
    sys.argv = ["launch", *job["argv"]]
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job.get("toys"):
        toys.install()
    if job.get("watch"):
        watched.install(job.get("kill_rank"), job.get("rows"))
    try:
        runpy.run_module("vissl_ext.launch", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(child, job):
    """Wait for a child; its exit status, or minus the signal that ended it."""
    began = time.monotonic()
    when, number = job.get("when"), getattr(signal, job.get("signal", "SIGKILL"))
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if when and os.path.exists(when):
            when = None
            (os.killpg if job.get("group") else os.kill)(child, number)
        if time.monotonic() - began > 300:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def left(child):
    """Whether a process of a child's group is there two minutes after its end; they are killed then.

    A fork server whose launcher was killed ends when it has imported what it hands down, and unloaded it again. That
    takes seconds of processor time, and many times as long on a busy machine.
    """
    for _ in range(12000):
        try:
            os.killpg(child, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    return True


def main():
    """Run all."""
    import setuptools  # noqa: F401 - each run imports it and the next one
    import torch.utils.cpp_extension  # noqa: F401

    import vissl_ext.checks
    import vissl_ext.ranks  # noqa: F401
    from plugins.testing import read_yaml_fast
    from vissl_ext.compose import compose, defaults

    global toys, watched
    sys.path.append(os.path.join(os.path.dirname(__file__), "in_ranks"))
    import toys
    import watched

    read_yaml_fast()
    defaults()
    compose(["config=pretrain/isoloss/digits"])
    gc.collect()
    gc.freeze()  # VISSL collects garbage several times in each run, which would copy all pages

    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                status = run(job)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            os.setpgid(child, child)  # both set it, whoever is first
            status = wait(child, job)
            output.seek(0)
            print(json.dumps({"status": status, "output": output.read(), "left": left(child)}), flush=True)


if __name__ == "__main__":
    main()
