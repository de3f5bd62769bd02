"""`python -m sdeflow` and the `sdeflow` command."""

from __future__ import annotations

import sys

from sdeflow.errors import SdeflowError


def main() -> None:
    """Run the command line; errors made on purpose, and files that cannot be written, are one line, not a traceback."""
    try:
        from sdeflow.cli.app import build

        build()()
    except SdeflowError as error:
        print(f"sdeflow: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written
        print(f"sdeflow: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
