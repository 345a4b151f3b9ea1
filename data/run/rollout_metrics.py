"""What stage 2 logs: of each prompt's rewards, of a batch's rollouts, and of the passes of an update."""

import torch
from torch import Tensor

from data.batches import Rollouts
from vp import Rewards


def reward_metrics(rewards: Rewards, twin: Rewards | None, num_twin: int) -> dict[str, Tensor]:
    """Of one prompt. rewards: of the full video's rollouts, with the scores of all; twin: of the twin's, if they are
    trained on. num_twin: G', or 0 if the clip has no twin."""
    G = len(rewards.reward)
    found = {
        "reward/quality": rewards.quality[:G].mean(),
        "reward/keyword_recall": rewards.keyword_recall[:G].mean(),
        "reward/beaten_twins": rewards.beaten_twins.mean(),
        "reward/total": rewards.reward.mean(),
        "rollout/no_spread": (rewards.reward.max() - rewards.reward.min() < 1e-6).float(),
    }
    if num_twin:
        # Rows 0 .. G - 1 are the full video's rollouts, the rest the twin's.
        of_twin = slice(G, G + num_twin)
        found["reward/twin_quality"] = rewards.quality[of_twin].mean()
        found["reward/twin_keyword_recall"] = rewards.keyword_recall[of_twin].mean()
        found["reward/gap"] = found["reward/keyword_recall"] - found["reward/twin_keyword_recall"]
    if twin is not None:
        found["reward/twin_total"] = twin.reward.mean()
    return found


def rollout_metrics(rollouts: Rollouts, G: int, seconds: dict[str, float], num_processes: int) -> dict[str, float | Tensor]:
    """What is logged of a batch's rollouts, and where the time of the step went."""
    busy = seconds["rollouts"] + seconds["reward"] + seconds["update"]
    return {
        "rollout/length": rollouts.lengths[:, :G].float().mean(),
        "rollout/cut_off": (~rollouts.finished[:, :G]).float().mean(),
        **{f"perf/{name}_seconds": value for name, value in (seconds | rollouts.clock.seconds()).items()},
        "perf/tokens_per_second": rollouts.lengths.sum() * num_processes / busy,
    }


class Totals:
    """Sums over the passes of an update, on the device. weight: of all tokens that were updated on."""

    def __init__(self, device: torch.device):
        self.sums: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
        self.weight = torch.zeros((), device=device)

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Add the sums of a pass."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.weight += weight.sum()

    def metrics(self) -> dict[str, Tensor]:
        """Means over the tokens that were updated on; nothing if there was no pass."""
        means = {name: total / self.weight.clamp(min=1e-9) for name, total in self.sums.items() if name != "loss"}
        return {f"policy/{name}": mean for name, mean in means.items()}
