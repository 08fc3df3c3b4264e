#!/usr/bin/env bash
# Every benchmark of an op, the layer of routed experts and the training step, on one GPU in less than nine minutes:
#
#   benchmarks/run_gpu.sh FILE [ARGUMENT...]      e.g. benchmarks/run_gpu.sh benchmarks/results/h100.jsonl
#
# Appends JSON lines to FILE as they are measured. ARGUMENTs go to the benchmarks of ops; `--sizes tiny --no-compile`
# shows on any machine that all of it runs. PYTHON names another interpreter, SECONDS_LEFT another limit.
# Rows of csrc/routing.cu are measured where it is built (docs/kernels.md has the command); else a line says they are absent.
# What the limit cuts off, and what fails, leaves a line that says so; the status is then 1.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: benchmarks/run_gpu.sh FILE [ARGUMENT...]" >&2
    exit 2
fi
file=$1
shift
python=${PYTHON:-$here/../.venv/bin/python}
limit=${SECONDS_LEFT:-525}
failed=0
mkdir -p "$(dirname "$file")"

measure() {
    local status=0 left=$((limit - SECONDS)) begun=$SECONDS
    if [ "$left" -gt 5 ]; then
        timeout --signal=INT --kill-after=5 "$left" "$python" "$here/$1" "${@:2}" --output "$file" >/dev/null || status=$?
    else
        status=124
    fi
    echo "$1 ${*:2}: $((SECONDS - begun)) s, status $status" >&2
    if [ "$status" -ne 0 ]; then
        failed=1
        printf '{"benchmark": "%s", "failed": "status %s%s"}\n' "$1" "$status" \
            "$([ $((limit - SECONDS)) -le 5 ] && echo ', the time was over')" >>"$file"
    fi
}

step=(--shape tokens=16384 shortest=1024 longest=4096 width=2048 layers=8 encode=2 decode=2 heads=16 kv_heads=8 ffn=5632
    text_rows=32768 codes=8192)
case " $* " in *" --sizes tiny "*) step=(--quick --steps 2) ;; esac
# What issue and README ask of a GPU comes first: a slow machine loses the end of the list.
measure bench_experts.py "$@"
measure bench_routing.py "$@"
measure bench_rms_norm.py "$@"
measure bench_swiglu.py "$@"
measure bench_qkv_prepare.py "$@"
measure bench_step.py --model mot --precision bf16 "${step[@]}"
measure bench_linear_cross_entropy.py "$@"
measure bench_attention.py "$@"
measure bench_split_ffn.py "$@"
measure bench_moe.py --precision bf16 "$@"
measure bench_step.py --precision bf16 "${step[@]}"
echo "$SECONDS s" >&2
exit "$failed"
