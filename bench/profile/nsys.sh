#!/usr/bin/env bash
# A timeline of three training steps with Nsight Systems, and the kernels that take the time.
#   bash bench/profile/nsys.sh OUT [flags of bench.profile.target, e.g. --variant "CUDA graph"]
set -euo pipefail
out=${1:?"usage: nsys.sh OUT [flags of bench.profile.target]"}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON_GPU:-python3}

# Only the warm steps, between cudaProfilerStart and -Stop; kernels inside a graph one by one; the ranges of the code.
nsys profile --force-overwrite true --output "$out/step" \
    --capture-range cudaProfilerApi --capture-range-end stop \
    --trace cuda,nvtx,cudnn,cublas --cuda-graph-trace node \
    "$python" -m bench.profile.target --device cuda "$@"
nsys stats --force-export true --report cuda_gpu_kern_sum --format csv --output "$out/step" "$out/step.nsys-rep"
nsys stats --report nvtx_gpu_proj_sum --format csv --output "$out/step" "$out/step.nsys-rep"
"$python" -m bench.profile.top_kernels "$out/step_cuda_gpu_kern_sum.csv"
