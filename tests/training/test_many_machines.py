"""Two machines, as far as the processes can tell: torchrun with a rendezvous, and the variables of SLURM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import REPOSITORY, ROUNDING, TWO, Run, furthest, furthest_weights, newest

from fusion.cli.ray_worker import free_port
from fusion.errors import REQUEUE
from fusion.predictor import Predictor

pytestmark = pytest.mark.slow
NODES = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.strategy.class_path=fusion.training.DDP"]


@pytest.fixture
def on_two_nodes(tiny, tmp_path):
    """Runs fit as two processes, one a node, each started by a command in an environment of its own; gives the run."""

    def run(start):
        arguments = [str(REPOSITORY / "scripts/fit.py"), "--recipe", str(tiny()), f"--runs={tmp_path / 'two'}", *NODES]
        port = str(free_port())
        processes = []
        for node in (0, 1):
            command, environment = start(node, port)
            processes.append(
                subprocess.Popen(
                    [*command, *arguments], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        told = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
        assert "2 devices x 8" in told[0]
        assert "run folder" not in told[1]
        return Run(0, newest(tmp_path / "two"))

    return run


def torchrun(node, port):
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous], {}


def slurm(node, port):
    """What srun sets for a job of two tasks on two nodes."""
    return [sys.executable], {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


@pytest.mark.parametrize("start", [torchrun, slurm])
def test_two_nodes_train_what_one_process_trains(tiny, fit_here, on_two_nodes, start):
    one = fit_here("--recipe", tiny(), runs="one")
    two = on_two_nodes(start)
    assert furthest_weights(one, two) < ROUNDING
    assert one.results()["updates"] == two.results()["updates"]


# Sharded.

FSDP = [*TWO[2:], "--trainer.strategy.class_path=fusion.training.FSDP"]


def test_sharded_ranks_train_what_ddp_trains_and_leave_a_whole_checkpoint(tiny, fit_on_two):
    recipe = tiny()
    ddp, _ = fit_on_two(recipe, runs="ddp")
    fsdp, _ = fit_on_two(recipe, engine=FSDP, runs="fsdp")
    print(f"largest difference: loss {furthest(ddp.column('train/loss_step'), fsdp.column('train/loss_step')):.2e}")
    assert furthest(ddp.column("train/loss_step"), fsdp.column("train/loss_step")) < ROUNDING
    assert furthest_weights(ddp, fsdp) < ROUNDING
    assert fsdp.results()["test"] == pytest.approx(ddp.results()["test"], abs=ROUNDING)
    Predictor.load(fsdp.folder)


@pytest.mark.slow
@pytest.mark.parametrize("image", ["test_vit", "resnet10t"])
def test_shares_are_gathered_in_half_precision_where_they_may_be(tiny, fit_on_two, image):
    options = [f"--model.image.init_args.name={image}", "--model.image.init_args.options={}", "--trainer.max_steps=4"]
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        run, _ = fit_on_two(tiny(), *options, f"--trainer.precision={precision}", engine=FSDP, runs=f"{image}-{precision}")
        losses.append(run.column("train/loss_step"))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
def test_compiled_shares_train_what_the_others_do(tiny, fit_on_two):
    options = ["--trainer.max_steps=4", '--model.image.init_args.options={"depth": 2}', "--trainer.limit_val_batches=0"]
    losses = []
    for compiled in ("false", "true"):
        run, _ = fit_on_two(tiny(), *options, f"--model.compile={compiled}", engine=FSDP, runs=compiled, timeout_s=400)
        losses.append(run.column("train/loss_step"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sharded_run_that_died_goes_on_to_the_bit(tiny, tmp_path, fit_on_two):
    options = [str(tiny(dropout=0.4)), "--checkpoint.every_updates=5"]
    whole, _ = fit_on_two(*options, engine=FSDP, runs="whole")
    script = tmp_path / "dies.py"
    script.write_text(DIES_AT_6)
    words = [sys.executable, str(script), "--recipe", *options, *FSDP, f"--runs={tmp_path / 'died'}"]
    subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    died = newest(tmp_path / "died")
    assert Run(0, died).checkpoint()["fusion"]["updates"] == 5
    words = [sys.executable, str(REPOSITORY / "scripts/fit.py"), "--resume", str(died)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert furthest_weights(Run(0, died), whole) == 0


DIES_AT_6 = """
import os
from fusion.cli.main import run
from fusion.training import Engine
step = Engine.training_step
def die(self, batch, batch_idx):
    if self.updates == 6:
        os._exit(9)
    return step(self, batch, batch_idx)
Engine.training_step = die
run("fit")
"""


def test_muon_is_refused_where_matrices_are_shared_out(tiny, tmp_path):
    words = ["--recipe", str(tiny()), *FSDP, "--model.optimizer=fusion.training.Muon", f"--runs={tmp_path / 'runs'}"]
    done = subprocess.run([sys.executable, str(REPOSITORY / "scripts/fit.py"), *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "Muon needs whole matrices" in done.stderr
    assert "Traceback" not in done.stderr


# The batch script.


def test_the_batch_script_queues_a_job_again_whose_time_is_up_and_then_resumes_it(tiny, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, does in (("srun", 'exec "$@"'), ("scontrol", f'echo "$@" >> {tmp_path}/queued')):  # the scheduler, as far as it matters
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1", "FUSION_RUNS": str(tmp_path / "runs")}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", str(REPOSITORY / "recipes/cluster/slurm.sbatch"), str(tiny()), "--trainer.max_epochs=30"]

    def start():
        environment = os.environ | job | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    first = start()
    for line in first.stdout:
        if line.startswith("epoch 1/"):
            break
    for process in Path("/proc").glob("[0-9]*/cmdline"):  # SLURM signals the tasks, not the script
        words = process.read_bytes().split(b"\0")
        if b"fusion" in words and str(tmp_path).encode() in process.read_bytes():
            os.kill(int(process.parent.name), signal.SIGUSR1)
    _, err = first.communicate(timeout=60)
    assert first.returncode == REQUEUE, err
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    second = start()
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert "epoch 30/30" in out
    assert "epoch 1/30" not in out
    assert len(list((tmp_path / "runs").glob("*/*/*"))) == 1
