"""Suites on a cluster: what is submitted to SLURM, states of the runs, requeueing, and jobs on this machine.

Stand-ins for sbatch, srun, squeue, sacct and scontrol are on PATH. The suite ``stub`` has commands that take no time.
The processes of the jobs know it too: Python imports ``sitecustomize``, which defines it, at each start.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plugins.experiments import cluster, status
from plugins.experiments import run as experiments
from plugins.experiments.suites import Progress, Run, Step, runner

ROOT = Path(__file__).parents[2]
MAIN = ("-m", "plugins.experiments", "stub")

SUITE = """
import json
from pathlib import Path
from plugins.experiments import run as experiments
from plugins.experiments.suites import Progress, Run, Step, Suite

COUNT = "import sys; open(sys.argv[1], 'a').write('x')"
SCORE = '''
import os, sys, time
while os.path.exists("wait"):
    time.sleep(0.02)
open(sys.argv[1], "w").write("90")
'''

def make(request, method, seed, needs=(), gpus=0, broken=False):
    folder = request.out / "stub" / "solo" / method / f"seed{seed}"
    score = "print('the reason'); raise SystemExit(3)" if broken else SCORE
    steps = (Step("count", ("-c", COUNT, str(folder / "count"))), Step("score", ("-c", score, str(folder / "score"))))
    return Run("solo", method, "toy", seed, folder, steps, collect, needs=needs, gpus=gpus, progress=progress)

def collect(run):
    return {"knn": float((run.folder / "score").read_text())}

def progress(folder):
    return Progress(3, 10, 0.25, 41.5) if (folder / "count").is_file() else None

def runs(request):
    return [run for seed in request.seeds for run in (
        make(request, "base", seed),
        make(request, "heir", seed, needs=(f"solo/base/seed{seed}",)),
        make(request, "large", seed, gpus=2),
        make(request, "broken", seed, broken=True))]

REPORT = ("-c", "import sys; print('report', sys.argv[1])")
experiments.SUITES["stub"] = Suite("stub", "stub", {"solo": runs}, report=REPORT)
"""
# Each array becomes a file job<number>.sh. If "execute" exists, its first task is also started, with SLURM's variables.
SBATCH = """
import glob, os, subprocess, sys, time
if os.path.exists("reject"):
    sys.exit("sbatch: error: invalid partition specified: gpu")
time.sleep(0.2)
number = 4242 + len(glob.glob("job*.sh"))
script = open(sys.argv[1]).read()
open(f"job{number}.sh", "x").write(script)
print(f"Submitted batch job {number}")
if os.path.exists("execute"):
    job = {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1",
           "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NAME": "ssl-stub"}
    subprocess.Popen(["bash", f"job{number}.sh"], env={**os.environ, **job}, stdout=open("batch.txt", "w"),
                     stderr=subprocess.STDOUT)
"""
SRUN = """
import os, subprocess, sys
out, command = sys.argv[sys.argv.index("--output") + 1], sys.argv[sys.argv.index("--error") + 2:]
log = open(out.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0"), "ab")
task = subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, stdout=log, stderr=log)
open("task.txt", "w").write(str(task.pid))
sys.exit(abs(task.wait()))
"""
QUEUE = """
import os, sys
name = os.path.basename(sys.argv[0])
open(f"{name}.calls", "a").write(" ".join(sys.argv[1:]) + "\\n")
if not os.path.exists(f"{name}.txt"):
    sys.exit("slurm_load_jobs error: Invalid job id specified")
print(open(f"{name}.txt").read(), end="")
"""
SCONTROL = "import sys; open('scontrol.txt', 'a').write(' '.join(sys.argv[1:]))"
PROGRAMS = {"sbatch": SBATCH, "srun": SRUN, "squeue": QUEUE, "sacct": QUEUE, "scontrol": SCONTROL}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The suite ``stub``, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(SUITE)
    monkeypatch.setattr(experiments, "SUITES", {})
    exec(SUITE, {"__name__": "stub"})
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.02)
    return tmp_path


@pytest.fixture
def slurm(stub, monkeypatch):
    """A machine that seems to have SLURM."""
    for name, code in PROGRAMS.items():
        program = stub / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable} -S\n{code}")  # -S: without sitecustomize
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{stub / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return stub


def flags(number):
    """The options of a submitted script."""
    text = Path(f"job{number}.sh").read_text()
    return dict(re.findall(r"#SBATCH --([a-z-]+)(?:=(.*))?", text))


def folder(method, seed=0):
    return Path(f"results/stub/solo/{method}/seed{seed}")


def job_of(method, seed=0):
    return json.loads((folder(method, seed) / "job.json").read_text())


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def status_of(capsys, *options):
    """State and note of each run in the table of --status, and the line below it."""
    capsys.readouterr()
    assert experiments.main(["stub", "--status", *options]) == 0
    *rows, _, totals = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    return {row[0].split("/")[1]: row[1:] for row in cells}, totals


# Submission to SLURM --------------------------------------------------------------------------------------------------


def test_runs_become_arrays_by_resources_and_a_run_depends_on_what_it_needs(slurm, capsys):
    options = ("--partition", "gpu", "--time", "2:00:00", "--cpus", "8", "--mem", "64GB", "--jobs", "3")
    more = ("--sbatch", "account=me", "--sbatch", "qos=long")
    assert experiments.main(["stub", "--seeds", "2", "--cluster", "slurm", *options, *more]) == 0
    arrays = [flags(number) for number in (4242, 4243, 4244, 4245)]
    for found in arrays:
        wanted = {
            "partition": "gpu",
            "time": "120",
            "cpus-per-task": "8",
            "mem": "64GB",
            "account": "me",
            "qos": "long",
        }
        assert wanted.items() <= found.items()
        assert {
            "job-name": "ssl-stub",
            "nodes": "1",
            "ntasks-per-node": "1",
            "signal": "USR2@90",
        }.items() <= found.items()
        assert "requeue" in found
    # base and broken of two seeds; those that need two GPUs; each heir after its base
    assert [found.get("array") for found in arrays] == ["0-3%3", "0-1%2", None, None]
    assert [found.get("gpus-per-node") for found in arrays] == [None, "2", None, None]
    assert [found.get("dependency") for found in arrays] == [None, None, "afterok:4242_0", "afterok:4242_2"]
    assert [found.get("kill-on-invalid-dep") for found in arrays] == [None, None, "yes", "yes"]
    assert [job_of("base", 1)["id"], job_of("large")["id"], job_of("heir", 1)["id"]] == ["4242_2", "4243_0", "4245"]
    assert "submitted 1 run as job 4245, which starts after 4242_2" in capsys.readouterr().out
    assert not Path("squeue.calls").exists()  # nothing was submitted before


def test_submitting_again_skips_finished_and_queued_runs(slurm, capsys):
    assert experiments.main(["stub", "--cluster", "slurm"]) == 0
    first = len(list(slurm.glob("job*.sh")))
    # base waits, broken (4242_1) has left the queue without a result, large is finished, heir waits for its dependency
    Path("squeue.txt").write_text("4242_0|PENDING|Priority\n4244|PENDING|Dependency\n")
    Path("sacct.txt").write_text("4242_1|TIMEOUT\n")
    (folder("large") / "result.json").write_text("{}")
    capsys.readouterr()
    assert experiments.main(["stub", "--cluster", "slurm"]) == 0
    output = capsys.readouterr().out
    assert len(list(slurm.glob("job*.sh"))) == first + 1
    assert "solo/base/seed0: skipped, queued: job 4242_0 (priority)" in output.lower()
    assert "solo/large/seed0: skipped, finished before" in output
    assert "submitted 1 run as job 4245" in output
    assert job_of("broken")["id"] == "4245"
    assert "--jobs=4242,4244" in Path("squeue.calls").read_text()  # those of the unfinished runs, in one call
    # a suite on this machine leaves them alone too
    Path("squeue.txt").write_text("4242_0|PENDING|Priority\n4244|PENDING|Dependency\n4245|RUNNING|None\n")
    assert experiments.main(["stub"]) == 0
    assert not (folder("base") / "steps.json").exists()


def test_a_dependency_on_a_job_that_is_in_the_queue(slurm):
    assert experiments.main(["stub", "--cluster", "slurm", "--only", "base"]) == 0
    Path("squeue.txt").write_text("4242|RUNNING|None\n")
    assert experiments.main(["stub", "--cluster", "slurm", "--only", "heir"]) == 0
    assert flags(4243)["dependency"] == "afterok:4242"


def test_two_submissions_at_the_same_time_submit_each_run_once(slurm):
    Path("squeue.txt").write_text(
        "".join(f"{n}_{i}|PENDING|None\n{n}|PENDING|None\n" for n in range(4242, 4250) for i in (0, 1))
    )
    command = [sys.executable, *MAIN, "--cluster", "slurm"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(list(slurm.glob("job*.sh"))) == 3
    assert sorted(output.count("submitted") for output in outputs) == [0, 3]
    assert sorted(output.count("skipped, queued") for output in outputs) == [0, 4]


def test_a_rejected_submission_leaves_no_claim(slurm, capfd):
    Path("reject").touch()
    assert experiments.main(["stub", "--cluster", "slurm", "--partition", "gpu"]) == 2
    error = capfd.readouterr().err
    assert error == "error: sbatch did not accept 2 jobs: sbatch: error: invalid partition specified: gpu\n"
    assert not list(slurm.rglob("job.json"))


def test_dry_run_prints_the_scripts(stub, capsys):
    assert experiments.main(["stub", "--cluster", "slurm", "--dry-run", "--gpus", "1"]) == 0
    output = capsys.readouterr().out
    assert "#SBATCH --array=0-1%2\n" in output
    assert output.count("#SBATCH --gpus-per-node=1\n") == 3
    assert "#SBATCH --dependency=afterok:JOB_OF_solo/base/seed0\n" in output
    assert f"# {sys.executable} -m plugins.experiments stub --framework solo --data-folder datasets" in output
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--partition", "gpu"],
            "--partition is an option of SLURM's jobs; add --cluster slurm, or remove --partition",
        ),
        (
            ["--cluster", "local", "--mem", "1GB"],
            "--mem is an option of SLURM's jobs; add --cluster slurm, or remove --mem",
        ),
        (
            ["--gpus", "1"],
            "--gpus is an option of jobs; add --cluster slurm or --cluster local, or remove --gpus",
        ),
        (["--cluster", "slurm"], "srun is not installed; submit from a node of the cluster, or use --cluster local"),
    ],
)
def test_mistakes_are_one_line(stub, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", str(stub))
    assert experiments.main(["stub", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("results").exists()


def test_without_submitit_the_error_names_the_package(stub, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "plugins.tools.slurm", raising=False)
    monkeypatch.delattr("plugins.tools.slurm", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert experiments.main(["stub", "--cluster", "local"]) == 2
    wanted = 'submitit is not installed; install it with: pip install "ssl-plugins[cluster]"'
    assert capsys.readouterr().err == f"error: --cluster needs submitit: {wanted}\n"


# States ---------------------------------------------------------------------------------------------------------------


def test_status_of_each_state_on_a_cluster(slurm, capsys):
    assert status_of(capsys)[1] == "4 runs: 4 to do"
    assert experiments.main(["stub", "--cluster", "slurm"]) == 0
    Path("squeue.txt").write_text("4242_0|RUNNING|None\n4242_1|PENDING|Priority\n4244|PENDING|Dependency\n")
    Path("sacct.txt").write_text("4242_0|RUNNING\n4243|CANCELLED by 7\n")
    (folder("base") / "count").touch()
    rows, totals = status_of(capsys)
    assert rows["base"] == ["running", "3/10", "0.25", "online 41.5", "job 4242_0"]
    assert rows["broken"] == ["queued", "–", "–", "–", "job 4242_1 (Priority)"]
    assert rows["heir"] == ["queued", "–", "–", "–", "job 4244 (Dependency)"]
    assert rows["large"][0] == "failed"
    assert rows["large"][-1] == "job 4243 cancelled by 7; log: results/stub/jobs/4243_0_log.out"
    assert totals == "4 runs: 1 running, 2 queued, 1 failed"
    # without accounting, and when squeue has forgotten all jobs
    Path("squeue.txt").unlink()
    Path("sacct.txt").unlink()
    rows, _ = status_of(capsys)
    assert rows["large"][-1].startswith("job 4243 ended without a result; log: ")
    # a machine of the folder that is not of the cluster
    for name in ("squeue", "sacct"):
        Path("bin", name).unlink()
    rows, totals = status_of(capsys)
    assert rows["base"][0] == "submitted" and "No such file" in rows["base"][-1]
    assert totals == "4 runs: 4 submitted"


@pytest.mark.slow
def test_status_of_each_state_on_this_machine(stub, capsys):
    done = subprocess.run([sys.executable, *MAIN, "--jobs", "1", "--only", "broken"], capture_output=True, text=True)
    assert done.returncode == 1
    Path("wait").touch()
    folder("base").mkdir(parents=True)
    (folder("base") / "failed.json").write_text('{"reason": "of an earlier execution"}')
    process = subprocess.Popen([sys.executable, *MAIN, "--jobs", "1", "--only", "base"], stdout=subprocess.DEVNULL)
    steps = folder("base") / "steps.json"
    wait_for(lambda: steps.is_file() and "score" in json.loads(steps.read_text()))
    rows, totals = status_of(capsys)
    assert rows["base"][:4] == ["running", "3/10", "0.25", "online 41.5"]
    assert re.fullmatch(rf"score, process {process.pid} on \S+", rows["base"][-1])
    assert rows["broken"][0] == "failed"
    assert re.fullmatch(rf"score ended with status 3 after 0:0\d; log: {folder('broken')}/log.txt", rows["broken"][-1])
    assert totals == "4 runs: 1 running, 2 to do, 1 failed"
    # a second suite does not execute what the first one is executing
    assert experiments.main(["stub", "--only", "base"]) == 0
    assert f"solo/base/seed0: skipped, running: score, process {process.pid} on" in capsys.readouterr().out
    process.terminate()
    assert process.wait(timeout=300) == 130
    assert status_of(capsys)[0]["base"][0] == "interrupted"
    Path("wait").unlink()
    assert experiments.main(["stub", "--jobs", "1", "--only", "base"]) == 0
    assert status_of(capsys)[0]["base"] == ["done", "3/10", "0.25", "kNN 90.0", ""]
    assert (folder("base") / "count").read_text() == "x"


def test_status_shows_runs_outside_of_the_sample_that_were_started(stub, capsys, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(experiments.SUITES, "stub", replace(experiments.SUITES["stub"], sample=(("solo", "base"),)))
    folder("large").mkdir(parents=True)
    assert list(status_of(capsys)[0]) == ["base", "large"]


def test_report_is_made_without_running_anything(stub, capfd):
    assert experiments.main(["stub", "--report"]) == 0
    assert capfd.readouterr().out == "report results/stub\n"
    assert not Path("results").exists()


# Jobs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_suite_as_jobs_on_this_machine(stub, capfd):
    assert experiments.main(["stub", "--cluster", "local", "--jobs", "3"]) == 1
    captured = capfd.readouterr()
    assert re.search(r"solo/heir/seed0: finished in \d:\d\d: kNN 90.0", captured.out)
    assert captured.out.index("base/seed0: finished") < captured.out.index("heir/seed0: job")
    assert "solo/broken/seed0: FAILED: score ended with status 3" in captured.out
    assert "3 runs finished, 1 failed" in captured.out
    assert "report results/stub" in captured.out
    assert f"log: {folder('broken')}/log.txt" in captured.err
    assert "the reason" in (folder("broken") / "log.txt").read_text()
    assert not list(stub.rglob("job.json"))
    logs = [log.read_text() for log in Path("results/stub/jobs").glob("*_log.out")]
    assert sum("solo/heir/seed0: finished" in log for log in logs) == 1
    assert (folder("heir") / "count").read_text() == "x"


@pytest.mark.slow
def test_an_interrupt_ends_local_jobs_and_a_second_call_continues(stub):
    Path("wait").touch()
    command = [sys.executable, *MAIN, "--cluster", "local", "--only", "base"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `command &`; a child inherits it
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    steps = folder("base") / "steps.json"
    wait_for(lambda: steps.is_file() and "score" in json.loads(steps.read_text()))
    holder = status.holder(folder("base"), runner.RUN_LOCK)
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert not (folder("base") / "job.json").exists()
    wait_for(lambda: status.holder(folder("base"), runner.RUN_LOCK) is None)
    assert not Path(f"/proc/{holder.split()[1]}").exists() or not _alive(holder.split()[1])
    Path("wait").unlink()
    assert experiments.main(["stub", "--cluster", "local", "--only", "base"]) == 0
    assert (folder("base") / "count").read_text() == "x"


def _alive(number):
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"


def test_a_job_out_of_time_is_requeued_and_the_run_continues(slurm):
    """The job runs through sbatch and srun; the signal comes before the time limit, as SLURM sends it."""
    for name in ("execute", "wait"):
        Path(name).touch()
    assert experiments.main(["stub", "--cluster", "slurm", "--only", "base"]) == 0
    steps = folder("base") / "steps.json"
    wait_for(lambda: steps.is_file() and "score" in json.loads(steps.read_text()))
    os.kill(int(Path("task.txt").read_text()), signal.SIGUSR2)
    wait_for(Path("scontrol.txt").exists)
    assert Path("scontrol.txt").read_text() == "requeue 4242"
    wait_for(lambda: status.holder(folder("base"), runner.RUN_LOCK) is None)
    assert not (folder("base") / "failed.json").exists()
    Path("wait").unlink()
    job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    subprocess.run(["bash", "job4242.sh"], env={**os.environ, **job}, check=True, timeout=300)
    assert json.loads((folder("base") / "result.json").read_text())["knn"] == 90
    assert (folder("base") / "count").read_text() == "x"


def stub_run(out, code="pass"):
    place = out / "method" / "seed0"
    return Run("solo", "method", "toy", 0, place, (Step("only", ("-c", code)),), lambda run: {"knn": 1.0})


def test_a_job_whose_run_was_submitted_again_executes_nothing(tmp_path, capsys):
    run = stub_run(tmp_path)
    token = cluster._claim(run, "slurm")
    cluster._claim(run, "slurm")
    assert cluster.execute(run, token) == 0
    assert "submitted again" in capsys.readouterr().out
    assert not run.result.exists()


def test_a_job_hides_slurm_from_the_commands(tmp_path, monkeypatch):
    """Lightning would take the one task of the job for one of several ranks, unless the job has one of two names."""
    monkeypatch.setenv("SLURM_JOB_NAME", "ssl-stub")
    run = stub_run(tmp_path, "import os; raise SystemExit(os.environ['SLURM_JOB_NAME'] not in ('bash', 'interactive'))")
    assert cluster.execute(run, cluster._claim(run, "slurm")) == 0
    assert run.result.is_file()


def test_a_run_that_another_process_executes_is_skipped(tmp_path):
    run, lines = stub_run(tmp_path), []
    code = (
        "import sys, time; from pathlib import Path; from plugins.tools.process import hold_folder\n"
        "file = hold_folder(Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, str(run.folder), runner.RUN_LOCK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        other.stdout.readline()
        outcome = runner.Runner([run], jobs=1, report_line=lines.append).go()
        assert f"another run (process {other.pid} on" in outcome.skipped[run.name]
        assert status.read_states([run])[0].name == "running"
        other.kill()
    # a run that another process has finished in the meantime
    run.result.write_text("{}")
    assert list(runner.Runner([run], jobs=1, report_line=lines.append).go().skipped) == [run.name]
    assert run.result.read_text() == "{}"


def test_progress_without_an_accuracy():
    state = status.State(
        Run("solo", "m", "toy", 0, Path("nowhere"), (), lambda run: {}, progress=lambda folder: Progress(1, 2)), "to do"
    )
    assert "| 1/2   | –    | –            |" in status.format_table([state])
