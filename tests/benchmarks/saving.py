"""The README's picture: the demo model served twice, unquantized and as `w8a16`, measured by `bench serve` in turns.

    python -m tests.benchmarks.saving docs/images/saving.png --output FILE.json

Run it on an idle machine; it takes about a minute. Each server computes on one thread, so that the clients, which need
part of a core, have the other one.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from service.cli import main as pennyweight
from tests.e2e.support import ready

RECIPES = ("none", "w8a16")


def main() -> int:
    """Start both, measure them, and end them; returns the exit code of `bench serve`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--output", required=True, help="JSON to write")
    parser.add_argument("--duration", default="10", help="seconds of each server at each load")
    words = parser.parse_args()
    with ExitStack() as stack:
        clients = [stack.enter_context(ready("--quantize", recipe))[1] for recipe in RECIPES]
        urls = [f"--url={str(client.base_url).rstrip('/')}" for client in clients]
        files = [f"--plot={words.picture}", f"--output={words.output}"]
        return pennyweight(["bench", "serve", *urls, "--blocks=4", f"--duration={words.duration}", *files])


if __name__ == "__main__":
    sys.exit(main())
