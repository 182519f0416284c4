"""The model a run begins with: fresh, or the weights of another run. Used by tokenizer.py,
world.py and head.py."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from ..shards.errors import CacheMismatch, UsageError
from .checkpoints import folder_with_optimizer
from .config import TrainConfig
from .draws import generator
from .models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from .pretrained import CONFIG, WEIGHTS, Pretrained, load_weights, weights_sha256

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=Pretrained)
SizedT = TypeVar("SizedT", DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig)

NOT_IN_THE_WEIGHTS = frozenset(
    {
        *("layer_scale_init", "initializer_range"),  # fresh weights only
        *("use_rope_aug", "pos_embed_rescale"),  # training draws only
        *("num_samples_train", "num_samples_eval"),
    }
)
"""Fields of a model's config that may differ from those of the weights a run starts from."""


def with_size_of_cache(config: SizedT, hidden_size: int, *, cache: str) -> SizedT:
    """The config with the cache's hidden_size; CacheMismatch if another one was set by hand."""
    default = type(config)().hidden_size
    if config.hidden_size not in (hidden_size, default):
        raise CacheMismatch(
            f"model.hidden_size is {config.hidden_size}, the tokens in {cache} have {hidden_size} "
            "channels: leave model.hidden_size away, or give another cache"
        )
    return replace(config, hidden_size=hidden_size)


def start_folder(config: TrainConfig) -> Path | None:
    """The folder whose weights, and with start_optimizer whose optimizer, a run begins with.

    UsageError if the optimizer's state is asked for and there is none.
    """
    if config.start_from is None:
        return None
    folder = Path(config.start_from)
    return folder_with_optimizer(folder) if config.start_optimizer else folder


def make_model(
    model_class: type[ModelT], config: Any, *, seed: int, start_from: Path | None
) -> tuple[ModelT, str | None]:
    """The model, on the CPU, and the sha256 of the weights it starts from (None: fresh ones).

    Fresh weights depend on the seed and the config alone. CacheMismatch naming the field if the
    weights of `start_from` belong to another config.
    """
    model = model_class(config, generator=generator(seed, "first weights"))  # type: ignore[call-arg]
    if start_from is None:
        return model, None
    if not (start_from / CONFIG).is_file():
        raise UsageError(
            f"start_from {start_from}: no model there, wanted {CONFIG} and {WEIGHTS}: "
            "give a run that has ended, or a checkpoint, RUN/checkpoints/step-NNNNNNNN"
        )
    source = model_class.from_pretrained(start_from)
    wanted = asdict(config)
    for name, value in asdict(source.config).items():
        if name not in NOT_IN_THE_WEIGHTS and value != wanted[name]:
            raise CacheMismatch(
                f"start_from {start_from}: {name} is {value}, this run's model has {wanted[name]}: "
                f"set model.{name} to {value}, or start from other weights"
            )
    load_weights(model, source.state_dict(), source=str(start_from))
    logger.info("starting from the weights in %s", start_from)
    return model, weights_sha256(source)
