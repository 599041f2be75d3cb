"""Submission to SLURM: the script, the command, and whole jobs through stand-ins for sbatch, srun and scontrol.

The stand-ins do what SLURM does with a script on one machine: they start its processes with SLURM's variables.
"""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from plugins.tools import slurm

ROOT = Path(__file__).parents[2]

SBATCH = """
import os, re, subprocess, sys
script = sys.argv[1]
flags = dict(re.findall(r"#SBATCH --([a-z-]+)=(.*)", open(script).read()))
nodes, tasks = int(flags["nodes"]), int(flags["ntasks-per-node"])
job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": str(nodes * tasks), "SLURM_NTASKS_PER_NODE": str(tasks),
       "SLURM_NNODES": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "localhost",
       "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": flags["job-name"]}
subprocess.Popen(["bash", script], env={**os.environ, **job}, stdout=open("batch.txt", "w"), stderr=subprocess.STDOUT)
print("Submitted batch job 4242")
"""
SRUN = """
import os, subprocess, sys
out, command = sys.argv[sys.argv.index("--output") + 1], sys.argv[sys.argv.index("--error") + 2:]
tasks, each = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
running = []
for rank in range(tasks):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each), "SLURM_NODEID": str(rank // each)}
    log = open(out.replace("%j", "4242").replace("%t", str(rank)), "ab")
    running.append(subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log))
print(*(process.pid for process in running), flush=True)
sys.exit(max(abs(process.wait()) for process in running))
"""
SCONTROL = "import sys; open('scontrol.txt', 'a').write(' '.join(sys.argv[1:]))"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A machine that seems to have SLURM."""
    monkeypatch.chdir(tmp_path)
    for name, code in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def logs(folder):
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*log*")))


def script(capsys, *arguments):
    assert slurm.main(["--dry-run", *arguments]) == 0
    return capsys.readouterr().out


# The script and the command -------------------------------------------------------------------------------------------

PRETRAIN = ("-m", "solo_ext.main_pretrain", "--config-path", "c", "--config-name", "isoloss.yaml")


def test_dry_run_prints_the_script_and_submits_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = script(
        capsys,
        *("--nodes", "2", "--gpus-per-node", "8", "--time", "1-02:30:00", "--partition", "gpu", "--mem", "64GB"),
        *("--cpus-per-task", "6", "--sbatch", "account=me", "--", *PRETRAIN),
    )
    for flag in (
        *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=1590", "partition=gpu", "mem=64GB"),
        *("cpus-per-task=6", "account=me", "signal=USR2@90"),
    ):
        assert f"#SBATCH --{flag}\n" in text
    assert "\nsrun " in text
    assert text.rstrip().endswith(
        "-m solo_ext.main_pretrain --config-path c --config-name isoloss.yaml "
        "++devices=8 ++num_nodes=2 ++auto_resume.enabled=True"
    )
    assert list(tmp_path.iterdir()) == []


def test_one_process_for_each_gpu_or_as_asked(capsys):
    assert "--ntasks-per-node=4\n" in script(capsys, "--gpus-per-node", "4", "--", "train.py")
    text = script(capsys, "--gpus-per-node", "4", "--tasks-per-node", "1", "--", "train.py")
    assert "--ntasks-per-node=1\n" in text
    assert "--gpus-per-node=4\n" in text
    assert "gpus" not in script(capsys, "--tasks-per-node", "2", "--", "train.py")


def test_other_commands_stay_as_they_are():
    for arguments in (["train.py", "devices=3"], ["-m", "vissl_ext.launch"], ["-c", "pass"]):
        assert slurm.complete(arguments, nodes=2, tasks_per_node=4) == arguments


@pytest.mark.parametrize("given", ["devices=2", "++devices=2", "devices=[0,1]", "+devices='0,1'"])
def test_what_the_command_says_of_the_job_is_kept(given):
    completed = slurm.complete([*PRETRAIN, given], nodes=1, tasks_per_node=2)
    assert completed == [*PRETRAIN, given, "++num_nodes=1", "++auto_resume.enabled=True"]


def test_resuming_can_be_switched_off():
    completed = slurm.complete([*PRETRAIN, "auto_resume.enabled=False"], nodes=1, tasks_per_node=1)
    assert not any(argument.startswith("++auto_resume") for argument in completed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no command; give the arguments of python after --"),
        (["--"], "there is no command; give the arguments of python after --"),
        (["train.py"], "unrecognized arguments: train.py"),
        (["--time", "soon", "--", "x"], "argument --time: must be [D-]HH:MM:SS or minutes, got 'soon'"),
        (["--time", "0", "--", "x"], "argument --time: must be at least a minute, got '0'"),
        (["--nodes", "0", "--", "x"], "argument --nodes: must be an integer, at least 1, got '0'"),
        (["--sbatch", "account", "--", "x"], "argument --sbatch: must be KEY=VALUE, got 'account'"),
        (
            ["--cluster", "local", "--nodes", "2", "--", "x"],
            "--cluster local runs on one machine: --nodes must be 1, got 2",
        ),
        (
            ["--gpus-per-node", "8", "--", *PRETRAIN, "devices=4"],
            "the command sets devices=4, but the job has devices=8; remove devices from the command",
        ),
        (
            ["--nodes", "2", "--", *PRETRAIN, "++num_nodes=3"],
            "the command sets num_nodes=3, but the job has num_nodes=2; remove num_nodes from the command",
        ),
        (["--", "x"], "srun is not installed; submit from a node of the cluster, or use --cluster local"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.main(arguments) == 2
    hint = "; see --help" if message.startswith(("argument ", "unrecognized ")) else ""
    assert capsys.readouterr().err == f"error: {message}{hint}\n"
    assert list(tmp_path.iterdir()) == []


# Jobs on this machine -------------------------------------------------------------------------------------------------

SUM = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print("sum", total.item(), "of", dist.get_world_size(), flush=True)
"""


@pytest.mark.slow
def test_two_local_processes_find_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert slurm.main(["--cluster", "local", "--tasks-per-node", "2", "--time", "10", "--", "-c", SUM]) == 0
    assert "sum 3.0 of 2" in capsys.readouterr().out
    assert "sum 3.0 of 2" in next((tmp_path / "slurm").glob("*_1_log.out")).read_text()


def test_a_failing_local_command_sets_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = "print('the reason', flush=True); raise SystemExit(3)"
    assert slurm.main(["--cluster", "local", "--", "-c", code]) == 1
    output = capsys.readouterr()
    assert "the reason" in output.out
    assert "error: the job failed" in output.err


# Jobs through SLURM's stand-ins ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_nodes_find_each_other(cluster, capsys):
    assert slurm.main(["--nodes", "2", "--time", "10", "--", "-c", SUM]) == 0
    assert "job 4242 is submitted" in capsys.readouterr().out
    wait_for(lambda: logs(cluster / "slurm").count("sum 3.0 of 2") == 2)


def test_a_job_that_is_out_of_time_is_put_into_the_queue_again(cluster):
    """The signal is sent to all processes: submitit requeues the job and ends the command."""
    code = (
        "import os, signal, time; assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN\n"
        "open('command.txt', 'w').write(str(os.getpid())); time.sleep(1000)"
    )
    assert slurm.main(["--time", "60", "--", "-c", code]) == 0
    command = cluster / "command.txt"
    wait_for(lambda: command.exists() and command.read_text())
    os.kill(int(command.read_text()), signal.SIGUSR2)
    os.kill(int((cluster / "batch.txt").read_text()), signal.SIGUSR2)
    wait_for((cluster / "scontrol.txt").exists)
    assert (cluster / "scontrol.txt").read_text() == "requeue 4242"
    wait_for(lambda: not Path(f"/proc/{command.read_text()}").exists())
    # what SLURM would start again is there
    assert (cluster / "slurm" / "4242_submitted.pkl").is_file()


@pytest.mark.slow
@pytest.mark.solo
def test_pretraining_on_two_nodes(cluster, thin_digits):
    """One epoch of IsoLoss on a few digits: Lightning takes ranks, nodes and devices from SLURM's variables."""
    digits = thin_digits(40, 20)
    arguments = [
        *("--config-path", str(ROOT / "configs" / "solo" / "digits"), "--config-name", "isoloss.yaml"),
        *(
            f"data.train_path={digits}/train",
            f"data.val_path={digits}/val",
            "optimizer.batch_size=16",
            "++max_epochs=1",
        ),
        *("++check_val_every_n_epoch=1", "checkpoint.dir=runs", "method_kwargs.proj_hidden_dim=32"),
        *("method_kwargs.proj_output_dim=16",),
    ]
    job = ["--nodes", "2", "--time", "10", "--", "-m", "solo_ext.main_pretrain", *arguments]
    assert slurm.main(job) == 0

    def completed():
        return logs(cluster / "slurm").count("Job completed") == 2

    wait_for(lambda: completed() or "error" in logs(cluster / "slurm").lower())
    assert completed(), logs(cluster / "slurm")
    (run,) = (cluster / "runs" / "isoloss").iterdir()
    args = json.loads((run / "args.json").read_text())
    assert (args["num_nodes"], args["devices"]) == (2, 1)
    assert args["optimizer"]["lr"] == pytest.approx(0.008 * 16 * 2 / 256)
    assert len(list(run.glob("*.ckpt"))) == 1
    assert json.loads((run / "pretrain.json").read_text())["epochs"] == 1
