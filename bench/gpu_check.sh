#!/usr/bin/env bash
# Tests and measures the CUDA and Triton code on this machine's NVIDIA GPU, without a network.
#   bash bench/gpu_check.sh [build|ops|decoding|sanitizer|bench|fork|logp|steps|search|judge|correct|speculation]
#   (no argument: build, ops and decoding)
# Needs torch, triton, transformers, pybind11, scikit-build-core, cmake, ninja, pytest and nvcc in
# place. Each stage ends within 8 minutes and adds what it found to bench/results/<gpu>.json.
set -euo pipefail
cd "$(dirname "$0")/.."
limit=480
site=$PWD/build/gpu_check
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
result=bench/results/$gpu.json
export PYTHONPATH=$site PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin

record() { python3 bench/record.py "$result" "$@"; }

# `stage NAME COMMAND...` runs the command within the limit, keeps its log and records how it ended.
stage() {
  local name=$1 log=build/gpu_check_$1.log start=$SECONDS code=0
  shift
  mkdir -p build
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$log" || code=$?
  record "$name" --log "$log" --exit-code "$code" --seconds $((SECONDS - start))
  return "$code"
}

build() {
  rm -rf "$site"
  CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native" python3 -m pip install --no-index \
    --no-build-isolation --no-deps --target "$site" --verbose .
  python3 -m crossfade info
  # Without this the tests would skip CUDA kernels that were not built, and pass.
  python3 -c "import sys, torch; from crossfade.ops.backends import why_not
sys.exit(why_not('native', torch.device('cuda:0')))"
}

# Tests of the backends that run on the GPU; CI has the others. Most of the time goes into Triton's
# compiler, which pytest-xdist, if it is installed, runs on all cores.
ops() {
  local parallel=()
  if python3 -c "import xdist" 2>/dev/null; then
    export OMP_NUM_THREADS=1 # there is a worker on each core
    parallel=(-n "$(nproc)" -p no:benchmark)
  fi
  python3 -m pytest tests/ops -q -p no:cacheprovider -k "cuda and not emulation" "${parallel[@]}"
}

# Tests of what the engine does on GPUs alone: captured steps, forked streams, caches that move.
decoding() {
  python3 -m pytest tests/decoding/engine/test_cuda.py -q -p no:cacheprovider
}

# The caching allocator would hide reads past a tensor's end.
sanitizer() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tests=(python3 -m pytest tests/ops/test_bad_rows.py tests/ops/test_truncation.py -q -x
    -p no:cacheprovider -k "native and cuda")
  for tool in memcheck racecheck; do
    timeout 230 compute-sanitizer --tool "$tool" --error-exitcode 9 "${tests[@]}"
  done
}

# bench/predictions.md says what it should show on an H200.
bench() {
  rm -f build/gpu_check_bench.json # what a run before this one left
  python3 -m crossfade bench ops --json build/gpu_check_bench.json
}

fork() {
  rm -f build/gpu_check_fork.json
  python3 bench/fork.py --json build/gpu_check_fork.json
}

# Log-probs of a head of 4,096 x 151,936. TRL, Liger and cut-cross-entropy take part if they are
# installed.
logp() {
  rm -f build/gpu_check_logp.json
  python3 bench/logp.py --json build/gpu_check_logp.json --device cuda --dtype bfloat16 \
    --hidden 4096 --vocab 151936 --tokens 8192 --rounds 3 --kinds trained frozen
}

# What a decoding step of several models costs. PEFT takes part if it is installed.
steps() {
  rm -f build/gpu_check_steps.json
  local sets=(models)
  if python3 -c "import peft" 2>/dev/null; then sets+=(lora); fi
  python3 bench/decode.py --json build/gpu_check_steps.json --only "${sets[@]}" --rounds 3 --limit 30 \
    --new-tokens 16 48
}

# What a search costs. The official algorithm takes some 50 GB for prompts of 2,000 tokens.
search() {
  rm -f build/gpu_check_search.json
  python3 bench/search.py --json build/gpu_check_search.json --rounds 3 --limit 15
}

# What judgments cost: a tournament of 16 answers and all their pairs, beside generate.
judge() {
  rm -f build/gpu_check_judge.json
  python3 bench/judge.py --json build/gpu_check_judge.json --batch 8 64
}

# What corrections cost: 16 answers with objectives of their own, beside generate.
correct() {
  rm -f build/gpu_check_correct.json
  python3 bench/correct.py --json build/gpu_check_correct.json
}

# Drafts on models of the shape of Llama 3 1B: edits, and separate models of which one drafts.
speculation() {
  rm -f build/gpu_check_speculation.json
  python3 bench/speculation.py --json build/gpu_check_speculation.json --rounds 3 --batch 1 8 \
    --only "edits" "edits, a blend of two" "separate models"
}

export -f build ops decoding sanitizer bench fork logp steps search judge correct speculation
export site result
for name in "${@:-build ops decoding}"; do
  for one in $name; do
    case $one in
      build | ops | decoding | sanitizer | bench | fork | logp | steps | search | judge | \
        correct | speculation)
        stage "$one" bash -euo pipefail -c "$one"
        ;;
      *)
        echo "unknown stage '$one'; it must be one of build ops decoding sanitizer bench" \
          "fork logp steps search judge correct speculation" >&2
        exit 2
        ;;
    esac
  done
done
