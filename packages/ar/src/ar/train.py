"""Train the auto-regressive model on index shards; the same command again resumes.

    python -m ar.train +model=tiny data.shards=outputs/tokens/digits/train epochs=60
    accelerate launch --mixed_precision bf16 -m ar.train +model=xl

Writes the run folder `out`: `config.json` and `model.safetensors` for use, `checkpoints/` to resume
from, `config.yaml` and `metrics.jsonl` (docs/train-ar.md).
"""

import dataclasses
import math
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import wandb
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ar import memory, parallel
from ar.batches import batch_reader, read_ahead
from ar.checkpoint import load_weights, write_card
from ar.config import ModelConfig, TrainConfig, command, resolve_model
from ar.files import write_atomic
from ar.model import AR
from ar.order import Order, accumulation, step_seed
from ar.run_folder import RunFolder, Saved
from ar.schedule import build_optimizer, learning_rate, load_optimizer, optimizer_tensors
from ar.shards import IndexShards, read_manifest
from ar.validation import open_validation, validate


@command("train", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train until `steps`, saving on the way and on SIGTERM."""
    with parallel.StopRequest() as stop:
        train(config, stop)


def train(config: TrainConfig, stop: parallel.StopRequest) -> None:
    """Train as `config` says, or until `stop` has received a signal; see the module's docstring."""
    accelerator = parallel.start(config.precision, config.tracking)
    device, rank, world_size = (
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
    )
    micro_batches = accumulation(config.global_batch, config.micro_batch, world_size)

    # Does it fit, before anything large is touched; then the data.
    model_config = model_shape(config)
    free = memory.free_bytes(device, parallel.local_processes(accelerator))
    bf16 = accelerator.mixed_precision == "bf16"
    memory.check(model_config, config.micro_batch, config.ema_decay > 0, bf16, free)
    accelerator.wait_for_everyone()  # a late process must not count the memory of early ones
    shards = open_shards(config)
    validation = open_validation(config.data, shards)
    if config.data.verify:
        shards.verify(rank, world_size)
    order = Order(
        shards.num_samples, shards.num_views, config.global_batch, config.seed, config.class_dropout
    )
    total_steps = config.steps or max(1, round(config.epochs * order.steps_per_epoch))

    # What the last run left, if it is the same run.
    folder = RunFolder(Path(config.out))
    identity = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "data": shards.digest,
        "model": dataclasses.asdict(model_config),
    }
    saved = folder.newest()
    if saved is not None:
        check_identity(config, saved, identity)
        accelerator.wait_for_everyone()  # all processes have read the folder
        if accelerator.is_main_process:
            folder.settle(config.keep_last)
        if saved.step >= total_steps:
            accelerator.print(f"{config.out}: done, {saved.step} of {total_steps} steps")
            return
        if saved.notes["world_size"] != world_size:
            accelerator.print(
                f"resuming on {world_size} processes after {saved.notes['world_size']}: the same "
                "batches, other dropout masks"
            )
    step = last_saved = saved.step if saved else 0
    notes: dict[str, Any] = (
        saved.notes if saved else {"skipped_steps": 0, "id": uuid.uuid4().hex[:8]}
    )
    notes["world_size"] = world_size

    # The model, its optimizer and, on request, the average of its weights.
    torch.manual_seed(config.seed)
    model = AR(model_config)
    if saved:
        load_weights(model, saved.folder / "model.safetensors")
    model.to(device)
    optimizer = build_optimizer(model, config.optim)
    average = [p.detach().clone() for p in model.parameters()] if config.ema_decay else []
    if saved:
        load_optimizer(optimizer, model, saved.tensors("optimizer"))
        load_average(average, model, saved)
    parameters = list(model.parameters())
    wrapped = parallel.wrap(model, accelerator)

    def average_tensors() -> dict[str, Tensor]:
        return {name: t for (name, _), t in zip(model.named_parameters(), average, strict=True)}

    def save() -> None:
        if accelerator.is_main_process:
            files: dict[str, dict[str, Tensor]] = {
                "model": dict(model.named_parameters()),
                "optimizer": optimizer_tensors(optimizer, model),
            }
            if average:
                files["ema"] = average_tensors()
            folder.save(step, files, identity, notes, config.keep_last)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_card(folder.path, model_config, shards.tokens_card)
        write_atomic(
            folder.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode()
        )
        folder.forget_metrics_after(step)
    start_tracker(config, accelerator, notes["id"])
    accelerator.print(
        f"training {model_config.name}, {sum(p.numel() for p in parameters):,} parameters, on "
        f"{shards.num_samples:,} samples x {shards.num_views} views of {config.data.shards}; steps "
        f"{step} to {total_steps} of {config.global_batch} images ({world_size} processes x "
        f"{micro_batches} passes x {config.micro_batch}) on {device.type}, mixed precision "
        f"{accelerator.mixed_precision}; into {config.out}"
    )

    # The loop.
    pin = device.type != "cpu" and torch.accelerator.is_available()
    read = batch_reader(shards, order, config.micro_batch, rank, world_size, pin)
    batches = read_ahead(read, step, total_steps)
    progress = tqdm(
        total=total_steps,
        initial=step,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    skipped_in_a_row = 0
    clock, waited, counted_from = time.perf_counter(), 0.0, step
    wrapped.train()
    while step < total_steps:
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        tokens = batch.tokens.to(device, non_blocking=True)  # [A, M, L]
        labels = batch.labels.to(device, non_blocking=True)  # [A, M]

        # Gradients. Seeding each step makes a resumed run equal to an uninterrupted one.
        torch.manual_seed(step_seed(config.seed, step, rank))
        losses = torch.zeros(2, device=device)  # pre, post: means over this process's images
        for index in range(micro_batches):
            with parallel.gradient_sync(wrapped, sync=index == micro_batches - 1):
                with accelerator.autocast():
                    logits = wrapped(tokens[index], labels[index])
                loss = model.loss(logits, tokens[index]) / micro_batches
                loss.sum().backward()
            losses += loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm).item()

        # The update. Gradients are the same on all processes, so all decide alike.
        lr = learning_rate(step, total_steps, config.optim)
        if math.isfinite(grad_norm):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            if average:
                torch._foreach_lerp_(
                    average, [p.detach() for p in parameters], 1 - config.ema_decay
                )
            skipped_in_a_row = 0
        else:
            notes["skipped_steps"] += 1
            skipped_in_a_row += 1
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if skipped_in_a_row >= config.optim.max_skipped_steps:
            raise ValueError(
                f"step {step}: the gradient was not finite {skipped_in_a_row} times in a row; "
                f"lower optim.lr={config.optim.lr} or use precision=no; the last checkpoint is of "
                f"step {last_saved}"
            )

        # Metrics.
        finished = step == total_steps
        record: dict[str, float | int | None] = {}
        if finished or step == 1 or step % config.log_every_steps == 0:
            pre, post = parallel.mean_over_ranks(losses, accelerator).tolist()
            seconds, steps = time.perf_counter() - clock, step - counted_from
            images = steps * config.global_batch
            record |= {"loss": pre + post, "loss_pre": pre, "loss_post": post, "lr": lr}
            record |= {"grad_norm": grad_norm, "skipped_steps": notes["skipped_steps"]}
            record |= {
                "tokens_per_s": images * model.num_positions / seconds,
                "data_wait": waited / steps,
            }
            progress.set_postfix_str(
                f"loss {pre + post:.3f}, {images / seconds:.1f} images/s", refresh=False
            )
            clock, waited, counted_from = time.perf_counter(), 0.0, step
        if validation and (finished or step % config.val_every_steps == 0):
            weights = average_tensors() if average else None
            record |= validate(model, weights, validation, config.micro_batch, accelerator)
            clock, waited, counted_from = time.perf_counter(), 0.0, step
        if record and accelerator.is_main_process:
            plain = {
                name: v if v is None or math.isfinite(v) else None for name, v in record.items()
            }
            folder.append_metrics({"step": step, **plain})
            accelerator.log(plain, step=step)

        # Checkpoints.
        stopping = parallel.any_rank(stop.received, accelerator)
        if (finished or stopping or step % config.save_every_steps == 0) and step > last_saved:
            save()
            last_saved = step
            clock, waited, counted_from = time.perf_counter(), 0.0, step
        if stopping:
            break
    progress.close()
    batches.close()
    accelerator.end_training()
    word = "done" if step == total_steps else "stopped by a signal, the same command resumes"
    accelerator.print(f"{config.out}: {word}, {step} of {total_steps} steps")


def model_shape(config: TrainConfig) -> ModelConfig:
    """Return the model's configuration, completed from the shards if there are any yet."""
    folder = Path(config.data.shards)
    if not (folder / "manifest.json").is_file():
        return resolve_model(config.model)
    manifest = read_manifest(folder)
    classes = len(manifest["class_names"] or [])
    return resolve_model(config.model, manifest["codebook_bits"], tuple(manifest["grid"]), classes)


def open_shards(config: TrainConfig) -> IndexShards:
    """Open the training shards, or say how to make them."""
    if not (Path(config.data.shards) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"data.shards={config.data.shards}: no index shards there; run "
            f"`make tokenize DATA={config.data.name}` first, or set data.shards to a folder that "
            "tokenizer.encode wrote"
        )
    return IndexShards(config.data.shards)


def check_identity(config: TrainConfig, saved: Saved, identity: dict[str, Any]) -> None:
    """Refuse to resume when what makes the run itself has changed."""
    changed = [name for name in identity if saved.identity.get(name) != identity[name]]
    if changed and not config.allow_changes:
        details = "; ".join(f"{n} was {saved.identity.get(n)}, is {identity[n]}" for n in changed)
        raise ValueError(
            f"out={config.out}: cannot resume with other settings ({details}); restore them, "
            "choose another out, or set allow_changes=true"
        )


def load_average(average: list[Tensor], model: AR, saved: Saved) -> None:
    """Restore the averaged weights; a run without them starts from the current weights."""
    if not average or not (saved.folder / "ema.safetensors").is_file():
        return
    tensors = saved.tensors("ema")
    for target, (name, _) in zip(average, model.named_parameters(), strict=True):
        target.copy_(tensors[name])


def start_tracker(config: TrainConfig, accelerator: Accelerator, run_id: str) -> None:
    """Start the tracker, if any; a resumed run continues its curve."""
    if config.tracking == "none":
        return
    options = {"name": Path(config.out).name, "id": run_id, "resume": "allow", "dir": config.out}
    settings = dataclasses.asdict(config)
    try:
        accelerator.init_trackers(config.tracking_project, settings, {config.tracking: options})
    except wandb.errors.Error as error:
        raise ValueError(
            f"tracking=wandb: {error} (or set WANDB_MODE=offline, or tracking=none)"
        ) from None


if __name__ == "__main__":
    main()
