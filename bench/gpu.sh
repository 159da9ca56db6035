#!/usr/bin/env bash
# The one command of a machine with a GPU and no network:
#
#     bash bench/gpu.sh OUT [--dry-run] [STAGE ...]
#
# It builds the checkout into an environment of its own, runs the tests on the GPU, measures and
# sanitizes, the most valuable first, and leaves at most eight files in OUT. Every stage has a limit
# of its own and none starts after MINUTES (9.5). Later runs on the same machine may name the stages
# that are still wanted; `build` does nothing where nothing changed. A dry run needs no GPU: it
# checks that every piece is there and says what would run.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() {
  echo "usage: bash bench/gpu.sh OUT [--dry-run] [STAGE ...], stages: ${ALL[*]}" >&2
  exit 2
}

ALL=(build info native triton float32 bfloat16 render sanitize)
[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 1
shift
DRY=
STAGES=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then
    DRY=1
  elif [[ " ${ALL[*]} " == *" $argument "* ]]; then
    STAGES+=("$argument")
  else
    usage
  fi
done
[[ ${#STAGES[@]} -gt 0 ]] || STAGES=("${ALL[@]}")

DEADLINE=$(awk "BEGIN {print int(60 * ${MINUTES:-9.5})}")
CORES=$(nproc)
OUTER=${PYTHON:-python3}
VENV=${TMPDIR:-/tmp}/mimnet_fast_gpu
PYTHON=$VENV/bin/python
PATH=$("$OUTER" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
PATH=$PATH:/usr/local/cuda/bin
SUMMARY=()
FAILED=0

wanted() { [[ " ${STAGES[*]} " == *" $1 "* ]]; }

# stage NAME LIMIT COMMAND...: the output goes to OUT/log.txt, the verdict to the summary.
stage() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  local left=$((DEADLINE - SECONDS))
  ((limit < left)) || limit=$left
  if [[ $DRY ]]; then
    echo "would run $name, at most $limit s: $*"
    return
  fi
  if ((limit < 5)); then
    SUMMARY+=("$name: no time left")
    FAILED=1
    return
  fi
  echo "== $name: $*" | tee -a "$OUT/log.txt"
  timeout --kill-after=5 "$limit" "$@" >>"$OUT/log.txt" 2>&1
  code=$?
  case $code in
    0) SUMMARY+=("$name: passed in $((SECONDS - start)) s") ;;
    124 | 137) SUMMARY+=("$name: stopped after $limit s") ;;
    *) SUMMARY+=("$name: failed ($code) after $((SECONDS - start)) s") ;;
  esac
  ((code == 0)) || FAILED=1
}

build() {
  if [[ ! -x $PYTHON ]]; then
    "$OUTER" -m venv --without-pip "$VENV" || return
    # Its packages are those of the outer environment, which stays as it is.
    "$OUTER" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      >"$(echo "$VENV"/lib/python3*/site-packages)/outer.pth" || return
  fi
  MIMNET_FAST_BUILD=cuda MAX_JOBS=$CORES \
    "$OUTER" -m pip --disable-pip-version-check --python "$PYTHON" install \
    --no-index --no-build-isolation --no-deps --verbose --editable .
}

info() {
  nvidia-smi
  "$PYTHON" -m mimnet_fast.info --json | tee "$OUT/info.json"
}

export -f build info
export OUT OUTER VENV PYTHON CORES PYTHONUNBUFFERED=1
: "${TORCH_CUDA_ARCH_LIST:=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
  sort -u | paste -sd' ')}"
export TORCH_CUDA_ARCH_LIST

PARALLEL=()
if "$OUTER" -c 'import xdist' 2>/dev/null; then
  PARALLEL=(-n "$((CORES > 4 ? CORES - 4 : 1))" --dist worksteal)
fi
SUITE=("$PYTHON" -m pytest tests --device cuda -m "not slow and not packaging" -q -rfE --tb=short
  -p no:cacheprovider "${PARALLEL[@]}")
for other in cdr test_bench.py test_gpu_script.py test_packaging.py test_readme.py; do
  SUITE+=("--ignore=tests/$other")
done
MEASURE=(--device cuda --modes default reduce-overhead --ops mimnet_forward dynamic_routing
  interest_bridge multi_granularity_attention target_attention squash)

if [[ $DRY ]]; then
  bash -n "${BASH_SOURCE[0]}" && "$OUTER" -m bench.gpu check || exit 1
fi

wanted build && stage build 240 bash -c build
wanted info && stage info 60 bash -c info

DTYPES=()
for dtype in float32 bfloat16; do
  wanted "$dtype" && DTYPES+=("$dtype")
done

# The compilers of the baselines work beside the tests, not beside the measurements.
WARM=
if [[ ! $DRY && ${#DTYPES[@]} -gt 0 ]]; then
  for dtype in "${DTYPES[@]}"; do
    TORCHINDUCTOR_COMPILE_THREADS=1 timeout 120 nice "$PYTHON" -m bench.gpu compile \
      "${MEASURE[@]}" --dtype "$dtype" --jobs "$((CORES > 8 ? 6 : 1))"
  done >"$OUT/.compile" 2>&1 &
  WARM=$!
fi

wanted native && stage native 120 "${SUITE[@]}" -k "not triton"
wanted triton && stage triton 150 "${SUITE[@]}" -k triton
if [[ $WARM ]]; then
  wait "$WARM"
  { echo "== baselines compiled ahead" && cat "$OUT/.compile"; } >>"$OUT/log.txt"
  rm "$OUT/.compile"
fi

# Half of the time that is left to the first of two dtypes, so that both are measured.
shares=${#DTYPES[@]}
for dtype in "${DTYPES[@]}"; do
  share=$(((DEADLINE - SECONDS - 20) / shares--))
  stage "$dtype" "$share" "$PYTHON" -m bench.compare "${MEASURE[@]}" --dtype "$dtype" \
    --backends native triton --seconds 0.3 --limit "$((share - 25))" \
    --out "$OUT/results-$dtype.json"
done
wanted render && stage render 20 "$PYTHON" -m bench.gpu render "$OUT"

if wanted sanitize; then
  # Every tensor in memory of its own, so that no access beside it goes unseen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    for backend in native triton; do
      stage "sanitize-$tool-$backend" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m bench.gpu exercise --backend "$backend"
    done
  done
fi

[[ $DRY ]] && exit 0
printf '%s\n' "${SUMMARY[@]}" | tee "$OUT/summary.txt"
exit "$FAILED"
