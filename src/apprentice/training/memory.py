"""Where memory is short: DeepSpeed's configuration, and what to change when it is full."""

from apprentice import gpus
from apprentice.params import Sft, Zero


def zero_config(zero: Zero) -> dict | None:
    """DeepSpeed's form of the settings, for the `deepspeed` of a trainer's arguments; None is without DeepSpeed.

    To be called in a rank.
    "auto" is what the trainer's arguments say. Make those before the model is loaded: with stage 3 each rank then
    loads its part only.
    """
    if not zero.stage:
        return None
    if not gpus.used():
        import deepspeed

        # Its own reduction in shared memory would first be compiled, for a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # on GPUs accelerate does it
    division = {"stage": zero.stage, "contiguous_gradients": True, "overlap_comm": gpus.used()}
    if zero.stage == 3:
        division["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.offload:
        place = {"device": "cpu", "pin_memory": gpus.used()}
        division |= {name: place for name in ("offload_optimizer", "offload_param")[: zero.stage - 1]}
    return {
        "zero_optimization": division,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # torch's AdamW, as without DeepSpeed, whose own would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def relief(where: str, sft: Sft) -> str:
    """The settings that would help when memory is full, what costs least first. where: the section's place."""
    steps = [
        (sft.micro_batch_size > 1, f"micro_batch_size: {sft.micro_batch_size // 2} (the batch stays {sft.batch_size})"),
        (not sft.gradient_checkpointing, "gradient_checkpointing: true"),
        (sft.lora.quantization is None and sft.zero.stage < 3, "lora.quantization: nf4"),
        (True, f"max_length below {sft.max_length} (longer rows are left out)"),
        (sft.lora.vision, "lora.vision: false"),
        (sft.zero.stage < 2, "zero.stage: 2"),
        (sft.zero.stage < 3 and sft.lora.quantization is None, "zero.stage: 3"),
        (not sft.zero.offload, "zero.offload: true"),
    ]
    return f"What helps, in this order, under {where}: {', '.join(step for helps, step in steps if helps)}"
