"""fusion launch: fit on the machines of a cluster, restarted from the last checkpoint when one of them fails."""

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
from fusion.cli.ray_worker import Channel, Job, last_run, work
from fusion.errors import UserError, first_line, nearest
from fusion.session import FIT_COMMAND, command, parse_settings, silence_harmless_warnings
from fusion.settings.parser import words
from fusion.training.callbacks.signals import SIGNALS

ENGINES = ("ray",)


def launch(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: that of fit, or 1 if the workers failed too often."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: fusion launch --engine ray [--workers N] [--cpus N] [--restarts N] [--address ADDRESS]\n"
            "                     --recipe NAME [any option of fit], or --resume RUN\n\n"
            "Trains a recipe with Ray Train. Each worker runs fit with one device, wherever Ray places it. When a worker or its machine\n"
            "fails, all are restarted and resume from the last checkpoint (--checkpoint.every_minutes=10 writes more of them).\n"
            "Run folder, data and this program must be accessible to all machines.\n\n"
            "--workers   number of workers; by default the number of the cluster's GPUs\n"
            "--cpus      CPUs reserved for each worker (1)\n"
            "--restarts  how often the workers may fail before the launch ends (3)\n"
            "--address   address of a Ray cluster; by default RAY_ADDRESS, else a cluster running here, else one started for this launch"
        )
        return 0
    parser = Options("fusion launch", "")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--address")
    options, fit_words = parser.parse_known_args(list(arguments))
    for name, least in (("workers", 1), ("cpus", 1), ("restarts", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"fusion launch: --{name}={value}; expected at least {least}")
    own = [option.removeprefix("--") for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in fit_words:
        if word.startswith("--") and get_close_matches(name := word.partition("=")[0].removeprefix("--"), own, cutoff=0.8):
            raise UserError(f"fusion launch: unknown option --{name}. {nearest(name, own)}")
    silence_harmless_warnings()
    cli, resumed = parse_settings(fit_words)  # reports mistakes in the recipe before anything is started
    job = Job(
        new=["--trainer.strategy.class_path=fusion.training.DDP", *fit_words],  # first, so that a recipe may override it
        more=[word for is_value, word in words(fit_words, "--resume") if resumed and not is_value],
        accelerator=cli.config.trainer.accelerator,
        runs=str(Path(cli.config.runs).absolute() / f"ray-{datetime.now():%Y-%m-%d_%H-%M-%S}"),
        resume=str(resumed.absolute()) if resumed else None,
        folder=os.getcwd(),
    )
    return on_ray(job, options)


def on_ray(job: Job, options: Any) -> int:
    """Run the job on a Ray cluster, which is started if there is none, and wait until it ends."""
    try:
        import ray
        from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise UserError(
            f"fusion launch --engine ray needs Ray ({error}): pip install 'ray[train]', or fusion with its extra ray"
        ) from error

    try:
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ConnectionError, ValueError) as error:
        where = options.address or os.environ.get("RAY_ADDRESS") or "here"
        raise UserError(f"fusion launch: no Ray cluster at {where} ({first_line(error)})") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if job.accelerator == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        workers = options.workers or gpus
        check_resources(job.accelerator, workers, options.cpus, gpus, nodes)
        job.accelerator = "gpu" if gpus else "cpu"
        address = f" --address {options.address}" if options.address else ""
        launch_options = f"--engine ray --workers {workers} --cpus {options.cpus} --restarts {options.restarts}{address}"
        job.environment[FIT_COMMAND] = f"{command('launch')} {launch_options}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lives as long as the command
        job.channel = ray.remote(num_cpus=0)(Channel).options(scheduling_strategy=here).remote()
        trainer = DataParallelTrainer(
            work,
            train_loop_config={"job": job},
            backend_config=BackendConfig(),  # fit creates the process group
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": options.cpus}),
            run_config=RunConfig(
                name=Path(job.runs).name,
                storage_path=str(Path(job.runs).parent),
                failure_config=FailureConfig(max_failures=options.restarts),
            ),
        )
        try:
            return wait_for(trainer, job.channel)
        except TrainingFailedError as error:
            run = job.resume or last_run(job.runs)
            advice = f" Resume the run from its last checkpoint with:\n  {job.environment[FIT_COMMAND]} --resume {run}" if run else ""
            print(f"error: the workers failed, after up to {options.restarts} restarts: {first_line(error)}.{advice}", file=sys.stderr)
            return 1
    finally:
        ray.shutdown()


def check_resources(accelerator: str, workers: int, cpus: int, gpus: int, nodes: Sequence[Any]) -> None:
    """Raises UserError for resources that the cluster does not have, for which Ray would wait forever."""
    if accelerator in ("gpu", "cuda") and not gpus:
        raise UserError(f"fusion launch: the recipe requests trainer.accelerator={accelerator}, but the cluster has no GPU")
    if not workers:
        raise UserError("fusion launch: give the number of CPU workers with --workers=N")
    if gpus and workers > gpus:
        raise UserError(f"fusion launch: --workers={workers}, but the cluster has {gpus} GPUs; to train on CPUs: --trainer.accelerator=cpu")
    room = sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else workers)) for node in nodes)
    if workers > room:
        has = ", ".join(f"{node.get('CPU', 0):.0f}" for node in nodes)
        raise UserError(f"fusion launch: {workers} workers of {cpus} CPUs each, but the cluster has room for {room} (CPUs there: {has})")


def wait_for(trainer: Any, channel: Any) -> int:
    """Print the output of fit and return its exit status. SIGTERM, SIGUSR1 and Ctrl-C make the workers save and exit; a second Ctrl-C exits
    immediately.
    """
    import ray

    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except BaseException as error:  # raised again in the main thread
            outcome.append(error)

    signals: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    thread = threading.Thread(target=fit, daemon=True)  # in the main thread, Ray would handle Ctrl-C itself
    thread.start()
    printed: set[str] = set()
    try:
        over = False
        while not over:
            thread.join(0.3)
            over = not thread.is_alive()
            for rank, text in ray.get(channel.receive.remote(signals[-1] if signals else 0)):
                if rank == 0 or text not in printed:  # every rank reports the same mistake
                    print(f"rank {rank}: {text}" if rank else text, flush=True)
                printed.add(text)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return int(outcome[0])
