#!/usr/bin/env bash
# Makes the environment in .venv, then runs a suite of experiments or the tests. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root="$PWD"

usage() {
    cat <<'TEXT'
usage: ./run_experiments.sh [SUITE] [OPTIONS]    run a suite (default: digits)
       ./run_experiments.sh test [--fast] [PYTEST OPTIONS]   run all checks and tests
       ./run_experiments.sh SUITE --help         the suites and their options

Needs Python 3.10 or newer with pip, found as python3, python3.10 ... python3.13 or $PYTHON. The first call makes the
environment .venv (several GB); later calls use it as it is, until pyproject.toml changes.

  ./run_experiments.sh                          baselines and four methods in solo-learn, IsoLoss in lightly and VISSL,
                                                on digits: table and figure in results/digits
  ./run_experiments.sh --all                    all methods in all three frameworks
  ./run_experiments.sh digits --list            name the runs
  ./run_experiments.sh digits --only isoloss    one method
  ./run_experiments.sh digits --framework vissl all methods in VISSL; or in lightly, or in solo
  ./run_experiments.sh digits --seeds 3         mean and standard deviation over three seeds
  ./run_experiments.sh digits --dry-run         print the exact commands
  ./run_experiments.sh toy_dynamics             theory against simulation of the toy model: figures in a minute
  ./run_experiments.sh implicit_var_reg         40 runs on CIFAR, STL-10 and TinyImageNet; wants a GPU
  ./run_experiments.sh ssl_ey                   SSL-EY with and without projector, CIFAR and ImageNet-100; wants a GPU
  ./run_experiments.sh dissl_table1_contrastive  CISSL on TinyImageNet; so dissl_table1_distillation, dissl_fig7a, dissl_fig7c
  ./run_experiments.sh matrix_ssl               Matrix-SSL and MEC on ImageNet, linear probing, weights for COCO; wants GPUs
  ./run_experiments.sh self_supervised_vision   twelve methods on six networks on CIFAR-10, by the commands of that
                                                repository; wants a GPU. --data digits --only byol-resnet18: a trial
  ./run_experiments.sh digits --status          state, epoch, loss and accuracy of each run; --report makes the table
  ./run_experiments.sh implicit_var_reg --cluster slurm --partition gpu   each run as a job of SLURM; --cluster local
                                                executes the jobs on this machine
  ./run_experiments.sh test -k isoloss          checks, then the tests that match
  ./run_experiments.sh test --fast              ruff and lint-imports, then the tests that are neither slow nor run on
                                                several processes, and a few cases of those with many; two minutes on two cores
  PIP_INSTALLS=1 ./run_experiments.sh test      install the wheel with pip from the package index too; several GB
  SOLO_LEARN_CHECKOUT=FOLDER ./run_experiments.sh test   the tests of solo_ext a second time, on a checkout of
                                                solo-learn's main branch
  VISSL_CHECKOUT=FOLDER ./run_experiments.sh test        VISSL's own tests too, of a checkout of it
TEXT
}

say() { printf '== %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# An active environment of the caller must not leak into ours.
unset VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONHOME PYTHONSTARTUP
# Container images often set it; each process would then compile the source of torch and the framework again.
unset PYTHONDONTWRITEBYTECODE
unset UV_PROJECT UV_PROJECT_ENVIRONMENT UV_PYTHON UV_FROZEN UV_LOCKED UV_NO_SYNC UV_SYSTEM_PYTHON UV_WORKING_DIRECTORY
export PYTHONNOUSERSITE=1 UV_PYTHON_DOWNLOADS=never

find_python() {
    local name found="" version
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        version="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
        found="$found${found:+, }$name is $version"
    done
    fail "Python 3.10 or newer is needed (${found:-no Python found}); install it, or name it with PYTHON=/path/to/python3"
}

# Prints the path of uv: the one on PATH, else one of our own in .uv.
find_uv() {
    if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
        command -v uv
        return
    fi
    local log="$root/.uv/install.log" candidate
    for candidate in "$root/.uv/venv/bin/uv" "$root/.uv/target/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "no uv on PATH: installing it into .uv with pip" >&2
    mkdir -p "$root/.uv"
    printf '*\n' >"$root/.uv/.gitignore"
    rm -rf "$root/.uv/venv" "$root/.uv/target"
    if "$python" -m venv "$root/.uv/venv" >"$log" 2>&1; then
        "$root/.uv/venv/bin/python" -m pip install --quiet uv >>"$log" 2>&1 ||
            { tail -n 5 "$log" >&2; fail "pip could not install uv; its output is in $log"; }
        printf '%s\n' "$root/.uv/venv/bin/uv"
    else
        # Debian's python3 comes without ensurepip; a folder of our own does as well as a virtual environment.
        PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$python" -m pip install --quiet --target "$root/.uv/target" uv >>"$log" 2>&1 ||
            { tail -n 5 "$log" >&2; fail "neither venv nor pip of $python could install uv; their output is in $log"; }
        printf '%s\n' "$root/.uv/target/bin/uv"
    fi
}

# What the environment was made from. It is not movable, so its place belongs to it.
fingerprint() {
    "$python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
text = pathlib.Path("pyproject.toml").read_bytes()
print(hashlib.sha256(text).hexdigest(), "Python", sys.version.split()[0], sys.argv[1])
PYTHON
}

make_environment() {
    local stamp=".venv/ssl-plugins.stamp" wanted uv
    wanted="$(fingerprint)"
    if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]] && .venv/bin/python -c '' 2>/dev/null; then
        say "environment .venv is up to date, used again"
    else
        uv="$(find_uv)"
        say "making the environment .venv with $("$uv" --version) and $("$python" --version): $python"
        # A lock file of an earlier time would pin what pyproject.toml no longer asks for.
        rm -f "$stamp" uv.lock
        "$uv" sync --all-extras --python "$python" ||
            fail "uv could not make the environment (its reason is above): uv sync --all-extras --python $python"
        printf '%s\n' "$wanted" >"$stamp"
        say "environment .venv is ready"
    fi
    export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
}

# The release of lightly before the installed one, for the tests: a folder that goes before the packages of .venv, with
# what that release needs beside them.
make_older_lightly() {
    local folder=".lightly-1.5" wanted
    local packages=("lightly==1.5.26" "lightly-utils~=0.0.0" "aenum>=3.1.11")
    wanted="$(fingerprint) ${packages[*]}"
    if [[ -f $folder/stamp && "$(cat "$folder/stamp")" == "$wanted" ]]; then
        return
    fi
    say "installing ${packages[0]}, for its tests, into $folder"
    rm -rf "$folder"
    mkdir "$folder"
    printf '*\n' >"$folder/.gitignore"
    "$(find_uv)" pip install --quiet --python .venv/bin/python --no-deps --target "$folder" "${packages[@]}" ||
        fail "uv could not install ${packages[0]} (its reason is above)"
    printf '%s\n' "$wanted" >"$folder/stamp"
}

# The tests of solo_ext, and of all frameworks together, on the checkout; options may select none of them.
test_main_branch() {
    local status=0
    SOLO_LEARN_CHECKOUT="$(cd "$SOLO_LEARN_CHECKOUT" && pwd)" python -m pytest --numprocesses "$workers" tests/solo tests/test_parity.py "$@" || status=$?
    [[ $status == 5 ]] || return "$status"
}

# share_cores PERCENT: that many processes of tests for 100 cores, at most four, with the threads that remain to each.
share_cores() {
    local cores
    cores="$(python -c 'import os; print(os.cpu_count() or 1)')"
    cores="${cores:-1}"
    workers=$((cores * $1 / 100))
    workers=$((workers < 4 ? workers : 4))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}"
}

# Waits for a check that runs in the background, and prints its output: finish PROCESS LOG.
finish() {
    local status=0
    wait "$1" || status=$?
    cat "$2"
    return "$status"
}

run_tests() {
    local passed="" failed="" name status workers logs="" pyright mkdocs options=()
    if [[ ${1:-} == --fast ]]; then
        shift
        options=(-m "not slow and not more and not ddp")
        share_cores 100
    else
        share_cores 200  # slow tests wait for processes that they start
    fi
    check() {
        name="$1"
        shift
        say "$name"
        status=0
        "$@" || status=$?
        if [[ $status == 0 ]]; then
            passed="$passed${passed:+, }$name"
        else
            failed="$failed${failed:+, }$name (status $status)"
        fi
    }
    check "ruff check" ruff check .
    check "ruff format" ruff format --check .
    check "lint-imports" lint-imports
    # These two take 40 s of processor time: --fast leaves them out, and otherwise they run beside the tests.
    if [[ ${#options[@]} == 0 ]]; then
        logs="$(mktemp -d)"
        pyright plugins >"$logs/pyright" 2>&1 &
        pyright=$!
        NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$logs/site" >"$logs/mkdocs" 2>&1 &
        mkdocs=$!
        # expanded now, since the variables are local
        # shellcheck disable=SC2064
        trap "kill $pyright $mkdocs 2>/dev/null || true; rm -rf '$logs'" EXIT
    fi
    check "pytest" env -u SOLO_LEARN_CHECKOUT python -m pytest --numprocesses "$workers" --durations=10 ${options[@]+"${options[@]}"} "$@"
    if [[ -n $logs ]]; then
        check "pyright" finish "$pyright" "$logs/pyright"
        check "mkdocs" finish "$mkdocs" "$logs/mkdocs"
        trap - EXIT
        rm -rf "$logs"
    fi
    # A process holds one solo-learn only: its tests run a second time, on the main branch.
    if [[ -n ${SOLO_LEARN_CHECKOUT:-} ]]; then
        check "pytest, solo-learn main" test_main_branch ${options[@]+"${options[@]}"} "$@"
    fi
    say "passed: ${passed:-nothing}"
    if [[ -z ${SOLO_LEARN_CHECKOUT:-} ]]; then
        say "NOT TESTED: solo-learn's main branch. Let SOLO_LEARN_CHECKOUT name the folder of a checkout to test on it too"
    fi
    if [[ -z ${VISSL_CHECKOUT:-} ]]; then
        say "NOT TESTED: VISSL's own tests. Let VISSL_CHECKOUT name the folder of a checkout to run them too"
    fi
    if [[ ${PIP_INSTALLS:-} != 1 ]]; then
        say "NOT TESTED: pip install from the package index. Set PIP_INSTALLS=1 to test it too; it fetches several GB"
    fi
    if [[ ${#options[@]} != 0 ]]; then
        say "NOT TESTED: pyright, mkdocs, the slow tests, further cases of a test, and those on several processes. Leave out --fast to run them too"
    fi
    if [[ -n $failed ]]; then
        fail "failed: $failed"
    fi
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    test)
        shift
        python="$(find_python)"
        make_environment
        make_older_lightly
        run_tests "$@"
        ;;
    *)
        if [[ $# == 0 || $1 == -* ]]; then
            set -- digits "$@"
        fi
        python="$(find_python)"
        # The command line is checked first: a misspelt option should not cost an installation.
        "$python" -m plugins.experiments --check "$@"
        for option in "$@"; do
            if [[ $option == -h || $option == --help ]]; then
                exit 0
            fi
        done
        make_environment
        exec python -m plugins.experiments "$@"
        ;;
esac
