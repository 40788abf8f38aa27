"""The codebook doctor: watches how codes are used over a long window of training, and acts when they fall out of use.

A codebook collapses when the encoder moves away from codes that nothing chooses any more; what is left of it draws all
vectors to itself, and the loss alone does not say so. The doctor counts use over the last `window` steps and comes by
every so many steps. What it may prescribe, each time with its reason:

- revival of unused codes (codebook.py), where the bottleneck has it switched off or waits longer than the doctor would;
- half the learning rate, where codes die again although they are revived: the encoder moves faster than they follow;
- half the discriminator's weight, where images became much worse than they were while it was heard, and back later;
- half the learning rate, where they became much worse without it.

Decisions are pure functions of counts and figures that are summed over all processes, so every process takes the same.
All of it is in the checkpoint: a resumed run is treated as one that was never interrupted.

Letters: K codebook size. Several codebooks (residual, hierarchy) are counted each for itself.
"""

from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stage1_tokenizer.bottlenecks import Bottleneck
from stage1_tokenizer.bottlenecks.codebook import Revival, sum_over_processes
from tessera.config import Config
from tessera.metrics import perplexity
from tessera.training.optimizers import Optimizers

ENOUGH = 4  # vectors for each code in a window, below which unused codes say nothing
LEAST_SHARE = 1 / 16  # of a learning rate or of the discriminator; the doctor goes no lower


class DoctorConfig(Config):
    """What is measured and when something is done about it. A healthy run is left alone."""

    acts: bool = True  # false only watches
    every: int = Field(100, gt=0)  # steps between visits
    window: int = Field(500, gt=0)  # steps over which use is counted; a multiple of `every`
    least_used: float = Field(0.95, ge=0, le=1)  # share of the codes in use in a window below which something is done
    patience: int = Field(50, gt=0)  # steps without use after which a code is revived, once revival is prescribed
    largest_fall: float = Field(3.0, gt=0)  # dB of PSNR below the best visit from which something is done
    codes_shown: int = Field(128, gt=0)  # of each codebook on the page, half of them the most and half the least used

    @model_validator(mode="after")
    def _whole_visits(self) -> "DoctorConfig":
        if self.window % self.every:
            raise ValueError(f"window must be a multiple of every, {self.every}; got {self.window}")
        return self


class Visit(NamedTuple):
    """What was found at one visit."""

    step: int
    used: float  # share of the codes in use in the window
    perplexity: float  # of code use in the window, mean over codebooks
    dead: int  # codes that nothing used in the window
    revived: int  # codes that came back since the visit before
    psnr: float  # dB, mean since the visit before


class Action(NamedTuple):
    """What was done, and why."""

    step: int
    what: str
    why: str


class Doctor:
    """Of one bottleneck with codes. `observe` every step, `visit` every so many; `treat` before every step."""

    def __init__(self, config: DoctorConfig, bottleneck: Bottleneck, device: torch.device) -> None:
        assert bottleneck.codebook_size is not None
        self.config = config
        self.revivals = [
            part for part in bottleneck.modules() if isinstance(part, Revival)
        ]  # a codebook each, in order
        shape = (config.window // config.every, max(bottleneck.codebook_of) + 1, bottleneck.codebook_size)
        self.blocks = torch.zeros(
            shape, dtype=torch.int64, device=device
        )  # use between visits, the newest at visit % n
        self.counts = self.blocks.sum(0)  # (codebooks, K), use in the window of the last visit
        self.quality = torch.zeros(2, dtype=torch.float64, device=device)  # sum of PSNR and number of images
        self.revived = 0  # codes, since the last visit
        self.visits: list[Visit] = []
        self.actions: list[Action] = []
        self.patience: int | None = None  # prescribed; None leaves the bottleneck's own
        self.learning_rate_share = 1.0
        self.adversarial_share = 1.0
        # Visits after which codes and images are judged: a whole window after something was done about them.
        self.judge_codes_from = len(self.blocks)
        self.judge_pictures_from = 0

    def treat(self, optimizers: Optimizers) -> None:
        """Has the prescriptions so far followed in the coming step."""
        optimizers.share = self.learning_rate_share
        if self.patience is not None:
            for revival in self.revivals:
                revival.patience = self.patience

    @torch.no_grad()
    def observe(self, bottleneck: Bottleneck, codes: Tensor, psnr: Tensor) -> None:
        """Codes (B, Q, h, w) and PSNR (B,) of a training step of this process."""
        counts = bottleneck.count(codes)
        if bottleneck.training:
            for book, revival in zip(counts, self.revivals, strict=False):
                book[revival.revived] = 0  # took a vector of this very step; what uses it from now on counts
                self.revived += len(revival.revived)
        self.blocks[len(self.visits) % len(self.blocks)] += sum_over_processes(counts)
        figures = torch.stack([psnr.double().clamp(max=100).sum(), psnr.new_tensor(len(psnr)).double()])
        self.quality += sum_over_processes(figures)

    def visit(self, step: int, bottleneck: Bottleneck, adversarial: bool, compared_from: int = 0) -> Visit:
        """Sums up the window that ends with `step` and, where it is ill, adds to `actions` and to the prescriptions.

        `adversarial` says whether the discriminator is heard, `compared_from` which visits had the same losses
        otherwise; codes that no longer learn are not treated.
        """
        self.counts = counts = self.blocks.sum(0)
        dead = int((counts == 0).sum())
        found = Visit(
            step=step,
            used=round(1 - dead / counts.numel(), 6),
            perplexity=round(perplexity(counts), 3) if bool(counts.any(1).all()) else 0.0,
            dead=dead,
            revived=self.revived,
            psnr=round(float(self.quality[0] / self.quality[1].clamp_min(1)), 4),
        )
        best = max((visit.psnr for visit in self.visits if visit.step > compared_from), default=found.psnr)
        self.visits.append(found)
        if self.config.acts:
            if bottleneck.training:
                self._judge_codes(found, counts)
            self._judge_pictures(found, best, adversarial)
        self.revived = 0
        self.quality.zero_()
        self.blocks[len(self.visits) % len(self.blocks)] = 0
        return found

    def _judge_codes(self, found: Visit, counts: Tensor) -> None:
        enough = bool((counts.sum(1) >= ENOUGH * counts.shape[1]).all())
        if not self.revivals or not enough or len(self.visits) < self.judge_codes_from:
            return
        if found.used >= self.config.least_used:
            return
        why = f"{found.used:.1%} of the codes were used in the last {self.config.window} steps, {found.dead} were not"
        slow = [revival.patience for revival in self.revivals]
        if any(patience == 0 or patience > self.config.patience for patience in slow):
            start = "off" if 0 in slow else f"after {max(slow)} steps"
            self.patience = self.config.patience
            self._act(found, f"revive codes after {self.patience} steps without use", f"{why}, and revival was {start}")
        elif self.learning_rate_share > LEAST_SHARE:
            self._halve_learning_rate(found, f"{why}, although {found.revived} came back since the visit before")
        else:
            return
        self.judge_codes_from = len(self.visits) + len(self.blocks)

    def _judge_pictures(self, found: Visit, best: float, adversarial: bool) -> None:
        if len(self.visits) < self.judge_pictures_from:
            return
        fall = best - found.psnr
        why = f"PSNR was {found.psnr:.1f} dB since the visit before, {fall:.1f} below the best"
        if fall <= self.config.largest_fall:
            if self.adversarial_share < 1 and fall <= self.config.largest_fall / 2:
                self.adversarial_share = min(1.0, 2 * self.adversarial_share)
                recovered = f"PSNR is back at {found.psnr:.1f} dB"
                self._act(found, f"discriminator up to {self.adversarial_share:g} of its weight", recovered)
        elif adversarial and self.adversarial_share > LEAST_SHARE:
            self.adversarial_share /= 2
            heard = "while the discriminator was heard"
            self._act(found, f"discriminator down to {self.adversarial_share:g} of its weight", f"{why} {heard}")
            self.judge_pictures_from = len(self.visits) + len(self.blocks)
        elif self.learning_rate_share > LEAST_SHARE:
            self._halve_learning_rate(found, why)
            self.judge_pictures_from = len(self.visits) + len(self.blocks)

    def _halve_learning_rate(self, found: Visit, why: str) -> None:
        self.learning_rate_share /= 2
        self._act(found, f"learning rate down to {self.learning_rate_share:g} of the schedule", why)

    def _act(self, found: Visit, what: str, why: str) -> None:
        self.actions.append(Action(found.step, what, why))

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "counts": self.counts,
            "quality": self.quality,
            "revived": self.revived,
            "visits": [list(visit) for visit in self.visits],
            "actions": [list(action) for action in self.actions],
            "patience": self.patience,
            "learning_rate_share": self.learning_rate_share,
            "adversarial_share": self.adversarial_share,
            "judge_codes_from": self.judge_codes_from,
            "judge_pictures_from": self.judge_pictures_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["blocks"].shape != self.blocks.shape:
            raise ValueError(
                f"its codes were counted as {tuple(state['blocks'].shape)}, not {tuple(self.blocks.shape)}"
            )
        self.blocks.copy_(state["blocks"])
        self.counts = state["counts"].to(self.counts)
        self.quality.copy_(state["quality"])
        self.revived = state["revived"]
        self.visits = [Visit(*visit) for visit in state["visits"]]
        self.actions = [Action(*action) for action in state["actions"]]
        self.patience = state["patience"]
        self.learning_rate_share, self.adversarial_share = state["learning_rate_share"], state["adversarial_share"]
        self.judge_codes_from, self.judge_pictures_from = state["judge_codes_from"], state["judge_pictures_from"]
