"""What a trainer on the same GPU waits for: new weights, sleep, waking up; and the memory it gets.

    python scripts/bench_trainer.py [--model qwen3-0.6b]

Random weights. The first round pins the host's memory and captures the CUDA graphs once more.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from workloads import write_shape


def timed(what: str, run: Callable[[], Any]) -> Any:
    """Run, and print how long it took and how much of the GPU's memory is free after it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    free, total = torch.cuda.mem_get_info()
    print(f"{what:<40} {seconds:7.3f} s, {free / 2**30:5.1f} of {total / 2**30:.1f} GiB free")
    return result


def load_weights(llm: LLM) -> None:
    """Load copies of those tensors that have the same name and shape in a checkpoint."""
    whole = {
        name: param.detach().clone()
        for name, param in llm.model_runner.model.named_parameters()
        if "qkv_proj" not in name and "gate_up_proj" not in name
    }
    num_bytes = sum(tensor.nbytes for tensor in whole.values())
    print(f"{len(whole)} tensors, {num_bytes / 2**30:.2f} GiB")
    timed("load_weights, tensors on the GPU", lambda: llm.load_weights(whole))
    on_host = {name: tensor.cpu() for name, tensor in whole.items()}
    timed("load_weights, tensors on the host", lambda: llm.load_weights(on_host))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    args = parser.parse_args()
    torch.cuda.init()
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(args.model, directory)
        llm = timed("start-up", lambda: LLM(path, load_format="dummy"))
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    prompts = [[7 + number, 8, 9] for number in range(64)]

    def generate() -> list[list[int]]:
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = generate()
    load_weights(llm)
    torch.cuda.empty_cache()
    for number in (1, 2, 3):
        timed(f"{number}. sleep(level=1)", llm.sleep)
        timed(f"{number}. wake_up()", llm.wake_up)
    assert generate() == expected
    timed("sleep(level=1)", llm.sleep)
    timed("wake_up('weights')", lambda: llm.wake_up("weights"))
    timed("wake_up('kv_cache')", lambda: llm.wake_up("kv_cache"))
    assert generate() == expected
    timed("sleep(level=2)", lambda: llm.sleep(level=2))
    timed("wake_up()", llm.wake_up)
    timed("exit()", llm.exit)


if __name__ == "__main__":
    main()
