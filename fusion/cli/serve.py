"""fusion serve: a run or a package over HTTP; and commands to a server that runs."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from fusion.cli.options import Options, above_zero
from fusion.console import print_rank_zero
from fusion.errors import UserError

TOKEN = "FUSION_CONTROL_TOKEN"


def serve(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        from fusion.deploy.serve.control import send_command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fusion"):
            raise
        raise UserError(
            f"fusion serve needs packages that are not installed ({error.name}): install fusion with its extra serve"
        ) from error
    parser = parser_of()
    options = parser.parse_args(list(arguments))
    if options.control:
        print(json.dumps(send_command(options.control, options.words, os.environ.get(TOKEN)), indent=1, ensure_ascii=False))
        return 0
    paths = [*options.words, *([options.run] if options.run else [])]
    if len(paths) != 1:
        raise UserError(f"fusion serve: expected one run or package, got {' and '.join(paths) or 'none'}")
    return run(paths[0], options)


def parser_of() -> Options:
    from fusion.deploy.serve.canary import RollbackLimits
    from fusion.deploy.serve.control import COMMANDS
    from fusion.deploy.serve.limits import Limits

    commands = "; ".join(f"{name} {what}" if what.startswith(("[", "PATH")) else f"{name}: {what}" for name, what in COMMANDS.items())
    commands = commands.replace("%", "%%")
    parser = Options(
        "fusion serve",
        "Serve a run or a package over HTTP: POST /predict; /docs, /openapi.json, /healthz, /readyz, /metrics. SIGTERM answers what is in "
        "progress and ends with status 0.",
    )
    parser.add_argument("words", nargs="*", metavar="PACKAGE_OR_RUN", help="what to serve; with --control, a command")
    parser.add_argument("--run", metavar="PACKAGE_OR_RUN", help="the same by name, as for the other commands")
    parser.add_argument("--control", metavar="URL", help=f"send a command to the server there: {commands}")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="0 for any")
    parser.add_argument("--batch_size", type=above_zero, default=32, help="the largest batch")
    parser.add_argument("--wait_ms", type=float, default=5.0, help="the longest time for which a sample waits for others to fill a batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="None: the CPU, and for runs the GPU if there is one")
    parser.add_argument("--parallel_batches", type=above_zero, help="batches run at once; None: on a CPU one per core, up to 4, on a GPU 1")
    parser.add_argument("--threads", type=above_zero, help="threads of one batch; None: the cores divided by --parallel_batches")
    parser.add_argument("--pool", type=above_zero, help="threads that preprocess requests and run batches; None: the cores, up to 8")
    parser.add_argument(
        "--canary",
        action="append",
        default=[],
        metavar="PATH=SHARE",
        help="another version for a share of the requests, as new=5%%; may be repeated",
    )
    parser.add_argument("--shadow", metavar="PATH", help="another version that gets a copy of each request and answers nobody")
    parser.add_argument(
        "--url_host", action="append", default=[], metavar="HOST", help="host from which images may be fetched by URL; may be repeated"
    )
    for settings in (Limits, RollbackLimits):
        described = dict(re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", settings.__doc__ or "", re.MULTILINE))
        for field in fields(settings):
            text = " ".join(described[field.name].split()).replace("%", "%%")
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=text)
    parser.epilog = (
        f"The environment variable {TOKEN}: a token that commands must carry. Without it they are taken from this machine only; set it "
        "where a proxy on this machine passes on requests from others."
    )
    return parser


def run(path: str, options: Any) -> int:
    from fusion.deploy.serve.app import app_of
    from fusion.deploy.serve.canary import RollbackLimits
    from fusion.deploy.serve.control import Control, canary_of, ready
    from fusion.deploy.serve.limits import Limits
    from fusion.deploy.serve.model import bound_embedded_images, concurrency, has_gpu, load
    from fusion.deploy.serve.server import Server, bound_socket, listen, url_of
    from fusion.deploy.serve.service import Service
    from fusion.deploy.serve.versions import Versions, check_shares
    from fusion.packages.folder import is_package

    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    rollback = RollbackLimits(**{field.name: getattr(options, field.name) for field in fields(RollbackLimits)})
    if options.wait_ms < 0:
        raise UserError(f"--wait_ms is {options.wait_ms:g}; expected 0 or more")
    canaries = [canary_of(one) for one in options.canary]
    check_shares([share for _, share in canaries])
    bound = bound_socket(options.host, options.port)
    on_gpu = options.device == "cuda" or (options.device is None and not is_package(path) and has_gpu())
    spread = concurrency(options.parallel_batches, options.threads, options.pool, gpu=on_gpu)
    bound_embedded_images(limits.max_megapixels)
    load_one = partial(load, threads=spread.threads, max_megapixels=limits.max_megapixels, device=options.device)
    versions = Versions(ready(path, load_one, options.batch_size), rollback)
    for canary, share in canaries:
        versions.add_canary(ready(canary, load_one, options.batch_size), share)
    if options.shadow:
        versions.add_shadow(ready(options.shadow, load_one, options.batch_size))
    service = Service(
        versions,
        limits,
        batch_size=options.batch_size,
        wait_ms=options.wait_ms,
        runs=spread.runs,
        threads=spread.pool,
        url_hosts=options.url_host,
    )
    control = Control(service, load_one, options.batch_size, os.environ.get(TOKEN))
    server = Server(app_of(service, control), service)
    listen(bound)
    served = ", ".join(f"{version.name} ({role})" for version, role in versions.roles().items())
    print_rank_zero(f"serving {served} at {url_of(bound)}: batches of {options.batch_size}, {spread.runs} at once")
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(server.serve_until_signal(bound))
    print_rank_zero(f"drained: {server.server_state.total_requests:,} requests answered")
    return 0
