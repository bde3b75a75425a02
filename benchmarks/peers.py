"""In which environment does each library run? This package and the original share a name, so each has its own.

``make bench`` makes both environments. Whatever runs in the peers' environment is a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OWN = sys.executable
PEERS = str(HERE / ".venv-peers" / "bin" / "python")
LIBRARIES = {
    **{"this package": OWN, "original": PEERS, "torch.func": OWN, "Opacus": PEERS, "Opacus, ghost clipping": PEERS},
    **{"curvlinops": PEERS, "kronfluence": PEERS},
}
"""Name of a library to the Python that has it."""


def require(python: str) -> None:
    """Stop with the remedy if there is no such environment."""
    if not Path(python).exists():
        raise SystemExit(f"{python} is missing: `make benchmarks/.venv-peers/.made` makes it.")


def environment(python: str, **variables: str) -> dict[str, str]:
    """Environment variables for a process of this Python."""
    found = {**os.environ, **variables}
    if python == PEERS:
        found.pop("PYTHONPATH", None)  # it may lead to this package, which has the original's name
    return found


def output_of(python: str, script: str, *arguments: str) -> str:
    """What a script prints in an environment."""
    require(python)
    command = [python, script, *arguments]
    return subprocess.run(command, env=environment(python), check=True, stdout=subprocess.PIPE, text=True).stdout
