#!/usr/bin/env bash
# Every GPU test, every figure that README and docs/PERFORMANCE.md state, and a comparison with another
# commit. Run it from anywhere:
#
#   scripts/check_gpu.sh DIRECTORY [tests|figures]           # without a second word: both
#   scripts/check_gpu.sh DIRECTORY ranks|families|quantized|jobs
#   scripts/check_gpu.sh DIRECTORY compare BASE_DIRECTORY [WORKLOAD...]
#   scripts/check_gpu.sh DIRECTORY compare-ranks BASE_DIRECTORY
#
# Logs and results go to DIRECTORY. Each part takes less than ten minutes.
#   tests          on one GPU, six minutes; side by side, as what counts is that they pass
#   families       on one GPU, five minutes: 8B of Qwen and Llama, Gemma, a mixture of experts, windows
#   quantized      on one GPU, nine minutes: 8B in 16 bits, FP8 and INT4, the FP8 cache, each product alone
#   jobs           run-batch beside generate, with 1, 2, ... replicas on as many GPUs: two minutes each
#   figures        on one GPU, some seven minutes
#   ranks          tests and figures of tensor parallelism, on as many GPUs as there are
#   compare        bench.py of this tree and of the checkout BASE_DIRECTORY, in turn, on one GPU, six runs
#                  of each workload; prints the medians and their ratio. Without WORKLOADs those that share
#                  an engine: some eight minutes. `job` takes as long, `long` three minutes: each is a call
#                  of its own. A bench.py that takes but one name is compared one workload at a time
#   compare-ranks  the same on two GPUs: `prefill` and `mixed` of Qwen3-8B's shape
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
what=${2:-all}
base=${3:+$(cd "$3" && pwd)}
workloads=("${@:4}")
[[ ${#workloads[@]} -gt 0 ]] || workloads=(mixed single prefill prefix queue small medium)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
pytest=(timeout 400 python -m pytest -q -p no:cacheprovider -o faulthandler_timeout=120)
alone='memory or of_use or do_not_hold or test_times'  # what measures time or memory has the GPU to itself

num_gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }

bench() {  # NAME OPTIONS...
    echo "$1: bench.py ${*:2}"
    timeout 400 python bench.py "${@:2}" --json "$out/$1.json" 2>&1 | tee "$out/$1.log" | grep -E '^(Start-up|Total)|rror' | sed "s/^/$1: /"
}

# Runs bench.py of the base tree and of this one in turn, in the order base, new, new, base, so that a
# machine that gets slower or faster meanwhile favours neither. Each tree runs its own bench.py with its
# own package. The table is printed after each pair, so that it is there if time runs out.
compare() {  # NAME OPTIONS...
    local tree
    for tree in base-1 new-1 new-2 base-2; do
        if [[ $tree == base-* ]]; then
            (cd "$base" && PYTHONPATH=$base bench "$1-$tree" "${@:2}")
        else
            bench "$1-$tree" "${@:2}"
        fi
        if [[ $tree == new-1 || $tree == base-2 ]]; then
            python scripts/compare_json.py --base "$out/$1"-base-*.json --new "$out/$1"-new-*.json | tee "$out/$1.md"
        fi
    done
}

if [[ $what == compare* ]] && [[ ! -f $base/bench.py ]]; then
    echo "check_gpu.sh: $what needs the directory of a checkout to compare with, not '${3:-}'" >&2
    exit 2
fi
if [[ $what == all || $what == tests ]]; then
    i=0
    for selection in 'test_engine_gpu.py -k transformers' 'test_engine_gpu.py -k work_is_cut' \
        "test_engine_gpu.py -k 'not transformers and not work_is_cut and not ($alone)'" test_attention_gpu.py \
        "test_sampler_gpu.py ../test_sampling_options.py -k 'not ($alone)'" \
        "test_requests_gpu.py test_trace_gpu.py test_trainer_gpu.py -k 'not ($alone)'" '../test_kernels.py ../test_sampling.py' \
        "test_families_gpu.py -k gemma" "test_families_gpu.py -k 'not gemma'" \
        'test_prefill_graphs_gpu.py test_moe_gpu.py test_rope_gpu.py ../test_gate_and_norm.py' test_attention_options_gpu.py \
        test_shared_prefix_gpu.py test_fp8_cache_gpu.py test_fp8_gpu.py test_int4_gpu.py ../test_fp8_cache.py \
        "test_copy_on_write_gpu.py test_hopper_gpu.py -k 'not hopper_gemm'" 'test_hopper_gpu.py -k hopper_gemm' \
        'test_pooling_gpu.py test_structured_gpu.py'; do
        eval "(cd tests/gpu && OMP_NUM_THREADS=2 ${pytest[*]} -c ../../pyproject.toml $selection)" > "$out/tests$i.log" 2>&1 &
        i=$((i + 1))
    done
    wait
    "${pytest[@]}" -s tests/gpu --ignore tests/gpu/test_parallel_gpu.py -k "$alone" > "$out/tests$i.log" 2>&1
    tail -n 4 "$out"/tests*.log
fi
if [[ $what == all || $what == figures ]]; then
    bench all --workload all --repeats 3
    bench filters --workload mixed --repeats 3 --sampling top_k=20 top_p=0.95
    bench penalties --workload mixed --repeats 3 --sampling repetition_penalty=1.1 presence_penalty=0.5 frequency_penalty=0.2
    bench trace --workload mixed --repeats 3 --trace "$out/trace.json"
    timeout 120 python scripts/measure_notebook.py "$out/decode.json"
    timeout 60 python scripts/profile_steps.py > "$out/profile.txt" 2>&1
fi
if [[ $what == families ]]; then
    for shape in qwen3-8b llama-3.1-8b; do
        bench "$shape-single" --shape $shape --workload single --repeats 3
        bench "$shape-mixed" --shape $shape --workload mixed --repeats 2
    done
    bench gemma-3-1b --shape gemma-3-1b --workload single --repeats 3
    bench qwen3-30b-a3b-single --shape qwen3-30b-a3b --workload single --repeats 3
    bench qwen3-30b-a3b-mixed --shape qwen3-30b-a3b --workload mixed --max-num-seqs 64 --repeats 1
    timeout 60 python scripts/bench_moe.py 2>&1 | tee "$out/moe.txt"
    timeout 60 python scripts/bench_attention.py --window 512 1024 2>&1 | tee "$out/window.txt"
    timeout 90 python scripts/profile_steps.py --shape qwen3-30b-a3b --batch 1 64 > "$out/profile-moe.txt" 2>&1
fi
if [[ $what == quantized ]]; then
    eight=(--shape qwen3-8b --repeats 2)
    bench 8b-fp8 "${eight[@]}" --workload single small mixed prefill --quantization fp8
    bench 8b-int4 "${eight[@]}" --workload single small mixed --quantization int4
    bench 8b-fp8-cache "${eight[@]}" --workload mixed --quantization fp8 --kv-cache-dtype fp8
    bench 8b "${eight[@]}" --workload single small mixed prefill
    bench cache-8 --workload mixed --repeats 3 --kv-cache-dtype fp8
    bench cache-16 --workload mixed --repeats 3
    timeout 120 python scripts/bench_quantized.py 2>&1 | tee "$out/products.md"
    timeout 90 python scripts/bench_attention.py --fp8 2>&1 | tee "$out/attention-fp8.txt"
fi
if [[ $what == jobs ]]; then
    timeout 570 python scripts/bench_job.py --replicas $(seq 1 "$(num_gpus)") 2>&1 | tee "$out/jobs.md"
fi
if [[ $what == ranks ]]; then
    gpus=$(num_gpus)
    on() {  # GPUS, WORKLOADS of as many ranks
        local ranks; ranks=$(tr ',' '\n' <<< "$1" | wc -l)
        export CUDA_VISIBLE_DEVICES=$1
        bench "8b-$ranks" --workload mixed --shape qwen3-8b --repeats 1 --tensor-parallel-size "$ranks"
        [[ $ranks -gt 2 ]] || bench "single-$ranks" --workload single --repeats 2 --tensor-parallel-size "$ranks"
    }
    for size in 8 4; do
        [[ $size -gt $gpus ]] || (on "$(seq -s, 0 $((size - 1)))")
    done
    (on 0,1) &
    [[ $gpus -gt 2 ]] || wait  # else one GPU and two are measured side by side
    (on $((gpus - 1))) &
    wait
    "${pytest[@]}" tests/gpu/test_parallel_gpu.py tests/gpu/test_trainer_gpu.py -k 'not transformers' > "$out/tests0.log" 2>&1
    "${pytest[@]}" tests/gpu/test_parallel_gpu.py -k transformers > "$out/tests1.log" 2>&1
    tail -n 4 "$out"/tests*.log
    timeout 60 python scripts/bench_all_reduce.py | tee "$out/all_reduce.log"
fi
if [[ $what == compare ]]; then
    compare "compare-$(IFS=-; echo "${workloads[*]}")" --workload "${workloads[@]}" --repeats 3
fi
if [[ $what == compare-ranks ]]; then
    export CUDA_VISIBLE_DEVICES=0,1
    for workload in prefill mixed; do
        compare "compare-8b-$workload" --workload "$workload" --shape qwen3-8b --repeats 3 --tensor-parallel-size 2
    done
fi
