"""NaN and infinity stop the run, and what they came from is kept on disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_drive.errors import TrainingError
from rlhf_drive.policies.checkpoints import replace_folder
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.shards import piece

__all__ = ["CHECKED", "Evidence", "check_finite", "check_gradients"]

CHECKED = ("loss", "logp", "old_logp", "ref_logp", "advantages")
"""Tensors that must be finite; the log-probabilities where `mask` says so. `rewards` are NaN where invalid."""
MASKED = ("logp", "old_logp", "ref_logp")
TENSORS = "tensors.safetensors"
SCENES = "scenes.json"


@dataclass(frozen=True)
class Evidence:
    """What one forward pass of the update saw: n rows of some scenes. Only references, detached: it costs nothing."""

    step: int
    """0-based; the folder is named by ``step + 1``, as the metrics are."""
    scene_tokens: Sequence[str]
    """Scene of each row, n names."""
    rows: Tensor
    """``[n]`` long, the rows' places in the step's rollout."""
    tensors: Mapping[str, Tensor | None]
    """`loss` scalar; `logp`, `old_logp`, `ref_logp`, `mask` ``[n, T]``; `advantages`, `rewards` ``[n]``; `tokens`
    ``[n, L]``; `states` ``[K, n, L]``; any others. None is left out."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The step's metrics so far."""

    def __post_init__(self) -> None:
        # Else a kept piece of evidence would keep the graph of its forward pass.
        detached = {name: None if value is None else value.detach() for name, value in self.tensors.items()}
        object.__setattr__(self, "tensors", detached)

    @staticmethod
    def concatenate(parts: Sequence[Evidence]) -> Evidence:
        """The rows of several micro-batches; their losses are summed."""
        joined: dict[str, Tensor | None] = {}
        for name in parts[0].tensors:
            values = [value for part in parts if (value := part.tensors[name]) is not None]
            if values:
                flat = torch.stack(values).sum() if values[0].ndim == 0 else None
                joined[name] = torch.cat(values, dim=_row_axis(name)) if flat is None else flat
        names = [token for part in parts for token in part.scene_tokens]
        return replace(parts[-1], scene_tokens=names, rows=torch.cat([part.rows for part in parts]), tensors=joined)


def check_finite(evidence: Evidence, policy: nn.Module, folder: Path | None, ranks: Ranks | None = None) -> None:
    """Stop where a loss, log-probability or advantage is NaN or infinite; one transfer to the host if all is well.

    Args:
        evidence: What the pass saw, before ``backward``.
        policy: To tell which of its weights and gradients are not finite.
        folder: Of the stage; the evidence goes to ``folder/offending/step-000012/``, with ``-rank-1`` after it from
            one of several processes. None keeps none.
        ranks: The processes, if there may be several; each looks at what it holds, so nobody waits for another.

    Raises:
        TrainingError: With the folder, the scenes, what is not finite, on which process, and what to do.
    """
    flags = _not_finite(evidence)
    if flags and bool(torch.stack([flag.any() for flag in flags.values()]).any()):
        raise _stop(evidence, flags, policy, folder, ranks, norm=None)


def check_gradients(
    norm: Tensor, evidence: Evidence, policy: nn.Module, folder: Path | None, ranks: Ranks | None = None
) -> None:
    """Stop where the norm of the gradients is NaN or infinite; see :func:`check_finite`.

    Called after each micro-batch's ``backward``, the evidence names the micro-batch that broke them; called once
    before the update, with :meth:`Evidence.concatenate`, the batch.

    Args:
        norm: Scalar, norm of all gradients before clipping, which would spread NaN over all of them, after which the
            guilty ones could not be told.
        evidence: Of the rows whose gradients were added last.
        policy: Holds the gradients.
        folder: Of the stage.
        ranks: See :func:`check_finite`.

    Raises:
        TrainingError: See :func:`check_finite`.
    """
    if not bool(torch.isfinite(norm)):
        raise _stop(evidence, _not_finite(evidence), policy, folder, ranks, norm=norm)


def _row_axis(name: str) -> int:
    return 1 if name == "states" else 0


def _not_finite(evidence: Evidence) -> dict[str, Tensor]:
    """Bool tensor for each checked one, True where it is not finite and counts."""
    mask = evidence.tensors.get("mask")
    flags = {}
    for name in CHECKED:
        value = evidence.tensors.get(name)
        if value is not None:
            flag = ~torch.isfinite(value)
            flags[name] = flag & mask.to(flag.device) if name in MASKED and mask is not None else flag
    return {name: flag.to(next(iter(flags.values())).device) for name, flag in flags.items()}


def _stop(
    evidence: Evidence,
    flags: Mapping[str, Tensor],
    policy: nn.Module,
    folder: Path | None,
    ranks: Ranks | None,
    *,
    norm: Tensor | None,
) -> TrainingError:
    """Write the evidence; the error that names it."""
    rowwise = [flag.reshape(len(flag), -1).any(dim=1).cpu() for flag in flags.values() if flag.ndim]
    bad = torch.stack(rowwise).any(dim=0) if rowwise else torch.zeros(len(evidence.rows), dtype=torch.bool)
    if not bad.any():
        bad = torch.ones_like(bad)  # The loss or gradients alone: any row may have done it.
    counts = {name: int(flag.sum()) for name, flag in flags.items() if bool(flag.any())}
    weights = [name for name, p in policy.named_parameters() if not _finite(p.detach())]
    gradients = [name for name, p in policy.named_parameters() if p.grad is not None and not _finite(p.grad)]
    scenes: dict[str, list[int]] = {}
    for i in bad.nonzero().flatten().tolist():
        scenes.setdefault(evidence.scene_tokens[i], []).append(int(evidence.rows[i]))
    report = {
        "step": evidence.step + 1,
        "not_finite": counts,
        "gradient_norm": None if norm is None else _plain(float(norm)),
        "scenes": [{"scene": name, "rows": rows} for name, rows in scenes.items()],
        "weights_not_finite": weights,
        "gradients_not_finite": gradients,
        "parameters": [name for name, _ in policy.named_parameters()],
        "rows": evidence.rows.tolist(),
        "row_scenes": list(evidence.scene_tokens),
        "metrics": {name: _plain(value) for name, value in evidence.metrics.items()},
    }
    kept = ""
    if folder is not None:
        who = f"-rank-{ranks.index}" if ranks and ranks.count > 1 else ""
        where = _write(folder / "offending" / f"step-{evidence.step + 1:06d}{who}", evidence, report)
        kept = f" Tensors and scenes are in {where}."
    what = [f"{name} ({count} of {flags[name].numel()} values)" for name, count in counts.items()]
    what += [] if norm is None else [f"the gradient norm ({float(norm)})"]
    what += [f"weights {_few(weights)}"] if weights else [f"gradients {_few(gradients)}"] if gradients else []
    return TrainingError(
        f"Step {evidence.step + 1}{_at(ranks)}: not finite: {', '.join(what)}; scenes {_few(list(scenes))}.{kept} "
        f"{_advice(counts, weights)}"
    )


def _finite(tensor: Tensor) -> bool:
    """Whether all of it is finite that this process holds: asking for the rest would take the others."""
    return bool(torch.isfinite(piece(tensor)).all())


def _at(ranks: Ranks | None) -> str:
    return f" on rank {ranks.index} of {ranks.count} processes" if ranks and ranks.count > 1 else ""


def _advice(counts: Mapping[str, int], weights: Sequence[str]) -> str:
    if "advantages" in counts:
        return "A reward gave a number that cannot be learned from: check the reward of these scenes."
    if weights:
        return "An earlier update broke the weights: lower rl.learning_rate and resume from the last checkpoint."
    if "old_logp" in counts:
        return "The sampler recorded them: check rollout.temperature and rollout.top_k."
    return "Lower rl.learning_rate or set rl.ratio_limit, and resume from the last checkpoint."


def _few(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _plain(value: float) -> float | str:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else str(value)


def _write(final: Path, evidence: Evidence, report: Mapping[str, Any]) -> Path:
    """Both files in one rename; an earlier folder of the same step gives way."""
    from safetensors.torch import save_file

    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: value for name, value in evidence.tensors.items() if value is not None}
    flags: dict[str, Iterable[str]] = {
        "weights_not_finite": report["weights_not_finite"],
        "gradients_not_finite": report["gradients_not_finite"],
    }
    for name, broken in flags.items():
        tensors[name] = torch.tensor([parameter in set(broken) for parameter in report["parameters"]])
    save_file({n: t.cpu().contiguous().clone() for n, t in tensors.items()}, temporary / TENSORS)
    (temporary / SCENES).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    replace_folder(temporary, final)
    return final
