"""The objective of every family, on a tiny checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi
from latent_tts.model.colar import Colar
from latent_tts.model.cot import Cot
from latent_tts.model.pccot import Pccot
from latent_tts.recipe.coconut import Coconut as CoconutRecipe
from latent_tts.recipe.codi import Codi as CodiRecipe
from latent_tts.recipe.colar import Colar as ColarRecipe
from latent_tts.recipe.cot import Cot as CotRecipe
from latent_tts.recipe.pccot import Pccot as PccotRecipe
from latent_tts.training.reasoner.curriculum import Recipe
from latent_tts.training.reasoner.initial import copy_checkpoint, write_initial_checkpoint

STAGES = {"written_updates": 1, "stage_updates": [], "final_updates": 1, "final_dropout": None, "latents": 3}
DISTILLED = STAGES | {"teacher_weight": 0.7, "distill_weight": 2.0, "distill_loss": "smooth_l1", "step_loss": 0.5}
RECIPES: dict[str, tuple[type[Recipe], dict[str, Any], type, dict[str, Any]]] = {
    "coconut": (CoconutRecipe, STAGES | {"step_loss": 0.5}, Coconut, {}),
    "codi": (
        CodiRecipe, DISTILLED | {"projector_hidden": 24, "projector_init": "random", "projector_dropout": 0.1}, Codi, {}
    ),
    "pccot": (
        PccotRecipe, DISTILLED | {"sweeps": 2, "known_first": False, "projection": True},
        Pccot, {"sweeps": 2, "answer_prompt": ""},
    ),
    "colar": (
        ColarRecipe,
        {"written_updates": 1, "final_updates": 1, "final_dropout": None, "speed": 5, "latents": 9,
         "latent_loss": "nll", "latent_weight": 0.7, "latent_noise": 0.0, "head_hidden": 24},
        Colar, {"thinking_speed": 5},
    ),
    "cot": (CotRecipe, {"written_updates": 2}, Cot, {}),
}  # fmt: skip


def made(family: str, checkpoint: Path, folder: Path) -> tuple[Recipe, Any]:
    """The recipe of a family, and the adapter of its initial checkpoint, which is written to a folder."""
    recipe_class, values, adapter_class, more = RECIPES[family]
    recipe = recipe_class(**values)
    write_initial_checkpoint(partial(copy_checkpoint, checkpoint), folder, recipe, seed=1)
    latents = values.get("latents", 0)
    return recipe, adapter_class(name=family, checkpoint=str(folder), latents=latents, recommended={}, **more)
