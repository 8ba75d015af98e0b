"""fusion launch: fit on the machines of a cluster, begun again from its last checkpoint where one of them fails."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from fusion.cli.options import Options
from fusion.cli.ray_worker import Job, Line, last_run, work
from fusion.errors import UserError, nearest
from fusion.session import FIT_COMMAND, command, quiet, settled
from fusion.settings.parser import words
from fusion.training.callbacks.signals import SIGNALS

ENGINES = ("ray",)


def launch(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status: of fit, or 1 where the workers failed too often."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: fusion launch --engine ray [--workers N] [--cpus N] [--restarts N] [--address ADDRESS]\n"
            "                     --recipe NAME [any option of fit], or --resume RUN\n\n"
            "Trains a recipe by Ray Train. Each worker is an ordinary fit with one device, wherever Ray puts it; when one fails, or its\n"
            "machine does, all are started again and go on from the last checkpoint (--checkpoint.every_minutes=10 writes more of them).\n"
            "Run folder, data and this program must be where all machines find them.\n\n"
            "--workers   how many; as many as the cluster has GPUs, if not said\n"
            "--cpus      CPUs reserved for each worker (1)\n"
            "--restarts  how often they may fail (3)\n"
            "--address   of a Ray cluster; else RAY_ADDRESS, else the one that runs here, else one is started here and ended"
        )
        return 0
    options = Options("fusion launch", "")
    options.add_argument("--engine", choices=ENGINES, required=True)
    options.add_argument("--workers", type=int)
    options.add_argument("--cpus", type=int, default=1)
    options.add_argument("--restarts", type=int, default=3)
    options.add_argument("--address")
    asked, fit_words = options.parse_known_args(list(arguments))
    for name, least in (("workers", 1), ("cpus", 1), ("restarts", 0)):
        given = getattr(asked, name)
        if given is not None and given < least:
            raise UserError(f"fusion launch: --{name}={given}; expected at least {least}")
    own = [option.removeprefix("--") for action in options._actions for option in action.option_strings if option.startswith("--")]
    for word in fit_words:
        if word.startswith("--") and get_close_matches(name := word.partition("=")[0].removeprefix("--"), own, cutoff=0.8):
            raise UserError(f"fusion launch: unknown option --{name}. {nearest(name, own)}")
    quiet()
    cli, resumed = settled(fit_words)  # a mistake in the recipe is told here, before anything is started
    job = Job(
        new=["--trainer.strategy.class_path=fusion.training.DDP", *fit_words],  # first, so that a recipe may bring another
        more=[word for is_value, word in words(fit_words, "--resume") if resumed and not is_value],
        accelerator=cli.config.trainer.accelerator,
        runs=str(Path(cli.config.runs).absolute() / f"ray-{datetime.now():%Y-%m-%d_%H-%M-%S}"),
        resume=str(resumed.absolute()) if resumed else None,
        folder=os.getcwd(),
    )
    return on_ray(job, asked)


def on_ray(job: Job, asked: Any) -> int:
    """Have the workers do the job, on a cluster that is there or started for it; wait for them."""
    try:
        import ray
        from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise UserError(f"fusion launch --engine ray needs Ray ({error}). Install it with: pip install 'fusion[ray]'") from error

    try:
        ray.init(address=asked.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ConnectionError, ValueError) as error:
        where = asked.address or os.environ.get("RAY_ADDRESS") or "here"
        raise UserError(f"fusion launch: no Ray cluster at {where} ({first_line(error)})") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if job.accelerator == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        workers = asked.workers or gpus
        refuse_what_does_not_fit(job.accelerator, workers, asked.cpus, gpus, nodes)
        job.accelerator = "gpu" if gpus else "cpu"
        address = f" --address {asked.address}" if asked.address else ""
        how = f"--engine ray --workers {workers} --cpus {asked.cpus} --restarts {asked.restarts}{address}"
        job.environment[FIT_COMMAND] = f"{command('launch')} {how}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # which lives as long as the command
        job.line = ray.remote(num_cpus=0)(Line).options(scheduling_strategy=here).remote()
        trainer = DataParallelTrainer(
            work,
            train_loop_config={"job": job},
            backend_config=BackendConfig(),  # fit makes the group of processes
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": asked.cpus}),
            run_config=RunConfig(
                name=Path(job.runs).name,
                storage_path=str(Path(job.runs).parent),
                failure_config=FailureConfig(max_failures=asked.restarts),
            ),
        )
        try:
            return waited_for(trainer, job.line)
        except TrainingFailedError as error:
            run = job.resume or last_run(job.runs)
            onward = f" From its last checkpoint the run goes on by:\n  {job.environment[FIT_COMMAND]} --resume {run}" if run else ""
            print(f"error: the workers failed, after up to {asked.restarts} restarts: {first_line(error)}.{onward}", file=sys.stderr)
            return 1
    finally:
        ray.shutdown()


def refuse_what_does_not_fit(accelerator: str, workers: int, cpus: int, gpus: int, nodes: Sequence[Any]) -> None:
    """For which Ray would wait for ever."""
    if accelerator in ("gpu", "cuda") and not gpus:
        raise UserError(f"fusion launch: the recipe asks for trainer.accelerator={accelerator}, but the cluster has no GPU")
    if not workers:
        raise UserError("fusion launch: say with --workers=N how many workers are to train on the cluster's CPUs")
    if gpus and workers > gpus:
        raise UserError(f"fusion launch: --workers={workers}, but the cluster has {gpus} GPUs; to train on CPUs: --trainer.accelerator=cpu")
    room = sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else workers)) for node in nodes)
    if workers > room:
        has = ", ".join(f"{node.get('CPU', 0):.0f}" for node in nodes)
        raise UserError(f"fusion launch: {workers} workers of {cpus} CPUs each, but the cluster has room for {room} (CPUs there: {has})")


def waited_for(trainer: Any, line: Any) -> int:
    """What fit ended with; prints what it says. SIGTERM, SIGUSR1 and Ctrl-C make the workers save and end, a second Ctrl-C ends at once."""
    import ray

    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value)
        except BaseException as error:  # raised where the result is waited for
            ended.append(error)

    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    thread = threading.Thread(target=fit, daemon=True)  # in the main one, Ray would take Ctrl-C for itself
    thread.start()
    said: set[str] = set()
    try:
        over = False
        while not over:
            thread.join(0.3)
            over = not thread.is_alive()
            for rank, text in ray.get(line.heard.remote(asked[-1] if asked else 0)):
                if rank == 0 or text not in said:  # a mistake is found by all
                    print(f"rank {rank}: {text}" if rank else text, flush=True)
                said.add(text)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return int(ended[0])


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
