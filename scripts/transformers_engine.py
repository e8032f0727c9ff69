"""The engine that bench.py compares with: transformers' own `generate`, in static batches."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, logging

from scripts.workloads import Load


def load_transformers(
    path: str, has_random_weights: bool, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """The model at `path` as transformers runs it: its weights, or as many random ones."""
    logging.set_verbosity_error()  # newer versions warn of names that work in all of them
    if not has_random_weights:
        model = AutoModelForCausalLM.from_pretrained(
            path, torch_dtype=dtype, trust_remote_code=False
        )
        return model.eval().to(device)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, torch_dtype=dtype).eval()


@torch.inference_mode()
def run_transformers(model: PreTrainedModel, load: Load, batch_size: int) -> None:
    """The same load in static, left-padded batches, each as long as its longest output."""
    for start in range(0, len(load.prompts), batch_size):
        prompts = load.prompts[start : start + batch_size]
        steps = max(load.output_lens[start : start + batch_size])
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=0,
            do_sample=False,
            min_new_tokens=steps,
            max_new_tokens=steps,
        )
        made = out.shape[1] - width
        if made != steps:
            raise RuntimeError(f"transformers made {made} tokens of the {steps} asked for")
