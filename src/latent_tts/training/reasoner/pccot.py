"""PCCoT's objective: CODI's, but the student computes its latents in parallel sweeps, as at inference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from latent_tts.checkpoint import files, loading
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.modules import pccot_projection
from latent_tts.model.pccot import PROJECTION
from latent_tts.training.reasoner.batch import Sequences
from latent_tts.training.reasoner.coconut import CoconutObjective
from latent_tts.training.reasoner.codi import CodiObjective
from latent_tts.training.reasoner.curriculum import Distilled
from latent_tts.training.reasoner.initial import add_tensors, has_tensors, load_trainable_lm


def add_projection(folder: Path, sweeps: int, seed: int, *, projection: bool, known_first: bool) -> None:
    """Add a projection, if asked for and missing, to a checkpoint, and how it sweeps to its config.

    Args:
        folder: the checkpoint, changed in place.
        sweeps: K.
        seed: seed of the random weights.
        projection: whether latents are projected; otherwise they are the hidden states.
        known_first: whether the first sweep begins with h_1.
    """
    if projection and not has_tensors(folder, PROJECTION):
        width = int(load_trainable_lm(folder).config.hidden_size)  # which may draw random numbers
        torch.manual_seed(seed)
        add_tensors(folder, PROJECTION, pccot_projection(width))
    content = files.read_config(folder)
    content["latent_tts"] = {**(content.get("latent_tts") or {}), "sweeps": sweeps, "known_first": known_first}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


class PccotObjective(CodiObjective):
    """The cross-entropies of student and teacher, and the distance between their hidden states.

    Attributes:
        own: the projection, if the checkpoint has one.
        sweeps: K.
        known_first: whether the first sweep begins with h_1.
    """

    def __init__(self, adapter: CheckpointAdapter, recipe: Distilled, sweeps: int, *, known_first: bool) -> None:
        CoconutObjective.__init__(self, adapter, recipe.step_loss)
        self.recipe, self.sweeps, self.known_first = recipe, sweeps, known_first
        tensors = loading.load_tensors(adapter.folder, PROJECTION)
        if tensors:
            projection = pccot_projection(adapter.width)
            projection.load_state_dict(tensors)
            self.own = nn.ModuleDict({PROJECTION.removesuffix("."): projection.float().train()})
            self.next_latent = projection

    def think(self, rows: Sequences, hidden_Q1D: Tensor, latents: int) -> tuple[Tensor, Tensor]:
        """Compute the latents in K sweeps; one after another where K >= T, which gives the same latents.

        Args:
            rows: the prompts; not changed by sweeps.
            hidden_Q1D: final hidden state of each prompt's last token, from which every sweep makes the first latent.
            latents: T.

        Returns:
            The latents (Q, S, D) that were not appended to `rows`, S = T after sweeps, and the hidden states (Q, T, D)
            from which the last sweep made all T.
        """
        if self.sweeps >= latents:
            return super().think(rows, hidden_Q1D, latents)
        token = torch.tensor(self.adapter.latent_id, device=hidden_Q1D.device)
        latents_QTD = self.lm.get_input_embeddings()(token).expand(len(hidden_Q1D), latents, -1)
        before_QTD = hidden_Q1D
        if self.known_first:
            latents_QTD = torch.cat([self.next_latent(hidden_Q1D), latents_QTD[:, 1:]], dim=1)
        for _ in range(self.sweeps):
            before_QTD = torch.cat([hidden_Q1D, rows.fork().feed(latents_QTD).last_hidden_state[:, :-1]], dim=1)
            latents_QTD = self.next_latent(before_QTD)
        return latents_QTD, before_QTD
