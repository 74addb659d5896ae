"""Every test of transformers' that skips on a Starformer, and why; all others have to run.

`python -m tests.nlp.hf.skips` writes the list as a table.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Skip:
    """Tests by a pattern of their names, the reason, and in which classes (a part of the name).

    With `always` the tests do not apply to the model and skip on every machine; the others run
    where the machine has what they need. `since` is the first transformers that has the tests; the
    list as a whole is for 5.23 and later.
    """

    tests: str
    reason: str
    always: bool = True
    classes: tuple[str, ...] = ("",)
    since: str = "5.23"

    def applies(self, test_class: str, test: str) -> bool:
        """Return True if this entry is about a test of a class."""
        return fnmatchcase(test, self.tests) and any(part in test_class for part in self.classes)


COMPOSITE = "for models made of models with configurations of their own"
CONVERSION = "no old layout of the weights has to be converted on loading"
EXPERTS = "no mixture of experts"
FP32 = "no module is kept in float32 whatever the model's type"

ANNOTATED = "transformers' generic heads, used here too, annotate `**kwargs` with a string"

MODEL = [
    Skip(
        "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
        ANNOTATED,
        classes=("StarformerTest", "Encoder"),
    ),
    Skip("test_attn_implementation_composite_models", COMPOSITE),
    Skip("test_can_set_attention_dynamically_composite_model", COMPOSITE),
    Skip("test_internal_model_config_and_subconfig_are_same", COMPOSITE),
    Skip("test_sdpa_can_dispatch_composite_models", COMPOSITE),
    Skip("test_can_load_from_already_mapped_keys", CONVERSION),
    Skip("test_reverse_loading_mapping", CONVERSION),
    Skip("test_eager_matches_batched_and_grouped_inference_*", EXPERTS),
    Skip("test_fsdp2_expert_parallel_*", EXPERTS),
    Skip("test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel", EXPERTS),
    Skip("test_moe_*", EXPERTS),
    Skip("test_output_router_logits_from_config", EXPERTS),
    Skip("test_keep_in_fp32_modules*", FP32),
    Skip("test_model_rope_with_partial_rotation", "rotary embeddings turn the whole head"),
    Skip("test_resize_position_vector_embeddings", "positions are rotary, not learned"),
    Skip("test_sliding_window_mask", "attention has no window"),
    Skip("test_vision_axial_rope", "for images"),
    Skip(
        "test_can_capture_specific_layers_hidden_states",
        "reads `hidden_states`, of which an encoder-decoder has two",
        classes=("Seq2Seq",),
    ),
    Skip(
        "test_bc_cache_name_forward",
        "where a model or a generic head takes or returns no cache",
        classes=("StarformerTest", "Encoder"),
        since="5.24",
    ),
    Skip("test_tp_generation*", "it does not generate", classes=("Encoder",)),
    Skip(
        "test_tp_[fbg]*",
        "they call a model with the encoder's input alone",
        classes=("Seq2Seq",),
    ),
    Skip(
        "test_causal_lm_loss_honors_shift_labels",
        "for decoders",
        classes=("Encoder", "Seq2Seq"),
    ),
    Skip(
        "test_encoder_decoder_loss_no_double_shift",
        "for encoder-decoders",
        classes=("Encoder", "StarformerTest"),
    ),
]

ACCELERATOR = "needs a GPU"
DEEPSPEED = "needs deepspeed"
FLASH = "needs flash-attn and a GPU"
WORKERS = "needs four processors"

MACHINE = [
    Skip("test_can_load_with_device_context_manager", ACCELERATOR, False),
    Skip("test_can_load_with_global_device_set", ACCELERATOR, False),
    Skip("test_cpu_offload", ACCELERATOR, False),
    Skip("test_disk_offload_*", ACCELERATOR, False),
    Skip("test_flex_attention_with_grads", ACCELERATOR, False),
    Skip("test_model_parallelism", "needs two GPUs", False),
    Skip("test_sdpa_can_compile_dynamic", ACCELERATOR, False),
    Skip("test_sdpa_can_dispatch_on_flash", ACCELERATOR, False),
    Skip("test_torch_compile_for_training", "needs a GPU and RUN_SLOW=1", False),
    Skip("test_*_with_deepspeed*", DEEPSPEED, False),
    Skip("test_flash_attn_[234]_*", FLASH, False),
    Skip("test_flash_attn_kernels_*", "needs the package kernels and its hub", False),
    Skip("test_kernels_can_load_without_crashing", "needs the package kernels and its hub", False),
    Skip("test_hsdp_grad_accumulation_vs_single_device_0_*", WORKERS, False),
    Skip("test_hsdp_save_load*", WORKERS, False),
    Skip("test_tp_generation_quantized", "needs torchao", False),
    Skip("test_tp_[fbg]*", "for CPUs, two of them", False),
    Skip("test_fsdp2_*", "needs two processors", False),
    Skip("test_hsdp_*", "needs two processors", False),
]

# mixins and files of transformers' that are not run at all
LEFT_OUT = {
    "GenerationTesterMixin, ExportTesterMixin": "the source archive lacks them",
    "PipelineTesterMixin": "the source archive lacks the pipelines' tests; models come from a hub",
    "ExpertParallelTesterMixin": EXPERTS,
    "FSDPTesterMixin on encoders and encoder-decoders": "it builds `AutoModelForCausalLM`",
    "test_executorch.py": "needs a model from a hub",
}


def entry(test_class: str, test: str) -> Skip | None:
    """Return the entry for a test of a class, or `None`."""
    return next((skip for skip in MODEL + MACHINE if skip.applies(test_class, test)), None)


def table() -> str:
    """Write the list as a Markdown table."""
    lines = ["| tests | of | why they skip |", "|---|---|---|"]
    names = {"": "all", "StarformerTest": "decoder", "Encoder": "encoder", "Seq2Seq": "seq2seq"}
    for skip in MODEL + MACHINE:
        of = ", ".join(names[part] for part in skip.classes)
        where = "" if skip.always else ", on this kind of machine"
        lines.append(f"| `{skip.tests}` | {of} | {skip.reason}{where} |")
    lines += [f"| {name} | all | {reason} |" for name, reason in LEFT_OUT.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
