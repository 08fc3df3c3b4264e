r"""Draw what the routers of a run did: load of each expert, entropy, dropped share, by layer and modality over steps.

    python tools/plot_experts.py runs/a/logs                                the run's logging.directory
    python tools/plot_experts.py runs/a/logs/metrics.jsonl --output a.svg   that file, into another (.png .svg .pdf)
    python tools/plot_experts.py runs/a/logs --layers 0 23 47               three layers alone

Reads metrics.jsonl, of a run that is under way too; the picture is experts.png beside it if --output says nothing else.

How to read it: above, every row is an expert, layers are one under another, white is a fair share, red more, blue less:
a row that stays dark blue is an expert that nobody uses (raise model.balance_weight or model.bias_rate), stripes that
differ between modalities are experts that have specialised. In the middle, entropy of the router's scores: ln(experts)
at the start, lower as it decides; near 0 early on it has collapsed. Below, slots for which model.capacity left no room.
docs/training.md explains the keys. Exit status 2 and one line if anything is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unimega.errors import run_cli
from unimega.training import expert_charts


def main(argv: Sequence[str]) -> None:
    """Read, draw, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="METRICS_OR_RUN", type=Path, help="metrics.jsonl or a folder that holds it")
    parser.add_argument("--output", type=Path, help="picture: .png, .svg or .pdf (experts.png beside the metrics)")
    parser.add_argument("--layers", type=int, nargs="+", default=[], metavar="N", help="layers to draw (all)")
    options = parser.parse_args(argv)
    file = expert_charts.find(options.run)
    history = expert_charts.read(file, layers=options.layers)
    output = options.output or file.with_name("experts.png")
    expert_charts.write_charts(output, history, title=str(file))
    first, last = history.steps[0], history.steps[-1]
    print(f"{output}: {len(history.layers)} layers, {len(history.steps)} records of steps {first} to {last}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
