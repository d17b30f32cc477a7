"""initd with the small test warden in place of the real one: start.py MODE [initd's own arguments].

The product has no switch for this: the keeper's `run` takes the warden's argv as a parameter, nothing else does.
"""

from __future__ import annotations

import os
import sys

from initd import __main__ as entry

HERE = os.path.realpath(__file__)  # no pathlib: this process's memory is measured


def main() -> int:
    role, mode = sys.argv[1:3]
    if role == "keeper":
        from initd import drop, keeper
        from initd.errors import InitdError

        drop.set_name("initd-keeper")
        keeper.SILENCE = float(os.environ.get("SILENCE", keeper.SILENCE))
        try:
            return keeper.run([sys.executable, "-I", os.path.join(os.path.dirname(HERE), "warden.py"), *mode.split()])
        except InitdError as error:
            sys.stderr.write(f"initd: {error}\n")
            return error.code
    from initd import init

    init.KEEPER = [sys.executable, "-I", HERE, "keeper", mode]
    sys.argv[1:3] = []
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
