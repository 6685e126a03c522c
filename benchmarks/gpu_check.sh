#!/usr/bin/env bash
# Measures and tests the engine on a machine with a GPU, in less than five minutes.
#
#     benchmarks/gpu_check.sh [--wheels FOLDER] [--device cuda|cpu] [--report FILE]
#
# The machine needs Python >= 3.11 with torch >= 2.11 and Triton >= 3.6. Other packages that it lacks, or has in too old a
# version (`--requirements` prints them), are taken from FOLDER and kept apart from those of the machine. Fill it
# elsewhere, where the project is installed (`--needs` prints all that may be lacking: the versions there, without torch
# and its own needs), for the machine's version of Python:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER $(benchmarks/gpu_check.sh --needs)
#     pip wheel --no-deps -w FOLDER antlr4-python3-runtime==4.9.3
#
# Wheels of what the machine has may be deleted: pyarrow and scipy are the largest.
#
# It prints milliseconds of each case with CUDA graphs on and off and the kernels that take them, a whole `ltts run`, and
# at last the tests, whose output goes to FILE.tests as well; what is wrong begins with !!. Each part has a limit, and the
# others go on. --device cpu runs a few of the tests and the same measurements on a model of two small layers, to see that
# the script works: about a minute of one core.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels="" device=cuda report=""
python=${PYTHON:-python3}
# `ask requirements`: what the machine lacks; `ask needs`: what any machine may lack, with what that needs;
# `ask wheels FOLDER`: the wheels of what it lacks
ask() {
    "$python" - "$@" <<'PYTHON'
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
# the last one is Hydra's, which works with no other version
tests = ["pytest", "pytest-xdist", "hypothesis", "antlr4-python3-runtime==4.9.*"]
wanted = [Requirement(line) for line in [*project["dependencies"], *tests]]
wanted = [each for each in wanted if each.name != "torch"]


def is_there(requirement):
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def with_needs(names, found):
    for name in map(canonicalize_name, names):
        if name not in found:
            found.add(name)
            needs = map(Requirement, requires(name) or [])
            with_needs([each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})], found)
    return found


missing = [each for each in wanted if not is_there(each)]
if sys.argv[1] == "requirements":
    print(*missing, sep="\n", end="\n" * bool(missing))
elif sys.argv[1] == "needs":
    known = with_needs(["torch"], set())
    for name in sorted(with_needs([each.name for each in wanted], set(known)) - known - {"antlr4-python3-runtime"}):
        print(f"{name}=={version(name)}")
else:
    wheels = {parse_wheel_filename(path.name)[0]: path for path in sorted(Path(sys.argv[2]).glob("*.whl"))}
    names = {canonicalize_name(each.name) for each in missing}
    if lacking := sorted(names - set(wheels)):
        sys.exit(f"{sys.argv[2]} has no wheel of {', '.join(lacking)}")
    names |= {name for name in wheels if not is_there(Requirement(name))}
    print(*(wheels[name] for name in sorted(names)), sep="\n")
PYTHON
}
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) wheels=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --report) report=$2; shift 2 ;;
        --requirements | --needs) ask "${1#--}"; exit ;;
        *) echo "$1: unknown; --wheels FOLDER, --device cuda|cpu, --report FILE, --requirements, --needs"; exit 2 ;;
    esac
done
if [ "$device" = cuda ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA device here; --device cpu shows that this script works"
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"; exec >&- 2>&-; wait $!' EXIT  # $! writes the report
started=$SECONDS
[ -z "$report" ] || exec > >(tee "$report") 2>&1
mapfile -t missing < <(ask requirements)
if [ ${#missing[@]} -gt 0 ]; then
    if [ -z "$wheels" ]; then echo "missing: ${missing[*]}; give --wheels FOLDER"; exit 2; fi
    files=$(ask wheels "$wheels") || exit 2
    while read -r file; do  # a wheel is an archive of what is imported
        "$python" -m zipfile -e "$file" "$work/packages" || exit 2
    done <<< "$files"
fi
export PYTHONPATH=$PWD/src:$work/packages LTTS_CACHE=$work/cache HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" -c 'import accelerate, datasets, hydra, hypothesis, math_verify, matplotlib, pyarrow, scipy, tensorboard, xdist' \
    || { echo "what does not import is missing in the folder, or too old on this machine"; exit 2; }
small=() table=(--device "$device" --seconds 95) line=(-m sampler=gaussian,dropout n=64 task.limit=1000) times=1
if [ "$device" = cpu ]; then
    small=(--layers 2 --width 64 --repeats 1)
    table+=(--seconds 1e9 --case 1x64 1x1 --profile 1x64)
    line=(sampler=gaussian n=4 task.limit=8)
    times=10  # the limits are for a GPU, and here nothing waits for the end
fi
# a command that may take so many seconds
within() {
    local limit=$((times * $1)) code=0
    timeout -s INT -k 5 "$limit" "${@:2}" || code=$?
    [ "$code" = 0 ] || echo "!! exit code $code (124 and 137: not done after $limit s)"
}
part() { echo "== $1, $((SECONDS - started)) s after the start"; }
part "milliseconds of a batch"
within 110 "$python" benchmarks/gpu_table.py "${table[@]}" "${small[@]}"
part "a whole command of 2 x 64,000 rollouts (with an empty cache: before 49 s, bar 15 s, aim 8 s)"
within 70 "$python" benchmarks/command.py -- "${line[@]}" "engine.device=$device"
part "tests"
tests=(-n 8 --dist worksteal -m gpu tests)
[ "$device" = cuda ] || tests=(-n 0 tests/engine/test_graphs.py -k "recorded_batch_gives or finished_rows")
# one thread each, since they share the cores; other packages' plugins and warnings say nothing about this engine
export OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 COLUMNS=250
log=${report:-$work/report}.tests
within 100 "$python" -m pytest -q -p xdist.plugin -p no:cacheprovider -W default --disable-warnings --tb=short \
    --durations=5 "${tests[@]}" > "$log" 2>&1
tail -c 4000 "$log"
part "done"
