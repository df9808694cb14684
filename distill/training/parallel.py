"""Everything distributed: how denoisers are prepared for many processes, and how gradients are agreed on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distill.diffusion.denoiser import Denoiser
from distill.errors import ConfigError
from distill.export import is_sharded, open_checkpoint

_FSDP2 = (
    "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: "
    "{data_parallel_size: NUMBER_OF_PROCESSES, tensor_parallel_size: 1}}"
)


PRECISIONS = {"bf16-mixed", "32-true", "32", "bf16", "None"}  # as a recipe or Lightning writes them


# Weights are kept in float32 and gathered in bfloat16, gradients summed in float32. Inputs are left to autocast, for
# bfloat16 cannot tell time 999 from 1000.
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


BUCKET = 1 << 24  # numbers averaged in one call: 64 MiB in float32


def check_strategy(strategy: Strategy, precision: str) -> None:
    """Refuses what cannot train two players by hand.

    Raises:
        ConfigError: FSDP1, tensor parallelism, fp16, or a strategy this package was never tried with.
    """
    check_names("fsdp" if isinstance(strategy, FSDPStrategy) else type(strategy).__name__, precision)
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size != 1:
            raise ConfigError(
                "ModelParallelStrategy is used as FSDP2 here and its default shards nothing on one node; "
                f"set trainer.strategy: {_FSDP2}"
            )
    elif not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise ConfigError(
            f"trainer.strategy={type(strategy).__name__} is not supported; choose auto, ddp, or FSDP2: {_FSDP2}"
        )


def check_names(strategy: str, precision: str) -> None:
    """Refuses FSDP1 and fp16 by the names a recipe has for them.

    Raises:
        ConfigError: as `check_strategy`.
    """
    if strategy.startswith("fsdp") or strategy.endswith("FSDPStrategy"):
        raise ConfigError(
            "trainer.strategy=fsdp (FSDP1) does not support manual optimization in Lightning; use FSDP2 instead, "
            f"trainer.strategy: {_FSDP2}"
        )
    if precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={precision} is not supported: float16 overflows in the adversarial terms, and small "
            "updates vanish in half-precision weights; use bf16-mixed or 32-true"
        )


def lacks_bfloat16(accelerator: str) -> bool:
    """Whether a run would compute on a CPU without instructions for bfloat16, where PyTorch emulates it: a step of
    tiny_ladd.yaml in bf16-mixed takes more than ten times as long as in float32.
    """
    if accelerator not in {"cpu", "auto"} or (accelerator == "auto" and torch.accelerator.is_available()):
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_checkpoint(path: Path, strategy: str, training: bool) -> None:
    """Refuses what Lightning cannot load under a strategy: a sharded checkpoint, which is a folder, without FSDP2; and,
    to train on, the optimizers of a run without FSDP2 with it.

    Args:
        path: of the checkpoint.
        strategy: its name in the recipe.
        training: whether the run is to go on, not only to be measured.

    Raises:
        ConfigError: one of these, or what is no checkpoint.
    """
    sharded = strategy.endswith("ModelParallelStrategy")
    if is_sharded(path):
        if sharded:
            return
        made, how = "an FSDP2", f"trainer.strategy: {_FSDP2}, on any number of devices"
    else:
        about = open_checkpoint(path).get("distill", {})
        if about.get("sharded", True) or not (training and sharded):  # one that does not say may be sharded
            return
        made, how = "an unsharded", "trainer.strategy to auto or ddp, on any number of devices"
    raise ConfigError(
        f"'{path}' is the checkpoint of {made} run, which trainer.strategy={strategy} cannot load; set {how}, or begin "
        f"a new run with its student (model.student_init: {path})"
    )


def prepare(
    denoiser: Denoiser,
    mesh: DeviceMesh | None = None,
    checkpoint: bool = False,
    compiled: bool = False,
    tapped: bool = False,
    bfloat16: bool = False,
) -> None:
    """Activation checkpointing, compilation and sharding of a denoiser, in this order, each per block.

    Args:
        denoiser: the network, its taps in place.
        mesh: the data-parallel mesh to shard over (FSDP2); None leaves it whole.
        checkpoint: recompute activations in the backward pass.
        compiled: `torch.compile` each block.
        tapped: whether gradients may enter at its blocks and not at its answer, which is where FSDP2 waits for them to
            gather the outermost part again; it then stays whole from one pass to the next.
        bfloat16: gather the shards in bfloat16, half of what would be sent otherwise; the network then computes under
            autocast wherever it is asked, and answers in float32.
    """
    if checkpoint:
        denoiser.network.enable_gradient_checkpointing()
    if compiled:
        for block in denoiser.blocks:
            block.compile()
    if mesh is not None and not isinstance(denoiser.network, FSDPModule):
        policy = BFLOAT16 if bfloat16 else MixedPrecisionPolicy()
        if bfloat16:
            denoiser.network.forward = torch.autocast(mesh.device_type, torch.bfloat16)(denoiser.network.forward)
        for block in denoiser.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        outermost = replace(policy, output_dtype=torch.float32)
        fully_shard(denoiser.network, mesh=mesh, reshard_after_forward=None if tapped else True, mp_policy=outermost)


def average_alone(module: nn.Module, strategy: Strategy) -> None:
    """Leaves DDP one small parameter to look after, for it takes no module without any, and the critics' buffers.

    Its reducer would hold a copy of every trained parameter, for gradients that `average_gradients` averages. It would
    send all buffers in every forward pass, of which those of student and averages, such as position embeddings, are
    constants, and the module's own are counted alike everywhere.
    """
    if isinstance(strategy, DDPStrategy):
        trained = sorted((p.numel(), name) for name, p in module.named_parameters() if p.requires_grad)
        ours = [name for _, name in trained[1:]]
        ours += [name for name, _ in module.named_buffers() if not name.startswith("strategies.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ours)


def grouped(parameters: list[nn.Parameter]) -> Any:
    """Parameters for an optimizer: sharded and whole ones in groups of their own, for they cannot be stepped
    together.
    """
    groups = _sharded_and_whole(parameters)
    return [{"params": group} for group in groups] if all(groups) else parameters


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of replicated parameters over all processes; sharded ones have been reduced already."""
    if not _joined():
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    bucket: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        if index + 1 == len(gradients) or sum(g.numel() for g in bucket) >= BUCKET:
            _average_together(bucket)
            bucket = []


def _average_together(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if not _joined():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def joint_norm(norm: Tensor) -> Tensor:
    """The norm of the gradient of the global batch's mean loss, from that of this process's share of the batch."""
    return (average(norm.square()) / (dist.get_world_size() if _joined() else 1)).sqrt()


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scales the gradients to a global norm of at most `limit`; returns the norm before, 0-dim, over all shards."""
    groups = [group for group in _sharded_and_whole([p for p in parameters if p.grad is not None]) if group]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms or [torch.zeros(())]]).norm()
    if limit is not None:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def _sharded_and_whole(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Apart, because PyTorch's multi-tensor calls do not mix them."""
    sharded: list[nn.Parameter] = [p for p in parameters if isinstance(p, DTensor)]
    return sharded, [p for p in parameters if not isinstance(p, DTensor)]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
