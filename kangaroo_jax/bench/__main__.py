"""`python -m kangaroo_jax.bench COMMAND [flags]`; one module of this package per command."""

import importlib
import sys

from absl import app

from kangaroo_jax.errors import InputError

_COMMANDS = {"peers": "the demo against plain decoding and Hugging Face transformers"}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in _COMMANDS:
        known = "; ".join(f"{name}: {what}" for name, what in _COMMANDS.items())
        print(f"bench: error: expected a command, found {command!r} ({known})", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"kangaroo_jax.bench.{command}")

    def guarded(argv: list[str]) -> None:
        try:
            module.main(argv)
        except InputError as error:
            print(f"bench {command}: error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded, argv=[f"bench {command}", *sys.argv[2:]])


if __name__ == "__main__":
    main()
