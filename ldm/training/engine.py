"""Everything DeepSpeed: the process group, ZeRO, precision, accumulation, and who holds which weights.

The rest of the project sees an Engine: backward(loss) for each micro batch, update(learning_rate) for each step, and
`stretches`, the float32 weights and optimizer states that this process holds. What ZeRO shares out:

    stage 0   nothing: every process holds everything      stage 2   and gradients
    stage 1   optimizer state and float32 weights          stage 3   and the weights that the model computes with

Without DeepSpeed's own checkpoints there is nothing to unpickle and nothing that ties a run to a number of processes:
ldm/training/checkpoint.py keeps stretches by parameter, and `restore` takes whichever of them this process holds now.

With offload_optimizer.device=nvme what the optimizer updates lies in files, and DeepSpeed brings it into memory a group
of parameters at a time, inside a step. Who looks at a stretch then reads its file; who follows the weights from step to
step is shown them while they are in memory (`show`). What is kept beside them (averages, copies for a checkpoint) is
made by `room`, in files too.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.config import TrainingConfig, TrainingRunConfig
from ldm.training.checkpoint import KINDS, Stretch
from ldm.training.engine_config import WEIGHTS, WHERE, World, offloaded_to, told
from ldm.training.held import Held
from ldm.training.swap_folder import SwapFolder, claim


def join(collective_seconds: float | None = None, cuda: bool | None = None) -> World:
    """Joins the process group that Ray Train or torchrun prepared; without either, this process is alone in one.

    A group that exists says by its backend whether processes compute on GPUs: who was given none may still see those of
    others. Without a group it is `cuda`, or whether there is a GPU. Raises RuntimeError where one is wanted and none
    is seen. No process waits longer than `collective_seconds` for the others in one collective; None: as long as the
    backend has it.
    """
    if dist.is_initialized():
        cuda = dist.get_backend() == "nccl"
    elif cuda is None:
        cuda = torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"training is to compute on GPUs (cluster.train.num_gpus), but torch {torch.__version__} sees none on this "
            f"node; cluster.train.num_gpus=0 computes on processors"
        )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK"):  # DeepSpeed asks for them even in a group that exists
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        alone = "MASTER_ADDR" not in os.environ
        own = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        # Longer than one process may prepare while the others wait, whatever the backend thinks of that.
        dist.init_process_group(backend, timeout=timedelta(days=1), **own)
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    _join_deepspeed(cuda)
    if collective_seconds is not None:
        _wait_at_most(timedelta(seconds=collective_seconds))
    return World(
        dist.get_rank(), dist.get_world_size(), torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    )


def _join_deepspeed(cuda: bool) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed).*")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:
        # Shared memory between processes of one machine: compiling it takes minutes, and gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def _wait_at_most(timeout: timedelta) -> None:
    """In all groups: DeepSpeed has one of its own, which knows nothing of the time that ours was given."""
    from deepspeed.utils import groups

    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # older releases
    for group in (dist.group.WORLD, groups._get_data_parallel_group()):
        set_timeout(timeout, group)


def _keep_freed_memory() -> None:
    """Tells glibc to keep large blocks that are freed: a step frees and takes the same ones again and again, and each
    fresh page from the kernel costs more than the arithmetic on it (measured: a third of a small model's step)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def deepspeed_config(training: TrainingConfig, how: TrainingRunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ValueError where DeepSpeed does not take it, or lacks what it takes."""
    config = told(training, how, world)
    if not how.deepspeed:
        return config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except (ValueError, AssertionError, NotImplementedError) as error:
        words = re.sub(r"\s*\[type=.*|\s*For further information.*", "", str(error))
        raise ValueError(f"{WHERE} is {how.deepspeed}, which DeepSpeed refuses: {words}") from error
    if offloaded_to(how, "offload_optimizer") == "nvme" and not AsyncIOBuilder().is_compatible():
        raise ValueError(
            f"{WHERE}.zero_optimization.offload_optimizer.device is nvme, and DeepSpeed writes there by libaio, which "
            f"is not installed: apt-get install libaio-dev on every machine, or set it to cpu"
        )
    return config


class NonFiniteGradient(RuntimeError):
    """The gradient's norm is not a number or infinite; the weights were not touched."""


class GradientOverflow(NonFiniteGradient):
    """A gradient times the loss scale left the range of fp16; the scale is smaller now, the weights are as before."""


SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what the loss scale's future depends on


class Engine:
    """A module under DeepSpeed."""

    def __init__(self, module: nn.Module, training: TrainingConfig, how: TrainingRunConfig, world: World) -> None:
        import deepspeed

        self.module, self.world, self.stage = module, world, how.zero_stage
        self.clipping = training.gradient_clipping
        self._dtype = WEIGHTS.get(training.precision, torch.float32)
        self.parameters = dict(module.named_parameters())
        if frozen := [name for name, p in self.parameters.items() if not p.requires_grad]:
            raise ValueError(f"{len(frozen)} parameters are frozen, {frozen[0]} first; they belong outside the engine")
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        config = deepspeed_config(training, how, world)
        self.accumulation: int = config["gradient_accumulation_steps"]
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            weight_decay=training.weight_decay,
            fused=True,
        )
        if how.compile:
            module.compile()
        self._folder = _own_folder(config)
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if self._folder is not None:
            self._take_gradients_from_memory()
        self._scaler = self.deepspeed.optimizer.loss_scaler if training.precision == "fp16" else None
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # `update` says what it means
        self._micro_steps = 0
        self._check_layout()

    def __call__(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        condition = {name: x.to(self._dtype) if x.is_floating_point() else x for name, x in condition.items()}
        return self.deepspeed(z_t.to(self._dtype), t, condition)

    def backward(self, loss: Tensor) -> None:
        """Adds a micro batch's gradient; the last of a step also averages over processes."""
        self._micro_steps += 1
        self.deepspeed.set_gradient_accumulation_boundary(self._micro_steps % self.accumulation == 0)
        self.deepspeed.backward(loss)

    def update(self, learning_rate: float) -> float:
        """One step of the optimizer; returns the norm of the gradient before clipping.

        Raises NonFiniteGradient on all processes, the weights untouched, when it is not finite; GradientOverflow when
        that may be due to the loss scale.
        """
        scale = self.loss_scale
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = math.inf
        if self.stage == 0:
            clipping = math.inf if self.clipping is None else self.clipping
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), clipping))
        if self.stage or math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.module.zero_grad()
        if scale is not None and not self.deepspeed.was_step_applied() and scale > self._scaler.min_scale:
            raise GradientOverflow(f"a gradient overflowed at loss scale {scale:g}")
        if self.stage and self.deepspeed.was_step_applied():
            norm = float(self.deepspeed.get_global_grad_norm())
        if not math.isfinite(norm) or not self.deepspeed.was_step_applied():
            raise NonFiniteGradient(f"the gradient's norm is {norm}")
        return norm

    @property
    def loss_scale(self) -> float | None:
        """What fp16 multiplies the loss by; None at other precisions."""
        return None if self._scaler is None else float(self._scaler.cur_scale)

    def scaler_state(self) -> dict[str, float] | None:
        """The loss scale and what decides when it changes, for a checkpoint."""
        return None if self._scaler is None else {name: getattr(self._scaler, name) for name in SCALER}

    def restore_scaler(self, state: dict[str, float] | None) -> None:
        """Sets the loss scale; a checkpoint of another precision has none to set."""
        if self._scaler is not None and state is not None:
            for name in SCALER:
                setattr(self._scaler, name, state[name])

    def close(self) -> None:
        """Removes the files of weights and optimizer states; there is no step after it."""
        if self._folder is not None:
            self._folder.close()

    def _check_layout(self) -> None:
        """That the stretches are those of the weights that the model computes with, element for element.

        Where DeepSpeed keeps them is its own affair, and keys that are passed on to it may change that.
        """
        wrong, kept = [], 0
        for stretch in self.stretches():
            p, held = self.parameters[stretch.name], stretch.tensors["weight"]
            here = p.ds_tensor[: len(held)] if self.stage == 3 else p.flatten()[stretch.start :][: len(held)]
            kept += len(held)
            if not torch.equal(held.to(here.dtype).to(here.device), here.detach()):
                wrong.append(stretch.name)
        total = torch.tensor([kept, len(wrong)], device=self.world.device)
        dist.all_reduce(total)
        if total.tolist() != [sum(shape.numel() for shape in self.shapes.values()), 0]:
            raise ValueError(
                f"DeepSpeed holds its float32 weights in another order than is known here, so that neither averages "
                f"nor checkpoints would be right: {int(total[0])} numbers were found, and of process "
                f"{self.world.rank} differ: {', '.join(wrong[:3]) or 'none'}. A key of cluster.train.run.deepspeed "
                f"does that: take those out that are not needed"
            )

    # -- who holds what ------------------------------------------------------------------------------------------
    def stretches(self) -> list[Stretch]:
        """The float32 weights that this process is the one to keep; together the processes keep each element once.

        The tensors follow the training: they are views, or read from their file when they are asked for.
        """
        return self._stretches(("weight",))

    def states(self) -> list[Stretch]:
        """The same stretches with their optimizer states, for a checkpoint."""
        return self._stretches(KINDS)

    def _stretches(self, kinds: tuple[str, ...]) -> list[Stretch]:
        held = [part.stretch(kinds) for part in self._held()]
        return [self._share(stretch) for stretch in held] if self.stage == 0 else held

    def room(self, numel: int) -> Tensor:
        """Float32 numbers (n,) to keep a while: in memory, or in a file where that is where the optimizer has its."""
        return torch.empty(numel) if self._folder is None else self._folder.tensor(numel)

    def show(self, look: Callable[[list[Stretch]], None]) -> None:
        """Inside every step that is applied, shows weights that lie in files while they are in memory, once stepped."""
        if self._folder is None:
            return
        optimizer = self.deepspeed.optimizer
        step, held = optimizer._optimizer_step, groupby(self._held(), key=lambda part: part.group)
        in_files = {group: list(parts) for group, parts in held if self._is_in_files(group)}

        def step_and_show(group: int) -> None:
            step(group)
            if group in in_files:
                look([part.stretch(("weight",)) for part in in_files[group]])

        optimizer._optimizer_step = step_and_show

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], step: int) -> None:
        """Sets weights and optimizer states from read(kind, name, start, stop), and the optimizer's count of steps."""
        if self.stage == 3:
            self.deepspeed.optimizer._partition_all_parameters()
        for group, parts in groupby(self._held(), key=lambda part: part.group):
            with self._in_memory(group):
                for part in parts:
                    for kind in KINDS:
                        value = part.state(kind)
                        value.copy_(read(kind, part.name, part.start, part.start + value.numel()))
                    part.flat_state()["step"].fill_(step)
        self._refresh()

    @torch.no_grad()
    def gather(self, stretches: list[Stretch], kind: str = "weight") -> dict[str, Tensor] | None:
        """Whole tensors from every process's stretches, float32 on the CPU of the first process; None on the others."""
        mine = {stretch.name: stretch for stretch in stretches}
        whole: dict[str, Tensor] = {}
        for names in self._buckets(2**25):
            sizes = [self.shapes[name].numel() for name in names]
            # As integers, because x + 0 would lose the sign of a zero.
            flat = torch.zeros(sum(sizes), dtype=torch.int32, device=self.world.device)
            for name, place in zip(names, flat.split(sizes), strict=True):
                if name in mine:
                    values = mine[name].tensors[kind].contiguous().view(torch.int32)
                    place[mine[name].start : mine[name].start + values.numel()] = values
            dist.reduce(flat, 0)
            if self.world.rank == 0:
                parts = flat.view(torch.float32).cpu().split(sizes)
                kept = (self.room(x.numel()).copy_(x) for x in parts)
                whole |= {name: x.view(self.shapes[name]) for name, x in zip(names, kept, strict=True)}
        return whole if self.world.rank == 0 else None

    def buffers(self) -> dict[str, Tensor]:
        """What the module's state has besides trained weights."""
        state = self.module.state_dict().items()
        return {name: x.detach().cpu().clone() for name, x in state if name not in self.parameters}

    def _buckets(self, elements: int) -> Iterator[list[str]]:
        names: list[str] = []
        for name, shape in self.shapes.items():
            if names and sum(self.shapes[n].numel() for n in names) + shape.numel() > elements:
                yield names
                names = []
            names.append(name)
        yield names

    def _share(self, stretch: Stretch) -> Stretch:
        """This process's share of something that all processes hold."""
        n = self.shapes[stretch.name].numel()
        start, stop = (n * r // self.world.world_size for r in (self.world.rank, self.world.rank + 1))
        return Stretch(stretch.name, start, {kind: x[start:stop] for kind, x in stretch.tensors.items()})

    def _held(self) -> Iterator[Held]:
        """Every piece of a parameter that this process updates."""
        optimizer = self.deepspeed.optimizer
        for name, p in self.parameters.items():
            if self.stage == 0:
                yield Held(name, 0, p, 0, p.numel(), optimizer.state)
            elif self.stage == 3:
                group, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
                start = padded * self.world.rank
                n = min(padded, p.ds_numel - start)
                if n > 0:
                    flat, states = optimizer.fp32_partitioned_groups_flat[group], optimizer.optimizer.state
                    folder = optimizer.optimizer_swapper.swap_folder if self._is_in_files(group) else None
                    yield Held(name, start, flat, offset, n, states, group, folder)
            elif (mapping := p._hp_mapping) is not None:
                flat = _masters(optimizer)[mapping.param_group_index]
                at, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Held(name, at.start, flat, here.start, here.numel, optimizer.optimizer.state)

    def _take_gradients_from_memory(self) -> None:
        """DeepSpeed sums gradients in memory, and of weights in files it also writes them to files and reads them back.

        That is more work for nothing, and wrong: what it reads goes to any address, the disk refuses those that are no
        multiple of its sectors, nobody looks, and the step takes whatever the buffer held.
        """
        optimizer = self.deepspeed.optimizer
        optimizer.optimizer_swapper.swap_out_gradients = lambda **gradients: None
        prepare, sums = optimizer._prepare_sub_group, optimizer.grad_partitions_flat_buffer
        in_groups = sums.split(optimizer.fp16_partitioned_groups_flat_numel)

        def prepare_with_gradients(group: int, timers: set[str]) -> None:
            prepare(group, timers)
            if self._is_in_files(group):
                gradient = in_groups[group].to(torch.float32, copy=True)  # which the step scales
                optimizer.fp32_partitioned_groups_flat[group].grad = gradient

        optimizer._prepare_sub_group = prepare_with_gradients

    def _is_in_files(self, group: int) -> bool:
        """Of a group of parameters, whether it lies in files between steps; small ones never do."""
        return self._folder is not None and self.deepspeed.optimizer._swappable_optimizer_subgroup(group)

    @contextmanager
    def _in_memory(self, group: int) -> Iterator[None]:
        """While it lasts, what the optimizer updates of a group is in memory; what it was set to then is kept."""
        optimizer = self.deepspeed.optimizer
        if self._is_in_files(group):
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if self.stage == 3:
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if self._is_in_files(group):
            optimizer._optimizer_states_and_gradient_swap_out(group)

    def _refresh(self) -> None:
        """Makes the weights that the model computes with follow the float32 ones."""
        optimizer = self.deepspeed.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3 and optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _own_folder(config: dict[str, Any]) -> SwapFolder | None:
    """Where the optimizer is to lie in files, makes a folder for them that is this process's alone, and names it."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return None
    _claim_before_writing()
    folder = SwapFolder(Path(offload["nvme_path"]))
    config["zero_optimization"]["offload_optimizer"] = {**offload, "nvme_path": str(folder.path)}
    return folder


@cache
def _claim_before_writing() -> None:
    """DeepSpeed does not look whether its writes succeed, so on a full disk weights would be lost without a word."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    aio = AsyncIOBuilder().load()

    class Handle(aio.aio_handle):  # type: ignore[misc, name-defined]
        def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
            claim(path, offset + buffer.nbytes)
            return super().async_pwrite(buffer, path, offset)

    aio.aio_handle = Handle


def _masters(optimizer: Any) -> list[Tensor]:
    """The flat float32 weights of each parameter group, as ZeRO 1 and 2 and DeepSpeed's bf16 optimizer call them."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition
