"""Where dropout enters: hooks on any transformer's blocks that multiply a site's output by a sampler's factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_tts.errors import RunError
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.types import Forward, Site

# what transformers' families call a block's two branches
BRANCHES: tuple[tuple[Site, tuple[str, ...]], ...] = (
    ("attention", ("attn", "self_attn", "attention")),
    ("ffn", ("mlp", "feed_forward", "ffn")),
)


class SiteHooks:
    """Hooks on a backbone that multiply outputs by a sampler's factors; they do nothing before the first `set_pass`.

    Used as a context manager: the hooks go when it ends.
    """

    def __init__(self, lm: PreTrainedModel, sampler: Sampler) -> None:
        self.sampler = sampler
        self._draw: Draw | None = None  # of the rows that run
        self._pass_draw: Draw | None = None  # of all rows of the pass
        self._forwards: tuple[Forward, ...] = ()
        self._part = slice(None)  # which of the pass's tokens run
        self._handles = []
        if not sampler.random_phases:
            return
        blocks = find_blocks(lm)
        self._handles.append(blocks[0].register_forward_pre_hook(self._embedding, with_kwargs=True))
        for layer, block in enumerate(blocks):
            for site, names in BRANCHES:
                module = next((getattr(block, name) for name in names if hasattr(block, name)), None)
                if module is None:
                    raise RunError(f"sampler=dropout: {type(block).__name__} has none of {', '.join(names)} to mask")
                self._handles.append(module.register_forward_hook(self._hook(site, layer)))

    def __enter__(self) -> SiteHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def set_pass(self, draw: Draw, *forwards: Forward) -> None:
        """Say which pass comes next (or which, side by side in one), and the random numbers of its rows."""
        self._draw = self._pass_draw = draw
        self._forwards, self._part = forwards, slice(None)

    def select_part(self, rows: Tensor, tokens: slice) -> None:
        """Say that what runs next are some rows and tokens of the pass that `set_pass` described."""
        if self._pass_draw is not None:
            self._draw, self._part = self._pass_draw.rows(rows), tokens

    def _apply(self, site: Site, layer: int, output: Tensor) -> Tensor:
        if self._draw is None:
            return output
        parts = [self.sampler.factors(site, layer, self._draw, forward) for forward in self._forwards]
        if all(part is None for part in parts):
            return output
        factors = self._side_by_side(parts, output)
        if factors.shape[1] > 1:
            factors = factors[:, self._part]
        # multiplied in float32 at least; widening first is twice as fast as a product of two dtypes
        return (output.to(torch.promote_types(output.dtype, factors.dtype)) * factors).to(output.dtype)

    def _side_by_side(self, parts: list[Tensor | None], output: Tensor) -> Tensor:
        """The factors of all forward passes; ones where a pass has none."""
        if len(parts) == 1 and parts[0] is not None:
            return parts[0]
        one = torch.ones((), device=output.device)
        sizes = [(output.shape[0], forward.tokens, output.shape[2]) for forward in self._forwards]
        whole = [(one if part is None else part).expand(size) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(whole, dim=1)

    def _embedding(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        del module
        if args:
            return (self._apply("embedding", 0, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._apply("embedding", 0, kwargs["hidden_states"])}

    def _hook(self, site: Site, layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            del module, args
            if isinstance(output, tuple):
                return (self._apply(site, layer, output[0]), *output[1:])
            return self._apply(site, layer, output)

        return hook


def find_blocks(lm: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal LM: its one module list of `num_hidden_layers` entries."""
    layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise RunError(f"{type(lm.base_model).__name__}: no module list of {layers} blocks found")
