"""How much `import dmcp` adds to `import torch`: python bench/import_time.py [--rounds 15]

The two take turns, each in a process of its own. What counts is the processor's time, which other
work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

PROGRAMS = {"torch": "import torch", "dmcp": "import dmcp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="Write the figures as JSON.")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(1 + options.rounds):
        for name, program in PROGRAMS.items():
            spent = _processor_seconds(program)
            if number:  # the first round fills the caches of files and of byte code
                seconds[name].append(spent)
    medians = {name: median(spent) for name, spent in seconds.items()}
    result = {"seconds": medians, "ratio": medians["dmcp"] / medians["torch"]}
    print(json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps({**result, "rounds": options.rounds}, indent=1) + "\n")


def _processor_seconds(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # An installed package has its byte code beside it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
