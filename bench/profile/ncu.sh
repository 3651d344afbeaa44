#!/usr/bin/env bash
# What limits the five kernels that take the most time of a training step, with Nsight Compute.
#   bash bench/profile/ncu.sh OUT [flags of bench.profile.target, e.g. --variant "fused losses"]
set -euo pipefail
out=${1:?"usage: ncu.sh OUT [flags of bench.profile.target]"}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON_GPU:-python3}

"$python" -m bench.profile.target --device cuda --steps 1 --kernels "$out/kernels.csv" "$@"
"$python" -m bench.profile.top_kernels "$out/kernels.csv"
hottest=$("$python" -m bench.profile.top_kernels "$out/kernels.csv" --count 5 --regex)

# Each launch is replayed once per pass of counters, so few of them: the first twenty that match. Clocks are left alone,
# because the machine may be shared. Reading counters may need rights: ncu says so (ERR_NVGPUCTRPERM).
ncu --force-overwrite --export "$out/hottest" --profile-from-start off --clock-control none \
    --kernel-name "regex:$hottest" --launch-count 20 \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
    "$python" -m bench.profile.target --device cuda --steps 1 "$@"
ncu --import "$out/hottest.ncu-rep" --page details --csv > "$out/hottest.csv"
