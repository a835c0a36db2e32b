"""The Hugging Face Trainer with our checkpoints: model folders at given steps, and states for bit-exact resuming.

cpt/train.py imports it only after checking the arguments, since it loads torch and transformers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import WEIGHTS_NAME

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError

runs = cli.sibling("cpt/runs.py")

READ_EVERY = 20  # steps between readings of the losses from a GPU


class Blocks(torch.utils.data.Dataset):
    """Training blocks [n_blocks, block_size] in their final order."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.blocks[index]


def collate(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Blocks as inputs and labels [batch, block_size]; the model shifts the labels."""
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": ids, "labels": ids}


class Training(Trainer):
    """A Trainer that records the loss of every step, stops at NaN, and never leaves a half-written folder.

    Args:
        config: the settings of cpt/train.py.
        run: the run folder.
        tokenizer_files: folder whose tokenizer files go into every checkpoint.
        part: the part of the model that is trained (`freezing.Frozen`, `lora.Lora`); None: all of it.
    """

    def __init__(self, config: dict, run: Path, tokenizer_files: Path, part, **kwargs):
        super().__init__(**kwargs)
        self.config, self.run_folder, self.tokenizer_files, self.part = config, run, tokenizer_files, part
        self.losses: list[float] = []  # of finished steps
        self.unread: list[torch.Tensor] = []  # losses of micro-batches, still on the device
        self.step_seconds: list[float] = []  # of finished steps
        self.seconds_before = 0.0
        self.started = time.monotonic()
        sizes = [p.numel() for p in self.model.parameters()]
        self.n_parameters, self.n_trained = (part.n_parameters, part.n_trained) if part else (sum(sizes),) * 2

    def seconds(self) -> float:
        """Wall-clock seconds of the run; killed processes count up to their last state."""
        return self.seconds_before + time.monotonic() - self.started

    def go_on_from(self, state: Path) -> None:
        """Load the losses and times recorded in a state; states of earlier versions have no step times."""
        record = json.loads((state / "losses.json").read_text(encoding="utf-8"))
        self.losses, self.seconds_before = record["losses"], record["seconds"]
        self.step_seconds = record.get("step_seconds", [])

    def cost(self) -> dict:
        """What the run took besides time; `optimizer_bytes` is the optimizer state of one process."""
        held = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return {
            "parameters": self.n_parameters,
            "trainable_parameters": self.n_trained,
            "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
            "n_steps": len(self.losses),
        }

    def seconds_per_step(self) -> float:
        """The median time of a step: forward and backward passes and update, without saving."""
        return round(statistics.median(self.step_seconds), 6)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.unread.append(loss)
        # Reading a loss makes the host wait for the GPU; on the CPU it is free and catches NaN at the step it occurs.
        steps = 1 if loss.device.type == "cpu" else READ_EVERY
        if len(self.unread) >= steps * self.config["gradient_accumulation"]:
            self.read_losses()
        return loss

    def read_losses(self) -> None:
        """Move the unread losses to `losses`: summed over micro-batches, averaged over processes.

        Raises:
            InputError: a loss is not finite.
        """
        if not self.unread:
            return
        steps = torch.stack(self.unread).float().view(-1, self.config["gradient_accumulation"]).sum(1)
        self.unread = []
        for value in self.accelerator.reduce(steps, "mean").tolist():
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} at step {len(self.losses) + 1}; lower learning_rate or raise warmup_steps, "
                    "and start again with --overwrite"
                )
            self.losses.append(round(value, 6))

    def _save_checkpoint(self, model, trial) -> None:
        """Called by the Trainer when a callback asks for saving.

        Writes the model folder first, then the state: a run killed in between writes the model folder again.
        """
        step = self.state.global_step
        self.read_losses()
        if step in self.config["save_steps"]:
            self.put_model(self.run_folder / f"checkpoint-{step}", runs.put_folder)
        if step == self.config["steps"]:
            if not self.config["save_steps"]:
                self.put_model(self.run_folder, runs.put_files)
            return  # train.json ends the run; if killed before it, the run repeats the steps since the last state
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = self.run_folder / ".state"
            partial = folder / "partial" / f"checkpoint-{step}"
            record = {"losses": self.losses, "seconds": self.seconds(), "step_seconds": self.step_seconds}
            (partial / "losses.json").write_text(json.dumps(record), encoding="utf-8")
            runs.put_folder(partial, folder / f"state-{step}")
            for older in runs.states(folder)[:-1]:
                shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the weights in a state under their names in memory; of a LoRA run, only the products.

        The Trainer would write them under their names in a model folder and read them back by name alone: for model
        types whose names or experts differ on disk, a resumed run would silently continue from the base's weights.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            state = self.accelerator.unwrap_model(self.model).state_dict()
            torch.save(self.part.of_state(state) if self.part else state, Path(output_dir) / WEIGHTS_NAME)

    def _issue_warnings_after_load(self, load_result) -> None:
        if load_result.unexpected_keys:
            raise InputError(
                f"{self.run_folder}: the state of this run was written by an earlier version, which could not resume "
                f"models of this type ({load_result.unexpected_keys[0]}); start again with --overwrite"
            )
        missing = dict.fromkeys(load_result.missing_keys)
        missing = list(self.part.of_state(missing) if self.part else missing)
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def put_model(self, target: Path, put) -> None:
        """Write the model into a partial folder and let `put` move it to `target`."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        weights = self.accelerator.get_state_dict(self.model_wrapped if sharded else self.model)
        if self.is_world_process_zero():
            partial = self.run_folder / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            model = self.accelerator.unwrap_model(self.model)
            write = self.part.write if self.part else runs.write_model
            write(partial, model, weights, self.tokenizer_files, self.config["dtype_on_disk"])
            put(partial, target)
        self.accelerator.wait_for_everyone()


class Steps(TrainerCallback):
    """Asks for saving at the right steps, puts frozen entries back, and draws the progress bar."""

    def __init__(self, config: dict, trainer: Training):
        self.config, self.trainer, self.bar = config, trainer, None
        self.since: tuple[float, int] | None = None  # start of the steps not timed yet, and the step before them

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            name = f"training {self.trainer.run_folder.name}"
            self.bar = cli.progress(desc=name, total=self.config["steps"], unit="step")
            self.bar.update(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.since = self.since or (time.monotonic(), state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.part:
            self.trainer.part.restore()

    def on_step_end(self, args, state, control, **kwargs):
        step, config = state.global_step, self.config
        control.should_save = step in {config["steps"], *config["save_steps"]} or step % config["state_every"] == 0
        on_cpu = args.device.type == "cpu"
        if on_cpu or control.should_save or step % READ_EVERY == 0:  # seldom, as the host waits for the GPU
            if not on_cpu:
                torch.accelerator.synchronize()
            began, before = self.since
            self.trainer.step_seconds += [(time.monotonic() - began) / (step - before)] * (step - before)
            self.since = None
        if self.bar is not None:
            recent = self.trainer.losses[-50:]
            if step % 10 == 0 and recent:
                self.bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def per_device(config: dict, path: Path) -> int:
    """Blocks per micro-batch and process; InputError if the batch cannot be split evenly."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parts = world * config["gradient_accumulation"]
    size, rest = divmod(config["batch_size"], parts)
    if rest or not size:
        raise InputError(
            f"{path}: batch_size {config['batch_size']} cannot be split over {world} processes and "
            f"{config['gradient_accumulation']} accumulation steps; make it a multiple of {parts}"
        )
    return size


def make(config: dict, run: Path, model, tokenizer_files: Path, blocks, device: str, path: Path, part) -> Training:
    """The trainer of a run, ready for `train()`; `part`: see `Training`."""
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    half = config["precision"] == "bfloat16"
    if config["precision"] == "auto":
        half = not on_cpu and torch.cuda.is_bf16_supported()
    try:
        arguments = TrainingArguments(
            output_dir=str(run / ".state" / "partial"),
            per_device_train_batch_size=per_device(config, path),
            gradient_accumulation_steps=config["gradient_accumulation"],
            max_steps=config["steps"],
            learning_rate=config["learning_rate"],
            lr_scheduler_type=config["schedule"],
            warmup_steps=config["warmup_steps"],
            weight_decay=config["weight_decay"],
            max_grad_norm=config["max_grad_norm"],
            optim=config["optimizer"],
            seed=config["seed"],
            bf16=half,
            activation_checkpointing=config["gradient_checkpointing"],
            torch_compile=config["torch_compile"],
            use_cpu=device == "cpu",
            train_sampling_strategy="sequential",  # the blocks are in their final order already
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would hide NaN, and wait for the GPU at every step
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
        )
        if arguments.n_gpu > 1:
            # One process with several GPUs: DataParallel would multiply the batch. `accelerate launch` uses all.
            cli.say(f"{arguments.n_gpu} GPUs are visible, one is used; `accelerate launch cpt/train.py ...` uses all")
            arguments._n_gpu = 1
        # transformers infers from a class's name that it has a next-token loss. If the name does not say so
        # (GPT2LMHeadModel), it divides by one token too many per block.
        model.loss_type = model.loss_type or "ForCausalLM"
        model.config.use_cache = False  # training has no use for a key-value cache
        trainer = Training(
            config,
            run,
            tokenizer_files,
            part,
            model=model,
            args=arguments,
            train_dataset=Blocks(blocks),
            data_collator=collate,
        )
    except (ValueError, ImportError, TypeError) as error:
        raise InputError(f"{path}: the training settings are refused: {runs.first_line(error)}") from error
    if part and part.unsharded and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise InputError(f"{path}: {part.unsharded} under FSDP or DeepSpeed")
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Steps(config, trainer))
    return trainer
