"""Where dropout enters: hooks on any transformer's blocks that multiply a site's output by a sampler's factors."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_tts.errors import UsageError
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

    Used as a context manager: the hooks go when it ends. Then, a site that did not run once in every pass is an error,
    since its factors were lost.
    """

    def __init__(self, lm: PreTrainedModel, sampler: Sampler) -> None:
        """Put the hooks on.

        Raises:
            UsageError: the model's blocks do not have the sites that the sampler masks.
        """
        self.sampler = sampler
        self._draw: Draw | None = None  # of the rows that run
        self._pass_draw: Draw | None = None  # of all rows of the pass
        self._forwards: tuple[Forward, ...] = ()
        self._part = range(0)  # which of the pass's tokens run
        self._handles = []
        self._sites: list[tuple[Site, int, nn.Module]] = []
        self._passes, self._runs = 0, Counter()  # of the backbone; of each site
        if not sampler.random_phases:
            return
        blocks = find_blocks(lm)
        if not blocks:
            raise UsageError(f"sampler={sampler.name}: {type(lm.base_model).__name__} has no blocks to mask")
        self._name = f"sampler={sampler.name}: the branches of {type(blocks[0]).__name__}"
        self._sites = [
            (site, layer, self._branch(block, names)) for layer, block in enumerate(blocks) for site, names in BRANCHES
        ]
        self._handles.append(lm.base_model.register_forward_pre_hook(self._count_pass))
        self._handles.append(blocks[0].register_forward_pre_hook(self._embedding, with_kwargs=True))
        for site, layer, module in self._sites:
            self._handles.append(module.register_forward_hook(partial(self._run_site, site, layer)))

    def _branch(self, block: nn.Module, names: tuple[str, ...]) -> nn.Module:
        """The module whose output a block adds to its input."""
        module = next((getattr(block, name) for name in names if hasattr(block, name)), None)
        if module is None:
            raise UsageError(f"{self._name} cannot be masked: it has none of {', '.join(names)}")
        if "residual" in inspect.signature(module.forward).parameters:
            raise UsageError(f"{self._name} cannot be masked: {type(module).__name__} adds what it gets itself")
        return module

    def _count_pass(self, module: nn.Module, args: tuple) -> None:
        self._passes += 1

    def __enter__(self) -> SiteHooks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for site, layer, _ in self._sites if kind is None else ():
            if (runs := self._runs[site, layer]) != self._passes:
                which = f"the {site} branch of block {layer}"
                raise UsageError(f"{self._name} cannot be masked: {which} ran {runs} times in {self._passes} passes")

    def set_pass(self, draw: Draw, *forwards: Forward) -> None:
        """Say which pass comes next (or which, side by side in one), and the random numbers of its rows."""
        self._draw = self._pass_draw = draw
        self._forwards, self._part = forwards, range(sum(forward.tokens for forward in forwards))

    def select_part(self, rows: Tensor, tokens: slice) -> None:
        """Say that what runs next are some rows and tokens of the pass that `set_pass` described."""
        if self._pass_draw is not None:
            self._draw, self._part = self._pass_draw.rows(rows), range(tokens.start, tokens.stop)

    def _apply(self, site: Site, layer: int, output: Tensor) -> Tensor:
        if self._draw is None:
            return output
        # some mixtures of experts give the tokens of all rows one after another
        output_RSD = output.reshape(len(self._draw.rollouts_R), -1, output.shape[-1])
        pieces, before = [], 0
        for forward in self._forwards:
            first, stop = max(self._part.start - before, 0), min(self._part.stop - before, forward.tokens)
            if first < stop:
                here = before - self._part.start
                piece_RSD = output_RSD[:, here + first : here + stop]
                pieces.append(self._mask(site, layer, forward, piece_RSD, first))
            before += forward.tokens
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).view_as(output)

    def _mask(self, site: Site, layer: int, forward: Forward, output_RSD: Tensor, first: int) -> Tensor:
        """A site's output, for the tokens from `first` on of a forward pass, times the sampler's factors."""
        assert self._draw is not None
        if self._draw.drops(output_RSD):
            place = self.sampler.dropout(site, layer, forward)
            if place is not None:
                return self._draw.drop(output_RSD, place, first)
        factors = self.sampler.factors(site, layer, self._draw, forward)
        if factors is None:
            return output_RSD
        if factors.shape[1] > 1:
            factors = factors[:, first : first + output_RSD.shape[1]]
        # multiplied in float32 at least; widening first is twice as fast as a product of two dtypes
        product_RSD = output_RSD.to(torch.promote_types(output_RSD.dtype, factors.dtype)) * factors
        return product_RSD.to(output_RSD.dtype)

    def _embedding(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._apply("embedding", 0, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._apply("embedding", 0, kwargs["hidden_states"])}

    def _run_site(
        self, site: Site, layer: int, module: nn.Module, args: tuple, output: Tensor | tuple
    ) -> Tensor | tuple:
        self._runs[site, layer] += 1
        if isinstance(output, tuple):
            return (self._apply(site, layer, output[0]), *output[1:])
        return self._apply(site, layer, output)


def find_blocks(lm: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal LM: its one module list of `num_hidden_layers` entries.

    Raises:
        UsageError: it has none.
    """
    layers = lm.config.get_text_config(decoder=True).num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise UsageError(f"{type(lm.base_model).__name__}: no module list of {layers} blocks found")
