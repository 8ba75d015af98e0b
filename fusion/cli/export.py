"""fusion export: write a run's model as a package for a runtime."""

from collections.abc import Sequence

from fusion.cli.options import Options
from fusion.deploy.exporting import OPSET
from fusion.deploy.exporting import export as export_run
from fusion.packages.runtimes import RUNTIMES


def export(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    description = (
        "Write a run's model as a package (model file, processor, tokenizer, card) that answers like the run, and check that it does."
    )
    parser = Options("fusion export", description)
    parser.add_argument("--run", required=True, help="run folder printed by fit, a model folder, or a checkpoint file")
    parser.add_argument("--to", required=True, choices=list(RUNTIMES), help="ONNX Runtime, torch.export, or compiled by AOTInductor")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--opset", type=int, default=OPSET, help="version of ONNX's operators, for onnx: 18 to 22")
    parser.add_argument("--replace", action="store_true", help="replace an earlier package in that folder")
    options = parser.parse_args(arguments)
    exported = export_run(options.run, options.to, options.out, checkpoint=options.checkpoint, opset=options.opset, replace=options.replace)
    if exported.note:
        print(f"note: {exported.note}")
    print(
        f"{exported.folder}: values differ from the run's by at most {exported.difference:.1g} on {exported.batches} batches with every "
        f"pattern of missing inputs; {exported.seconds:.0f} s"
    )
    return 0
