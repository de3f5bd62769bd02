"""`python -m sdeflow` and the `sdeflow` command."""

from __future__ import annotations

import sys

from sdeflow.errors import SdeflowError


def main() -> None:
    """Run the command line; errors made on purpose are one line, not a traceback."""
    try:
        from sdeflow.cli.app import build

        build()()
    except SdeflowError as error:
        print(f"sdeflow: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
