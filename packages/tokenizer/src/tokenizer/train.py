"""Train a tokenizer; the same command again resumes.

    python -m tokenizer.train                                        built-in digits, CPU, minutes
    accelerate launch -m tokenizer.train recipe=imagenet_256 data.root=/data/imagenet

Writes the run folder `out`: a checkpoint for use (`config.json`, `model.safetensors` with the EMA
weights), `checkpoints/` to resume from, `metrics.jsonl` and `previews/` (docs/artifacts.md).
"""

import json
import math
import uuid
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import wandb
from accelerate import Accelerator, DistributedDataParallelKwargs
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.io import write_png
from tqdm import tqdm

from tokenizer import checkpoint
from tokenizer.config import TrainConfig, command
from tokenizer.data import Dataset, open_dataset, training_batches
from tokenizer.discriminator import build_discriminator, hinge_loss
from tokenizer.losses import GeneratorObjective, perceptual_loss
from tokenizer.meters import Clock, add_parts, mean_over_processes, sum_over_processes
from tokenizer.pixels import to_float
from tokenizer.run_folder import RunFolder, changed_settings
from tokenizer.schedule import lr_scheduler
from tokenizer.stop import StopRequest
from tokenizer.training_state import Adversary, TrainingState
from tokenizer.validation import preview_grid, validate


@command("train", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train until `steps`, saving on the way and on SIGTERM."""
    accelerator = Accelerator(
        # Without it, several processes on a machine without accelerators would not join.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.precision,
        log_with=None if config.tracking == "none" else config.tracking,
        project_dir=config.out,
        # Batch norm statistics of the discriminator stay with each process, as in the original.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    accumulation = config.accumulation(accelerator.num_processes)
    stop = StopRequest()
    folder = RunFolder(Path(config.out))

    # Data, and how long to train.
    dataset = open_dataset(config.data, config.data.split, train=True)
    val_dataset = open_dataset(config.data, config.data.val_split, train=False)
    check_discriminator(config)
    total_steps = config.total_steps(len(dataset))

    # The model, or what the last run left of it.
    with accelerator.main_process_first():  # it downloads what the others find in the cache
        perceptual = perceptual_loss(config.loss)
    objective = GeneratorObjective(config.loss, perceptual).to(accelerator.device)
    state = TrainingState.build(config, accelerator.device)
    schedulers = [
        lr_scheduler(optimizer, config.optim, total_steps)
        for optimizer in (
            state.optimizer,
            *([state.adversary.optimizer] if state.adversary else []),
        )
    ]
    chosen = settings(config, dataset)
    step = resume(config, chosen, folder, state, accelerator)
    if step >= total_steps:
        accelerator.print(
            f"{config.out} is trained for {step} of {total_steps} steps: nothing to do"
        )
        return
    parameters = sum(p.numel() for p in state.tokenizer.parameters())
    accelerator.print(
        f"training a tokenizer of {parameters / 1e6:.1f} M parameters on {len(dataset):,} images "
        f"of {config.data.name} ({config.data.split}), steps {step} to {total_steps} of "
        f"{config.global_batch} images, into {config.out}"
    )
    start_trackers(config, folder, accelerator)
    model = accelerator.prepare_model(state.tokenizer)
    judge = accelerator.prepare_model(state.adversary.discriminator) if state.adversary else None

    batches = training_batches(
        dataset,
        config.data,
        seed=config.seed,
        start_step=step,
        micro_batch=config.micro_batch,
        accumulation=accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    clock = Clock(step)
    skipped = 0  # unreadable samples this process had to replace since the start of this command
    progress = tqdm(
        total=total_steps,
        initial=step,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    while step < total_steps:
        for scheduler in schedulers:
            scheduler.step_update(step)

        # Autoencoder: gradients of all micro-batches, then one Adam step.
        parts: dict[str, Tensor] = {}
        judged: list[tuple[Tensor, Tensor]] = []
        adversary = state.adversary if step >= config.loss.adversarial_start_step else None
        critic = adversary.discriminator.requires_grad_(False) if adversary else None
        for i, batch in enumerate(clock.wait(islice(batches, accumulation))):
            image = to_float(batch.images.to(accelerator.device, non_blocking=True))
            with (
                synchronised(accelerator, model, last=i == accumulation - 1),
                accelerator.autocast(),
            ):
                output = model(image)
                loss = objective(image, output, critic, step)
                accelerator.backward(loss.total / accumulation)
            add_parts(parts, loss.parts | {"loss": loss.total.detach()}, accumulation)
            skipped += batch.skipped
            judged.append((image, output.image.detach()))
        state.optimizer.step()
        state.optimizer.zero_grad()

        # Discriminator: the same reconstructions, made before the step above.
        if adversary and judge:
            adversary.discriminator.requires_grad_(True)
            for i, pair in enumerate(judged):
                with (
                    synchronised(accelerator, judge, last=i == accumulation - 1),
                    accelerator.autocast(),
                ):
                    total, new = discriminator_loss(pair, judge, adversary, config, accelerator)
                    accelerator.backward(total / accumulation)
                add_parts(parts, new, accumulation)
            adversary.optimizer.step()
            adversary.optimizer.zero_grad()

        state.ema.update(state.tokenizer)
        step += 1
        progress.update()

        # Log, look, save.
        stopping = stop.agreed(accelerator, step)
        # A batch system leaves some seconds between SIGTERM and its kill: they are for saving.
        finished = step == total_steps
        last = finished or stopping
        validating = finished or (step % config.validate_every == 0 and not stopping)
        previewing = finished or (step % config.preview_every == 0 and not stopping)
        if last or validating or step % config.log_every == 0:
            record = mean_over_processes(parts, accelerator)
            if not math.isfinite(record["loss"]):
                raise diverged(folder, step, f"the loss is {record['loss']}")
            record |= {
                "skipped": sum_over_processes(skipped, accelerator),
                "lr": state.optimizer.param_groups[0]["lr"],
            } | clock.rates(step, config.global_batch)
            if validating:
                record |= validate(
                    state.ema.module,
                    val_dataset,
                    config.validation_images,
                    config.micro_batch,
                    config.data.num_workers,
                    accelerator,
                )
            progress.set_postfix(
                {name: f"{record[name]:.3g}" for name in ("loss", "l1", "images_per_s")}
            )
            accelerator.log(record, step=step)
            if accelerator.is_main_process:
                folder.log({"step": step} | record)
        if accelerator.is_main_process and previewing:
            save_preview(state, val_dataset, folder, step, config.preview_images)
        if last or step % config.checkpoint_every == 0:
            save(config, chosen, folder, state, step, accelerator)
        if stopping:
            break
    progress.close()
    accelerator.end_training()
    done = (
        f"trained {step} steps"
        if step == total_steps
        else f"stopped at step {step}; the same command resumes"
    )
    accelerator.print(f"{done}: {config.out}")


def discriminator_loss(
    pair: tuple[Tensor, Tensor],
    judge: nn.Module,
    adversary: Adversary,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hinge loss plus LeCAM of originals and reconstructions, and the detached parts."""
    original, reconstruction = pair
    real, fake = judge(original).float(), judge(reconstruction).float()
    total = hinge = hinge_loss(real, fake)
    parts = {"discriminator": hinge.detach()}
    if config.loss.lecam_weight:
        means = accelerator.reduce(torch.stack([real.mean(), fake.mean()]).detach(), "mean")
        share = 1 / config.accumulation(accelerator.num_processes)  # of a step
        adversary.lecam.update(means[0], means[1], share)
        parts["lecam"] = adversary.lecam(real, fake)
        total = hinge + config.loss.lecam_weight * parts["lecam"]
        parts["lecam"] = parts["lecam"].detach()
    return total, parts


def check_discriminator(config: TrainConfig) -> None:
    """Raise ValueError if the discriminator's receptive field does not fit the images."""
    if not config.loss.adversarial_weight:
        return
    smallest = build_discriminator(config.loss).min_size()
    if config.data.resolution < smallest:
        raise ValueError(
            f"loss.discriminator_layers={config.loss.discriminator_layers}: needs images of at "
            f"least {smallest} pixels, data.resolution is {config.data.resolution}; "
            "use fewer layers or loss.adversarial_weight=0"
        )


def settings(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what decides the result of a step: a resumed run refuses to mix two of them."""
    names = (
        "model",
        "data",
        "loss",
        "optim",
        "seed",
        "steps",
        "epochs",
        "global_batch",
        "ema_decay",
    )
    chosen = {name: value for name, value in asdict(config).items() if name in names}
    chosen["data"].pop("num_workers")
    chosen["data"].pop("root")  # the same data may lie elsewhere: its names and classes count
    chosen["data"]["digest"] = dataset.describe()["digest"]
    if config.optim.schedule != "cosine":  # training longer changes no earlier step
        del chosen["steps"], chosen["epochs"]
    return json.loads(json.dumps(chosen))


def resume(
    config: TrainConfig,
    chosen: dict[str, Any],
    folder: RunFolder,
    state: TrainingState,
    accelerator: Accelerator,
) -> int:
    """Restore the newest complete state and return its step; 0 where there is none."""
    step = folder.latest_step()
    if step is None and checkpoint.saved_step(folder.path) is not None:
        raise ValueError(
            f"{folder.path} holds trained weights, but {folder.checkpoints} has no complete state "
            "to resume from: set run_name or out for a new run"
        )
    accelerator.wait_for_everyone()  # before anybody writes
    if step is None:
        if accelerator.is_main_process:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.forget_metrics_after(0)
            write_config(config, folder)
        return 0
    resumed = folder.load(step)
    changed = changed_settings(resumed.settings, chosen)
    if changed and not config.allow_changes:
        raise ValueError(
            f"{folder.path} was trained with other settings: {'; '.join(changed)}. "
            "Set run_name or out for a new run, or allow_changes=true to continue with the new ones"
        )
    state.load(resumed.state)
    if accelerator.is_main_process:
        folder.forget_metrics_after(step)
        write_config(config, folder)
        if checkpoint.saved_step(folder.path) != step:  # killed between saving and exporting
            state.ema.module.save_pretrained(folder.path, step)
    accelerator.print(f"resuming {folder.path} at step {step}")
    return step


def save(
    config: TrainConfig,
    chosen: dict[str, Any],
    folder: RunFolder,
    state: TrainingState,
    step: int,
    accelerator: Accelerator,
) -> None:
    """Publish the resume state, then the checkpoint for use; refuse weights that are ruined."""
    if not state.is_finite():
        raise diverged(folder, step, "there are weights that are not finite")
    if accelerator.is_main_process:
        folder.save(step, chosen, state.tensors(), config.keep_last)
        state.ema.module.save_pretrained(folder.path, step)
    accelerator.wait_for_everyone()


def diverged(folder: RunFolder, step: int, what: str) -> ValueError:
    """Return the error that ends a run which cannot recover."""
    saved = folder.latest_step()
    remains = "nothing was saved" if saved is None else f"the newest state is of step {saved}"
    return ValueError(
        f"{what} at step {step}; {remains}. Lower optim.lr or loss.adversarial_weight"
    )


def save_preview(
    state: TrainingState, dataset: Dataset, folder: RunFolder, step: int, count: int
) -> None:
    """Write `previews/step-....png`: originals above their reconstructions by the EMA weights."""
    grid = preview_grid(state.ema.module, dataset, count)
    if grid is not None:
        path = folder.path / "previews" / f"step-{step:09d}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(grid, str(path))


def write_config(config: TrainConfig, folder: RunFolder) -> None:
    """Write the complete configuration for people to read."""
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def start_trackers(config: TrainConfig, folder: RunFolder, accelerator: Accelerator) -> None:
    """Start the tracker of `config.tracking`, if any; a resumed run continues in its old place."""
    if config.tracking == "none" or not accelerator.is_main_process:
        return
    identity = folder.path / "tracker_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    place = {"id": identity.read_text(), "resume": "allow", "dir": config.out}
    options = {"wandb": {"name": config.run_name} | place}
    try:
        accelerator.init_trackers("omv2-tokenizer", asdict(config), options)
    except wandb.errors.Error as error:
        raise ValueError(
            f"tracking=wandb: {error} (or set WANDB_MODE=offline, or tracking=none)"
        ) from None


def synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager:
    """Exchange gradients between processes in the last micro-batch of a step only."""
    return nullcontext() if last else accelerator.no_sync(model)


if __name__ == "__main__":
    main()
