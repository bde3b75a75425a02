"""All that needs a GPU, in less than ten minutes: the tests, then what quantities cost there. Writes a file of results.

    python benchmarks/on_gpu.py --output benchmarks/results/gpu.json
    python benchmarks/on_gpu.py --device cpu --minutes 1 --output cpu.json     # the same without a GPU

The tests of GPUs are skipped with ``--device cpu``; those that find what waits for a device run on any machine. Exits
with the tests' status.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from peers import HERE

TESTS = ["tests/test_gpu.py", "tests/test_waiting_for_devices.py"]
NETS = ["MLP", "3C3D", "GPT-2 block", "Encoder", "WRN-16-4", "GPT, linear layers"]
QUANTITIES = ["plain", "BatchGrad", "BatchL2Grad", "BatchL2Grad alone", "Variance", "ClippedGrad alone"]
QUANTITIES += ["DiagGGNMC", "DiagGGNExact", "KFAC", "KFAC expand alone"]
SECONDS_FOR_TESTS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="start no further cell of the benchmarks after these"
    )
    parser.add_argument("--tests", nargs="*", default=TESTS)
    parser.add_argument("--nets", nargs="*", default=NETS)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    status = 0
    if options.tests:
        command = [sys.executable, "-m", "pytest", "-q", *options.tests]
        try:
            status = subprocess.run(command, cwd=HERE.parent, timeout=SECONDS_FOR_TESTS).returncode
        except subprocess.TimeoutExpired:
            print(f"The tests took more than {SECONDS_FOR_TESTS} s.", file=sys.stderr)
            status = 1
    command = [sys.executable, str(HERE / "run.py"), "--device", options.device, "--minutes", str(options.minutes)]
    command += ["--nets", *options.nets, "--quantities", *QUANTITIES, "--rounds", "3", "--seconds", "0.3", "--series"]
    subprocess.run([*command, "--output", str(options.output.resolve())], check=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
