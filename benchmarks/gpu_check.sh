#!/usr/bin/env bash
# Tests and measures the engine on a machine with a GPU, in less than five minutes.
#
#     benchmarks/gpu_check.sh [--wheels FOLDER] [--device cuda|cpu] [--report FILE]
#
# The machine needs Python >= 3.11 with torch >= 2.11 and Triton >= 3.6. `--requirements` prints which packages it lacks
# or has in too old a version.
# Those, and what they need, are taken from FOLDER and kept apart from those of the machine. Fill it elsewhere, for the
# machine's version of Python and without dependencies (one of them would bring torch):
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER hydra-core omegaconf datasets ...
#     pip wheel --no-deps -w FOLDER antlr4-python3-runtime==4.9.3
#
# It prints the tests, milliseconds of each case with CUDA graphs off and on, the kernels that take them, and a whole
# `ltts run`. --device cpu runs a few of the tests and the same measurements on a model of two small layers, to see that
# the script works: about a minute of one core.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels="" device=cuda report=""
python=${PYTHON:-python3}
requirements() {
    "$python" - <<'PYTHON'
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
# the last one is Hydra's, which works with no other version
for line in [*project["dependencies"], "pytest", "pytest-xdist", "hypothesis", "antlr4-python3-runtime==4.9.*"]:
    wanted = Requirement(line)
    try:
        there = wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        there = False
    if not there and wanted.name != "torch":
        print(line)
PYTHON
}
# files of a folder whose packages the machine lacks, or has in a version that is too old
needed() {
    "$python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

missing = {canonicalize_name(Requirement(line).name) for line in sys.argv[2:]}
for path in sorted(Path(sys.argv[1]).iterdir()):
    name = canonicalize_name(path.name.split("-")[0] if path.suffix == ".whl" else path.name.rpartition("-")[0])
    try:
        version(name)
    except PackageNotFoundError:
        missing.add(name)
    if name in missing:
        print(path)
PYTHON
}
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) wheels=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --report) report=$2; shift 2 ;;
        --requirements) requirements; exit ;;
        *) echo "$1: unknown; --wheels FOLDER, --device cuda|cpu, --report FILE"; exit 2 ;;
    esac
done
if [ "$device" = cuda ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA device here; --device cpu shows that this script works"
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -z "$report" ] || exec > >(tee "$report") 2>&1
mapfile -t missing < <(requirements)
if [ ${#missing[@]} -gt 0 ]; then
    if [ -z "$wheels" ]; then echo "missing: ${missing[*]}; give --wheels FOLDER"; exit 2; fi
    mapfile -t files < <(needed "$wheels" "${missing[@]}")
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$work/packages" \
        "${files[@]}" || exit 1
fi
export PYTHONPATH=$PWD/src:$work/packages LTTS_CACHE=$work/cache HF_HUB_OFFLINE=1
"$python" -c 'import accelerate, datasets, hydra, math_verify, pytest, tensorboard, xdist' || exit 1
small=() table=(--device "$device") line=(-m sampler=gaussian,dropout n=64 task.limit=1000) times=1
if [ "$device" = cpu ]; then
    small=(--layers 2 --width 64 --repeats 1)
    table+=(--case 1x64 1x1 --profile 1x64)
    line=(sampler=gaussian n=4 task.limit=8)
    times=10  # the limits are for a GPU, and here nothing waits for the end
fi
# a command that may take so many seconds
within() {
    local limit=$((times * $1))
    timeout -s INT -k 5 "$limit" "${@:2}" || echo "exit code $? (124: not done after $limit s)"
}
started=$SECONDS
echo "== tests"
if [ "$device" = cuda ]; then
    mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    within 110 "$python" -m pytest -q -p no:cacheprovider -n 8 --dist worksteal -m gpu "${tests[@]}" 2>&1 | tail -25
else
    within 110 "$python" -m pytest -q -p no:cacheprovider -n 0 tests/engine/test_graphs.py -k "so_does or rollouts_of" \
        2>&1 | tail -25
fi
echo "== milliseconds of a batch, $((SECONDS - started)) s after the start"
within 110 "$python" benchmarks/gpu_table.py "${table[@]}" "${small[@]}"
echo "== a whole command, $((SECONDS - started)) s after the start"
within 70 "$python" benchmarks/command.py -- "${line[@]}" "engine.device=$device"
echo "== done, $((SECONDS - started)) s after the start"
