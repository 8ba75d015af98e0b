"""fusion push: share a run's model on the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from fusion.cli.options import Options
from fusion.deploy.hub import push_run
from fusion.hub_files import SCHEME


def push(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    description = "Upload a finished run's model (weights and JSON), its recipe and a model card to the Hugging Face Hub."
    parser = Options("fusion push", description)
    parser.add_argument("--run", required=True, help="run folder printed by fit")
    parser.add_argument("--to", required=True, help="repository USER/NAME, created if there is none")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owners can read")
    parser.add_argument("--message", default="", help="message of the commit; the run's name if not given")
    parser.add_argument("--license", help="of the model, as the hub spells it (apache-2.0); that of its pretrained encoders if not given")
    parser.add_argument("--datasets", nargs="+", default=[], help="ids on the hub of the data sets that it was trained on")
    options = parser.parse_args(arguments)
    pushed = push_run(
        Path(options.run).expanduser(),
        options.to,
        private=options.private,
        message=options.message,
        licence=options.license,
        data_sets=options.datasets,
    )
    print(f'pushed   {pushed.page}\nload it  fusion.load("{SCHEME}{options.to}")\nlicence  {pushed.licence} (--license sets it)')
    if pushed.unknown:
        print(f"note: the licence of {' and '.join(pushed.unknown)} isn't known here; the card says so")
    return 0
