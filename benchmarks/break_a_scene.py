"""A step of Break-a-Scene's first phase (Avrahami et al. 2023), to compare ours with.

Rebuilt from what its published code does: a second half of the batch for prior preservation, attention
whose probabilities are computed and kept in every layer, and AdamW over the whole token table, of which
all rows but the new ones are put back after each step. Its encoding of the picture in each step is left
out, as it would only make it slower.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import union
from em_core.method.problem import Problem

LARGEST_KEPT = 32**2  # queries of a map that is kept
LOSS_CELLS = 16**2
PRIOR = "a photo at the beach"
ATTENTION_WEIGHT, PRIOR_WEIGHT = 0.01, 1.0


class KeepingProcessor:
    """Attention with explicit probabilities, kept for the loss in maps of up to 32x32 queries."""

    def __init__(self, kept: list[Tensor], reads_text: bool, inner: bool) -> None:
        self.kept, self.reads_text, self.inner = kept, reads_text, inner

    def __call__(
        self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(project(given))
            for project, given in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
        )
        probabilities = attn.get_attention_scores(q, k)
        if self.reads_text and not self.inner and q.shape[1] <= LARGEST_KEPT:
            self.kept.append(probabilities)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, v))
        return attn.to_out[1](attn.to_out[0](out))


class BreakAScene:
    """Break-a-Scene's step on the models of a host, with the masks of a state.

    Attributes:
        host: the models; their attention is replaced, and their token table learned.
        names: the concepts, which have the last rows of the table.
    """

    def __init__(self, host: DiffusersHost, problem: Problem, masks: Tensor) -> None:
        self.host, self.problem = host, problem
        self.names = problem.pictures[0].names
        self.masks = masks
        (self.encoder,) = host.encoders
        self.table: nn.Parameter = self.encoder.table
        self.before = self.table.detach().clone()
        known = torch.arange(len(self.table)) < len(self.table) - len(self.names)
        self.frozen = known[:, None].to(self.table.device)
        self.kept: list[Tensor] = []
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4, weight_decay=1e-2)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the models attend and learn as Break-a-Scene's do while the context is open."""
        unet = self.host.unet
        before = dict(unet.attn_processors)
        names = {n: KeepingProcessor(self.kept, "attn2" in n, n.startswith("mid")) for n in before}
        unet.set_attn_processor(names)
        self.table.requires_grad_(True)
        try:
            yield
        finally:
            unet.set_attn_processor(before)
            self.table.requires_grad_(False)

    def ids(self, chosen: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Ids of "a photo of <a> and <b>" and of the prior's prompt, and where the concepts stand."""
        of, end = self.encoder.pieces("a photo of"), self.encoder.pieces("and")
        first = len(self.table) - len(self.names)
        pieces, places = list(of), []
        for index, name in enumerate(chosen):
            pieces += end if index else []
            places.append(1 + len(pieces))
            pieces.append(first + self.names.index(name))
        rows = [pieces, self.encoder.pieces(PRIOR)]
        tokenizer, length = self.encoder.tokenizer, self.encoder.length
        begin, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
        return torch.tensor(
            [[begin, *row, *[stop] * (length - 1 - len(row))] for row in rows]
        ), places

    def step(self, generator: torch.Generator) -> float:
        """Take one step; the loss."""
        host, (prepared,) = self.host, self.problem.pictures
        order = torch.randperm(len(self.names), generator=generator).tolist()
        count = int(torch.randint(1, len(order) + 1, (), generator=generator))
        chosen = order[:count]
        ids, places = self.ids([self.names[i] for i in chosen])
        Z0 = prepared.Z0.expand(2, *prepared.Z0.shape[1:])  # the prior's picture costs the same
        t = host.schedule.draw_times(2, generator).to(Z0.device)
        eps = torch.randn(Z0.shape, generator=generator).to(Z0)
        y = self.encoder.model(ids.to(Z0.device))[0]
        prediction = host.unet(host.schedule.add_noise(Z0, eps, t), t, y).sample
        masks = self.masks[chosen]
        small = F.interpolate(union(masks[None]), Z0.shape[-2:])
        mine, prior = F.mse_loss(prediction[:1] * small, eps[:1] * small), prediction[1:] - eps[1:]
        loss = mine + PRIOR_WEIGHT * prior.square().mean()
        loss = loss + ATTENTION_WEIGHT * self.attention_loss(masks, places)
        loss.backward()
        self.kept.clear()
        nn.utils.clip_grad_norm_([self.table], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.table.copy_(torch.where(self.frozen, self.before, self.table))
        return float(loss.detach())

    def attention_loss(self, masks: Tensor, places: Sequence[int]) -> Tensor:
        """Of the concepts' maps at 16x16, mean over layers and heads of the picture's half."""
        fit = [p[len(p) // 2 :] for p in self.kept if p.shape[1] == LOSS_CELLS]
        mean = torch.cat(fit).mean(dim=0)
        total = mean.new_zeros(())
        for mask, place in zip(masks, places, strict=True):
            wanted = F.interpolate(mask[None, None], (16, 16))[0, 0]
            found = mean[:, place].reshape(16, 16)
            total = total + F.mse_loss(found / found.max(), wanted)
        return total
