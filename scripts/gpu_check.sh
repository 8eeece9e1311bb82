#!/usr/bin/env bash
# Builds, tests, measures and profiles nest_fast on a machine with a GPU, without a network, in under 9 minutes.
#
#   PYTHON   interpreter that has torch, triton, timm and the test and bench extras already   (python3)
#   RESULTS  folder for logs, bench.json, table.md, report.html and traces                    (results/gpu)
#   PARTS    which of: build tests profile tune bench sweep                                   (all but sweep)
#   SELECT   a pytest -k expression for the benchmarks, such as "nest_base"                   (everything)
#   LIMIT    seconds for everything; the benchmarks get what the other parts leave            (530)
#   ALLOW_CPU=1  go on without a GPU and do what a CPU can
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-results/gpu}
PARTS=${PARTS:-build tests profile tune bench}
SELECT=${SELECT:-}
LIMIT=${LIMIT:-530}
mkdir -p "$RESULTS"
failed=()

say() { printf '\n== %s (%d s since the start)\n' "$*" "$SECONDS"; }
wanted() { [[ " $PARTS " == *" $1 "* ]]; }

# Runs a command within a time limit, its output shown and kept in RESULTS/NAME.log; a failure is remembered.
part() {
  local name=$1 limit=$2
  shift 2
  say "$name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
  local status=${PIPESTATUS[0]}
  if ((status == 124 || status == 137)); then
    failed+=("$name: over $limit s")
  elif ((status)); then
    failed+=("$name: exit status $status")
  fi
}

for name in $PARTS; do
  if [[ " build tests profile tune bench sweep " != *" $name "* ]]; then
    echo "PARTS: expected some of build tests profile tune bench sweep, got '$name'"
    exit 2
  fi
done

if ! gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")'); then
  echo "PYTHON: expected an interpreter with torch, got $PYTHON"
  exit 2
fi
if [[ -z $gpu && ${ALLOW_CPU:-0} != 1 ]]; then
  echo "No GPU that torch can use; ALLOW_CPU=1 goes on with what a CPU can do."
  exit 2
fi
say "GPU: ${gpu:-none}, parts: $PARTS, results: $RESULTS"

if wanted build; then
  if [[ -n $gpu ]]; then  # for this GPU alone: all architectures take minutes
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
  fi
  part build 120 "$PYTHON" -m pip install -v --no-index --no-build-isolation --no-deps -e .
  part info 30 "$PYTHON" -m nest_fast.info
fi
if wanted tests; then
  workers=$("$PYTHON" -c 'import xdist; print("-n 4")' 2>/dev/null) || workers=
  part tests-gpu 120 "$PYTHON" -m pytest tests -q -m gpu
  # shellcheck disable=SC2086  # the option and its value are two words, or none
  part tests-ops 120 "$PYTHON" -m pytest tests/test_block*.py tests/test_norm_pool.py -q -m "not gpu" $workers
fi
wanted profile && part profile 60 "$PYTHON" benchmarks/top_kernels.py --out "$RESULTS"
if wanted tune; then  # the benchmarks measure what there is without it
  batch=8
  [[ -n $gpu ]] && batch=256
  NEST_FAST_TUNED=$RESULTS/tuned.json part tune 90 "$PYTHON" -m nest_fast.tune --model nest_small --dtype bf16 \
    --batch-size "$batch" --time-limit 60
fi
if wanted bench || wanted sweep; then
  args=(--benchmark-only -v --benchmark-columns=min,median,iqr,rounds --benchmark-json="$RESULTS/bench.json")
  wanted sweep && args+=(--sweep)
  wanted bench || args+=(-m sweep)
  [[ -n $SELECT ]] && args+=(-k "$SELECT")
  # The limit stops new benchmarks; the last one, pytest's table and the report still need their time.
  args+=(--time-limit $((LIMIT - SECONDS - 60)))
  rm -f "$RESULTS/bench.json"
  part bench $((LIMIT - SECONDS - 10)) "$PYTHON" -m pytest benchmarks/ "${args[@]}"
  [[ -s $RESULTS/bench.json ]] && part report 10 "$PYTHON" benchmarks/report.py "$RESULTS/bench.json" --out "$RESULTS"
  [[ -s $RESULTS/bench.json ]] && part model 10 "$PYTHON" benchmarks/model_gpu.py --beside "$RESULTS/bench.json"
fi
say "done"
if ((${#failed[@]})); then
  printf 'FAILED %s\n' "${failed[@]}"
  exit 1
fi
