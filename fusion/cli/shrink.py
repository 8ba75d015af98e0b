"""fusion shrink: a smaller model of a run, and what it costs."""

import argparse
from collections.abc import Sequence

from fusion.cli.options import Options, above_zero
from fusion.cli.shrink_pruned import pruned, sparse
from fusion.deploy.comparison import ratios, table
from fusion.deploy.shrinking import shrink_to_int8
from fusion.settings.parser import words

METHODS = ("int8", "prune", "sparse")
HELP = "int8: 8 bits, for ONNX Runtime on CPUs; prune: without its least important units, trained on; sparse: with weights of zero"


def shrink(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    method = next((word for is_value, word in words(arguments, "--method") if is_value), "int8")
    if method in ("prune", "sparse"):
        return (pruned if method == "prune" else sparse)(arguments)
    description = "Make a run's model smaller, and print size, latency and scores before and after. The options of the other "
    description += "methods: --method=prune --help, --method=sparse --help."
    parser = Options("fusion shrink", description)
    parser.add_argument("--run", required=True, help="run folder printed by fit")
    parser.add_argument("--method", required=True, choices=METHODS, help=HELP)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--calibration_split", default="val", help="its samples calibrate activations and choose layers; never test")
    parser.add_argument("--calibration_samples", type=above_zero, default=128, help="number of samples that calibrate")
    parser.add_argument("--samples", type=above_zero, default=2000, help="at most this many samples of each split are scored")
    parser.add_argument(
        "--most_lost",
        type=share,
        default=0.005,
        help="largest loss of the main score on the calibration split; beyond it, layers stay in float32",
    )
    parser.add_argument("--most_changed", type=share, default=0.02, help="largest share of answers that may change there; likewise")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which each model is timed, with 1 and with 32 samples each")
    parser.add_argument("--replace", action="store_true", help="replace an earlier package in that folder")
    options = parser.parse_args(arguments)
    shrunk = shrink_to_int8(
        options.run,
        options.out,
        checkpoint=options.checkpoint,
        calibration_split=options.calibration_split,
        calibration_samples=options.calibration_samples,
        samples=options.samples,
        most_lost=options.most_lost,
        most_changed=options.most_changed,
        seconds=options.seconds,
        replace=options.replace,
        report=lambda line: print(line, flush=True),
    )
    excluded = shrunk.quantised.excluded
    print(f"in float32: {', '.join(excluded)}" if excluded else "no layer had to stay in float32")
    print(f"\n{table(shrunk.compared, shrunk.score)}\n")
    first, *_, last = shrunk.compared
    print("\n".join(ratios(shrunk.compared, first, last)))
    print(f"\npackage  {shrunk.folder}")
    return 0


def share(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected from 0 to below 1")
    return number
