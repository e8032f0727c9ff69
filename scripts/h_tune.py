# ruff: noqa
"""Temporary."""

import os, sys, tempfile, time

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
from collections import Counter
import torch, triton
import bench_prefill_graphs as b
from nanovllm import LLM
from nanovllm.engine import graphs as g, padded_prefill as pp, model_runner as mr
from nanovllm.kernels import prefill_tiles as pt, varlen_prefill as vp
from nanovllm.quantization import unquantized as un
from workloads import write_shape

num, secs = Counter(), Counter()
phase = ["before"]


def listener(*, src, metadata, metadata_group, times, cache_hit):
    key = (phase[0], getattr(src, "name", "?"))
    num[key] += 1
    secs[key] += times.total / 1e6


try:
    triton.knobs.compilation.listener = listener
except Exception as e:
    print(e)
capture = g.StepGraphs.capture


def timed(self, run, sizes, comp, pool=None):
    phase[0] = run.__name__
    t = time.perf_counter()
    for s in comp:
        run(s)
    torch.cuda.synchronize()
    t1 = time.perf_counter()
    out = capture(self, run, sizes, [], pool)
    print(
        f"{run.__name__}: compile/eager {t1 - t:.1f} s, capture {time.perf_counter() - t1:.1f} s",
        flush=True,
    )
    return out


g.StepGraphs.capture = timed
with tempfile.TemporaryDirectory() as d:
    path = write_shape("qwen3-0.6b", d)
    t = time.perf_counter()
    llm = LLM(
        path, load_format="dummy", attention_backend="triton", max_model_len=4096, max_num_seqs=256
    )
    print("start-up, empty Triton cache:", round(time.perf_counter() - t, 1), flush=True)
for k, n in num.items():
    print("   ", k, n, round(secs[k], 1))
r = llm.model_runner


def table(name):
    row = []
    with torch.inference_mode():
        for cached in (0, 1024):
            for n in b.SIZES:
                seqs = b.make_seqs(llm, n, cached, 512)
                r.launch_prefill(seqs)
                size = r.prefill_graphs.padded_size(n)
                row.append(
                    round(b.microseconds(lambda: r.prefill_graphs.graphs[size].graph.replay())[1])
                )
    print(name, row, flush=True)


def recapture():
    r.prefill_graphs.clear()
    with torch.inference_mode():
        r.prefill_graphs.capture(r._prefill, r.padded_prefill.sizes, r.padded_prefill.sizes)


table("default")
choose = un.choose_matmul
un.choose_matmul = lambda x, w, s: (
    un.CUBLAS if x.shape[0] > 1 and un.get_context().is_prefill else choose(x, w, s)
)
recapture()
table("cublas")
un.choose_matmul = choose
config = vp.prefill_config
for m, n, w, s in ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4)):
    c = vp.PrefillConfig(m, n, w, s)
    pt.prefill_config = pp.prefill_config = lambda *a, c=c: c
    blocks = r.padded_prefill.buffers.blocks_per_seq
    r.padded_prefill = pp.PaddedPrefill(llm.config, r.attention_layers[0], blocks, r.device)
    recapture()
    table(str(c))
pt.prefill_config = pp.prefill_config = config
r.padded_prefill = pp.PaddedPrefill(llm.config, r.attention_layers[0], blocks, r.device)
recapture()
print("job", b.run_job(llm), flush=True)
b.profile_job(llm)
