"""Samplers and plans of rollouts that can be recorded."""

from against_oracle import MASKS, NOISE

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.sampler.native import Native

DRAWN = AnswerSampling(1.5, 0.9)
SAMPLERS = {
    "greedy": Greedy(),
    "gaussian": NOISE,
    "relative": Gaussian(0.3, True),
    "native": Native(0.5),
    "dropout everywhere": MASKS,
    "dropout everywhere but in answers": Dropout(0.2, "residual", ["prompt", "thoughts"], "fresh"),
    "dropout in thoughts": Dropout(0.2, "ffn", ["thoughts"], "fresh"),
    "locked dropout": Dropout(0.2, "residual", ["thoughts", "answer"], "locked"),
    "drawn answers": DRAWN.over(NOISE),
    "drawn answers of greedy": DRAWN.over(Greedy()),
    "repeat": Control("repeat"),
    "shuffle": Control("shuffle"),
}
PLANS = {
    "plain": {"latents": 2},
    "stops by a token": {"latents": 3, "stop_id": 11},
    "forced beginning": {"latents": 1, "forced_ids": [5]},
    "no latents": {"latents": 0},
    "answers right after the prompt": {"latents": 0, "end": 0},
    "no end": {"latents": 1, "ends": False},
}
FEW = [
    ("gpt2", "gaussian", "plain"),
    ("llama", "drawn answers", "forced beginning"),
    ("gpt2", "dropout in thoughts", "stops by a token"),
    ("qwen3", "dropout everywhere", "no end"),
    ("gpt2", "shuffle", "plain"),
    ("gpt2", "drawn answers of greedy", "answers right after the prompt"),
]
