"""What a checkpoint's `generation_config.json` says about generating, as options.

The file is transformers'. A field of it is an option here, or does nothing to the tokens that come
out, or is refused where it would do something: a model must not generate in another way than its
makers said without a word.
"""

import difflib
from collections.abc import Mapping
from typing import Any

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
OBEYED = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    *SAMPLING,
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "num_return_sequences",
)
# Values at which a field does nothing, beside null, False and what is empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "token_healing": (),
    "watermarking_config": (),
}
# The same of fields that act on draws alone.
NEUTRAL_DRAWS: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}


def settings_of(generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that a generation config sets, those that act on draws alone included.

    Raises:
        ValueError: a field that would act and has no option here, or a misspelt one.
        TypeError: no mapping.
    """
    config = {} if generation_config is None else generation_config
    if not isinstance(config, Mapping):
        raise TypeError(
            f"model.generation_config is a {type(config).__name__}: give a dict with the fields of "
            "a generation_config.json"
        )
    for name, value in config.items():
        if name in NEUTRAL and _acts(value, NEUTRAL[name]):
            raise ValueError(_unsupported(name, value))
        if name in NEUTRAL_DRAWS and config.get("do_sample") and _acts(value, NEUTRAL_DRAWS[name]):
            raise ValueError(_unsupported(name, value))
        if name not in OBEYED:
            _check_spelling(name)
    return {name: config[name] for name in OBEYED if config.get(name) is not None}


def _acts(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or value is False or (isinstance(value, list | dict | str) and not value):
        return False
    return isinstance(value, bool) or value not in neutral


def _unsupported(name: str, value: Any) -> str:
    return (
        f"generation_config.json says {name}={value!r}, which is not supported here: generate "
        f"with transformers, or take it out (model.generation_config.pop({name!r}), or edit the "
        "file)"
    )


def _check_spelling(name: str) -> None:
    """Raise `ValueError` for a field within a typing error of one that acts; other unknown ones,
    such as notes of another program, do nothing."""
    known = [*OBEYED, *NEUTRAL, *NEUTRAL_DRAWS]
    if name in known or name in INERT:
        return
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    if nearest:
        raise ValueError(
            f"generation_config.json has a field {name!r}: {nearest[0]!r} may be meant; correct "
            "it, or take it out"
        )


# Fields of transformers that change no token: speed, memory, what is returned, notes. Those of
# beams do nothing without beams.
INERT = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "generation_kwargs",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    }
)
