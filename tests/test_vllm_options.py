"""Options of vLLM's `LLM`: other names, those without effect, those that are absent, a tokenizer of
one's own, revisions, and names of methods.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Checkpoint, greedy, make_llm

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.vllm_compat.vllm_names import ABSENT_METHODS
from nanovllm.vllm_compat.vllm_options import ABSENT_OPTIONS, our_options

WITHOUT_EFFECT: dict[str, Any] = dict(
    disable_log_stats=True,
    enable_chunked_prefill=True,
    swap_space=4,
    disable_custom_all_reduce=True,
    distributed_executor_backend="mp",
    trust_remote_code=False,
    tokenizer_mode="auto",
    quantization=None,
    pipeline_parallel_size=1,
    speculative_config=None,
    enable_lora=False,
    runner="generate",
)


# --- names of options -----------------------------------------------------------------------------


def test_options_without_effect_are_named_in_one_line(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain = Config.from_options(checkpoint.path, dict(device="cpu", seed=None, dtype="auto"))
        assert not caplog.records
        config = Config.from_options(checkpoint.path, dict(device="cpu", **WITHOUT_EFFECT))
    (record,) = caplog.records
    named = ", ".join(name for name, value in WITHOUT_EFFECT.items() if value is not None)
    assert record.getMessage() == f"nano-vllm: without effect here: {named}"
    for name in ("seed", "dtype", "max_model_len", "enable_prefix_caching"):
        assert getattr(config, name) == getattr(plain, name)


def test_what_vllm_has_as_defaults_is_accepted(checkpoint: Checkpoint) -> None:
    """Scripts pass many options on from a command line, most of them as they are by default."""
    defaults: dict[str, Any] = dict(
        runner="auto",
        convert="auto",
        tokenizer=None,
        tokenizer_mode="auto",
        skip_tokenizer_init=False,
        trust_remote_code=False,
        allowed_local_media_path="",
        allowed_media_domains=None,
        tensor_parallel_size=1,
        dtype="auto",
        quantization=None,
        revision=None,
        tokenizer_revision=None,
        chat_template=None,
        seed=0,
        gpu_memory_utilization=0.9,
        cpu_offload_gb=0,
        enforce_eager=False,
        enable_return_routed_experts=False,
        disable_custom_all_reduce=False,
        hf_token=None,
        hf_overrides=None,
        mm_processor_kwargs=None,
        pooler_config=None,
        structured_outputs_config=None,
        profiler_config=None,
        attention_config=None,
        kv_cache_memory_bytes=None,
        compilation_config=None,
        logits_processors=None,
        load_format="auto",
        max_model_len=None,
        block_size=None,
        max_num_seqs=None,
        max_num_batched_tokens=None,
        enable_prefix_caching=None,
        num_gpu_blocks_override=None,
        max_logprobs=20,
    )
    config = Config.from_options(checkpoint.path, {**defaults, "device": "cpu"})
    plain = Config.from_options(checkpoint.path, {"device": "cpu"})
    for name in Config.__dataclass_fields__:
        if name not in ("hf_config", "architectures"):
            assert getattr(config, name) == getattr(plain, name), name


def test_the_line_goes_to_stderr(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for handler in list(logging.getLogger().handlers):  # pytest's own
        monkeypatch.setattr(handler, "emit", lambda record: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    Config.from_options(checkpoint.path, dict(device="cpu", swap_space=4, disable_log_stats=True))
    captured = capsys.readouterr()
    assert captured.err == "nano-vllm: without effect here: swap_space, disable_log_stats\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("trust_remote_code", True, "own code is never run"),
        ("speculative_config", {"method": "ngram"}, "one token"),
        ("enable_lora", True, "merge the adapter"),
        ("pipeline_parallel_size", 2, "tensor_parallel_size"),
        ("data_parallel_size", 2, "an engine for each"),
        ("enable_chunked_prefill", False, "max_num_batched_tokens"),
        ("tokenizer_mode", "mistral", "transformers"),
        ("generation_config", "vllm", "sampling_params"),
        ("rope_scaling", {"factor": 2.0}, "hf_overrides"),
        ("worker_extension_cls", "module.Class", "load_weights"),
        ("pipeline_parallel_size", True, "tensor_parallel_size"),  # equals 1, and is none
    ],
)
def test_an_absent_option_names_the_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"LLM has no option {name}=.*{remedy}"):
        LLM(DEMO_MODEL, device="cpu", **{name: value})


def test_what_is_an_option_here_is_not_called_absent() -> None:
    names = set(Config.__dataclass_fields__)
    assert not names & set(ABSENT_OPTIONS)
    assert all(rule.harmless is None or rule.remedy for rule in ABSENT_OPTIONS.values())


def test_other_names(checkpoint: Checkpoint) -> None:
    options = dict(device="cpu", block_size=16, num_gpu_blocks_override=64, max_model_len=128)
    config = Config.from_options(checkpoint.path, options)
    assert (config.kvcache_block_size, config.num_kvcache_blocks) == (16, 64)
    unset = our_options(dict(block_size=None, enable_prefix_caching=None, seed=None))
    assert unset == dict(kvcache_block_size=None, seed=None)
    with pytest.raises(TypeError, match="block_size and kvcache_block_size are two names of one"):
        our_options(dict(block_size=16, kvcache_block_size=16))
    with pytest.raises(ValueError, match="kvcache_block_size must be at least 1, not 0"):
        LLM(checkpoint.path, device="cpu", block_size=0)


def test_bytes_of_the_cache(checkpoint: Checkpoint) -> None:
    """2 layers of 2 KV heads of 16 numbers of 4 bytes, for K and for V: 512 bytes a token."""
    options: dict[str, Any] = dict(device="cpu", max_model_len=64, block_size=16)
    llm = LLM(checkpoint.path, **options, kv_cache_memory_bytes=6 * 16 * 512 + 511)
    assert llm.config.num_kvcache_blocks == 6 and llm.model_runner.kv_cache.shape[2] == 6  # type: ignore[union-attr]
    assert len(llm.generate([[1, 2]], greedy(62), use_tqdm=False)[0].token_ids) == 62
    llm.exit()
    with pytest.raises(ValueError, match="a KV cache of 3 blocks of 16 tokens cannot hold"):
        LLM(checkpoint.path, **options, kv_cache_memory_bytes=4 * 16 * 512 - 1)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo's tokenizer and nothing else."""
    path = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL) / name, path)
    return path


@pytest.fixture
def bare_model(tmp_path: Path) -> Path:
    """The demo without a tokenizer."""
    path = tmp_path / "bare"
    shutil.copytree(DEMO_MODEL, path, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    return path


def test_a_tokenizer_of_its_own(bare_model: Path, tokenizer_alone: Path) -> None:
    expected = make_llm(DEMO_MODEL).generate("introduce yourself", greedy(8), use_tqdm=False)[0]
    bare = make_llm(str(bare_model))
    assert bare.get_tokenizer() is None
    with pytest.raises(ValueError, match="prompt 0 is text"):
        bare.generate("introduce yourself", greedy(8))
    llm = make_llm(str(bare_model), tokenizer=str(tokenizer_alone))
    assert llm.config.tokenizer == str(tokenizer_alone)
    output = llm.generate("introduce yourself", greedy(8), use_tqdm=False)[0]
    assert output == expected and output.text
    with pytest.raises(ValueError, match="is a directory without a tokenizer's files"):
        make_llm(DEMO_MODEL, tokenizer=str(bare_model))
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        make_llm(DEMO_MODEL, tokenizer="no such/tokenizer at all")
    with pytest.raises(TypeError, match="tokenizer must be a path or a hub id, not 3"):
        make_llm(DEMO_MODEL, tokenizer=3)


def test_without_a_tokenizer() -> None:
    llm = make_llm(DEMO_MODEL, skip_tokenizer_init=True)
    plain = make_llm(DEMO_MODEL)
    assert llm.get_tokenizer() is None and plain.config.eos == llm.config.eos
    prompt = plain.get_tokenizer().encode("introduce yourself")  # type: ignore[union-attr]
    params = SamplingParams(temperature=0, max_tokens=8)
    output, expected = (each.generate([prompt], params, use_tqdm=False)[0] for each in (llm, plain))
    assert output.token_ids == expected.token_ids and expected.text and output.text == ""
    with pytest.raises(ValueError, match="prompt 0 is text, and skip_tokenizer_init"):
        llm.generate("introduce yourself")


# --- the hub --------------------------------------------------------------------------------------


def test_revisions_and_directory_of_downloads(
    monkeypatch: pytest.MonkeyPatch, tokenizer_alone: Path, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, local_files_only: bool = False, **options: Any) -> str:
        del options["allow_patterns"]
        options.pop("ignore_patterns", None)
        calls.append(dict(repo_id=repo_id, **options))
        if repo_id.startswith("lost"):
            raise ConnectionError("no network")
        return str(tokenizer_alone) if repo_id == "org/tokenizer" else DEMO_MODEL

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = Config("org/model", device="cpu")
    assert calls == [dict(repo_id="org/model")] and config.tokenizer == DEMO_MODEL
    calls.clear()
    options: dict[str, Any] = dict(device="cpu", revision="v1", download_dir=str(tmp_path))
    assert Config("org/model", **options).model == DEMO_MODEL
    of_model = dict(repo_id="org/model", revision="v1", cache_dir=str(tmp_path))
    assert calls == [of_model]
    calls.clear()
    config = Config("org/model", tokenizer="org/tokenizer", tokenizer_revision="v2", **options)
    assert calls == [of_model, dict(of_model, repo_id="org/tokenizer", revision="v2")]
    assert (config.model, config.tokenizer) == (DEMO_MODEL, str(tokenizer_alone))
    calls.clear()
    Config("org/model", tokenizer_revision="v2", **options)
    assert calls == [of_model, dict(of_model, revision="v2")]
    with pytest.raises(ValueError, match="tokenizer 'lost/one' is neither .*no network"):
        Config("org/model", tokenizer="lost/one", **options)


# --- names of methods -----------------------------------------------------------------------------


def test_names_of_methods() -> None:
    llm = make_llm(DEMO_MODEL)
    assert llm.llm_engine is llm and llm.llm_engine.model_config.max_model_len == 256
    request_id = llm.llm_engine.add_request("Hello", greedy(3))
    assert llm.has_unfinished_requests()
    results = []
    while llm.llm_engine.has_unfinished_requests():
        results += llm.llm_engine.step()[0]
    assert [number for number, _ in results] == [request_id]
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    assert metrics["vllm:generation_tokens"] == 3 == llm.stats()["completion_tokens"]
    assert metrics["vllm:prompt_tokens"] == len(results[0][1].prompt_token_ids)
    llm.exit()


def test_options_of_generate(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    options: dict[str, Any] = dict(use_tqdm=False, lora_request=None, priority=None)
    assert len(llm.generate([[1]], greedy(2), **options)[0].token_ids) == 2
    with pytest.raises(TypeError, match="LLM.generate has no option priority=.*order of arrival"):
        llm.generate([[1]], greedy(2), priority=[3])
    with pytest.raises(TypeError, match="LLM.generate has no option 'use_tdqm'"):
        llm.generate([[1]], greedy(2), use_tdqm=False)
    llm.exit()


def test_options_of_chat() -> None:
    llm = make_llm(DEMO_MODEL)
    messages: Any = [{"role": "user", "content": "introduce yourself"}]
    plain = llm.chat(messages, greedy(8), use_tqdm=False)[0]
    template = plain.prompt
    assert template is not None and "introduce yourself" in template
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    assert plain.prompt_token_ids == tokenizer.encode(template, add_special_tokens=False)
    options: dict[str, Any] = dict(
        lora_request=None,
        chat_template=None,
        chat_template_content_format="auto",
        add_generation_prompt=True,
        continue_final_message=False,
        tools=None,
        chat_template_kwargs=None,
    )
    assert llm.chat(messages, greedy(8), use_tqdm=False, **options) == [plain]
    cut = llm.chat(messages, greedy(8), use_tqdm=False, truncation=True, max_length=3)[0]
    assert len(cut.prompt_token_ids) == 3 and cut.prompt is None
    with pytest.raises(TypeError, match="LLM.chat has no option lora_request=.*merge"):
        llm.chat(messages, greedy(8), lora_request="adapter")
    llm.exit()


def test_options_of_embed_and_score() -> None:
    llm = make_llm(DEMO_MODEL)
    options: dict[str, Any] = dict(use_tqdm=False, lora_request=None, tokenization_kwargs=None)
    (output,) = llm.embed("Hello", **options)
    assert output.outputs.hidden_size == len(output.outputs.embedding) == 256
    with pytest.raises(TypeError, match="LLM.embed has no option lora_request=3; merge"):
        llm.embed("Hello", lora_request=3)
    with pytest.raises(TypeError, match="LLM.score has no option 'template_'"):
        llm.score("Hello", "Hello", template_="")
    llm.exit()


def test_absent_methods_say_what_to_use() -> None:
    llm = make_llm(DEMO_MODEL)
    for name, remedy in ABSENT_METHODS.items():
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; {re.escape(remedy)}"):
            getattr(llm, name)
        assert not hasattr(llm, name)
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'genrate'$"):
        llm.genrate  # noqa: B018
    llm.exit()
