"""Inputs for any model, by the names of its forward's arguments.

:func:`runnable` tries combinations of what each name may mean (a spectrogram may have its bands first or last) until the
eager model answers with finite numbers. Images and sounds in a text take placeholder tokens; their number is read from
the model's own complaint about it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedConfig

from model_sweep.tiny_configs import FIRST_SPECIAL

BATCH, SEQLEN, DECODER_SEQLEN = 2, 24, 9
MAX_TRIES = 48
_MEDIA = ("pixel_values", "input_features", "input_values", "pixel_values_videos")


class NoBatch(Exception):
    """No inputs were found that the eager model answers."""


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """``config`` and the configurations nested in it, outer ones first."""
    pending = [config]
    while pending:
        config = pending.pop(0)
        yield config
        pending += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def setting(config: PreTrainedConfig, *names: str, default=None, last: bool = False):
    """The first of ``names`` that ``config`` or a nested configuration sets."""
    found = [
        value
        for name in names
        for owner in configs_of(config)
        if (value := getattr(owner, name, None)) is not None and not callable(value)
    ]
    return found[-1 if last else 0] if found else default


def _tokens(config, seqlen=SEQLEN, seed=0) -> torch.Tensor:
    vocab = setting(config, "vocab_size", default=FIRST_SPECIAL)
    vocab = vocab if isinstance(vocab, int) else FIRST_SPECIAL
    generator = torch.Generator().manual_seed(seed)
    low = 5 if vocab > 16 else 0
    return torch.randint(low, max(low + 1, min(vocab, FIRST_SPECIAL - 5)), (BATCH, seqlen), generator=generator)


def _ended(config) -> torch.Tensor:
    """As :func:`_tokens`, the last one being the end of the sequence, which some heads look for."""
    ids, end = _tokens(config), setting(config, "eos_token_id", default=0)
    ids[:, -1] = end if isinstance(end, int) else end[0]
    return ids


def _noise(*shape: int, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(value, default: int) -> tuple[int, int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return (value[0], value[-1]) if value else (default, default)
    return (int(value), int(value)) if value else (default, default)


def _image_sizes(config) -> list[tuple[int, int]]:
    sizes = [
        getattr(owner, name, None) for owner in configs_of(config) for name in ("image_size", "img_size", "input_size")
    ]
    sizes = [_pair(size, 32) for size in sizes if size]
    return list(dict.fromkeys([*sizes[::-1], (32, 32), (64, 64), (224, 224)]))[:4]


def _patches(config) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattened patches of two images, 4 x 4 and 4 x 8, with their grid."""
    patch = _pair(setting(config, "patch_size", last=True), 4)[0]
    temporal = _pair(setting(config, "temporal_patch_size"), 1)[0]
    channels = _pair(setting(config, "in_channels", "num_channels", "in_chans"), 3)[0]
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    return _noise(int(grid.prod(1).sum()), channels * temporal * patch * patch), grid


def _bands(config) -> list[int]:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "mel_bins", "input_dim", "num_mels",
             "feat_in", "input_feat_size", "input_size", "feature_projection_input_dim", "idim", "n_mel_channels")  # fmt: skip
    found = [
        v for owner in configs_of(config) for n in names if isinstance(v := getattr(owner, n, None), int) and v > 1
    ]
    return list(dict.fromkeys([*found, 80]))[:3]


def _spectrograms(config) -> Iterator[Callable[[], torch.Tensor]]:
    lengths = [64]
    positions = setting(config, "max_source_positions")
    lengths += [2 * positions, positions] if isinstance(positions, int) else []
    longest = setting(config, "max_length", "max_mel_input_length", "nb_max_frames")
    lengths = ([longest] if isinstance(longest, int) and longest < 2000 else []) + lengths + [256, 200]
    for length in dict.fromkeys(lengths):
        for bands in _bands(config):
            yield lambda length=length, bands=bands: _noise(BATCH, length, bands)
            yield lambda length=length, bands=bands: _noise(BATCH, bands, length)
    yield lambda: _noise(BATCH, 1, lengths[0], _bands(config)[0])


def _alternatives(name: str, config) -> list[Callable[[], torch.Tensor]]:
    """What an argument of this name may be, the likeliest first."""
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3, last=True)
    channels = channels if isinstance(channels, int) else 3
    patches = lambda: _patches(config)[0]  # noqa: E731
    frames = setting(config, "num_frames", "frames_per_clip", default=2)
    if name in ("input_ids", "input"):
        choices = [lambda: torch.stack([_tokens(config), _tokens(config, seed=1)], 1)]  # of a multiple choice
        found = [lambda s=s: _tokens(config, s) for s in (SEQLEN, 16, 32, 64)]
        return [found[0], lambda: _ended(config), *found[1:], *choices]
    if name.endswith("input_ids"):
        length = DECODER_SEQLEN if name.startswith("decoder") else 12
        codebooks = setting(config, "num_codebooks", "n_codebooks", default=1)
        return [
            lambda: _tokens(config, length, seed=3),
            lambda: _tokens(config, length, seed=3)[:, None].expand(-1, codebooks, -1).contiguous(),
        ]
    if name == "pixel_values":
        flat = setting(config, "patch_size", default=4, last=True)
        found = [lambda s=s: _noise(BATCH, channels, *s) for s in _image_sizes(config)]
        found += [patches]
        found += [lambda s=s: _noise(BATCH, 1, channels, *s) for s in _image_sizes(config)[:2]]
        found += [lambda s=s: _noise(BATCH, frames, channels, *s) for s in _image_sizes(config)[:2]]
        found += [lambda: _noise(BATCH, 16, channels * _pair(flat, 4)[0] ** 2)]
        return found
    if name in ("pixel_values_videos", "video"):
        found = [lambda s=s: _noise(BATCH, frames, channels, *s) for s in _image_sizes(config)[:2]]
        return [*found, patches]
    if name == "hidden_states":
        width = setting(config, "hidden_size", default=64)
        return [patches, lambda: _noise(BATCH, SEQLEN, width), lambda: _noise(BATCH, width, SEQLEN)]
    if name in ("grid_thw", "image_grid_thw"):
        return [lambda: _patches(config)[1]]
    if name == "merge_sizes":
        return [lambda: torch.tensor([1, 1]), lambda: torch.tensor([2, 2])]
    if name == "spatial_shapes":
        return [lambda: torch.tensor([[4, 4], [4, 4]])]
    if name == "pixel_attention_mask":
        return [lambda: torch.ones(BATCH, 16, dtype=torch.long)]
    if name in ("pixel_position_ids", "image_position_ids"):
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        return [lambda: grid.expand(BATCH, -1, -1).contiguous()]
    if name in ("input_features", "audio_mel", "speech_inputs"):
        found = list(_spectrograms(config))
        return [found[0], found[-1], *found[1:12]]
    if name == "input_values":
        found = [lambda: _noise(BATCH, 4000), lambda: _noise(BATCH, 1, 4000), lambda: _noise(BATCH, 1, 16000)]
        return [*found, *list(_spectrograms(config))[:6]]
    if name in ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"):
        length = setting(config, "context_length", default=32)
        lags = setting(config, "lags_sequence")
        length = length + max(lags) if lags else length
        variates = setting(config, "num_input_channels", "input_size", default=1)
        features = setting(config, "num_time_features", default=0)
        if name == "past_time_features":
            return [lambda: _noise(BATCH, length, features)]
        if name.startswith("future"):
            ahead = setting(config, "prediction_length", default=8)
            ahead = ahead if isinstance(ahead, int) else 8
            return [lambda: _noise(BATCH, ahead, *([features] if name == "future_time_features" else []))]
        if name == "past_observed_mask":
            return [lambda: torch.ones(BATCH, length), lambda: torch.ones(BATCH, length, variates)]
        return [lambda: _noise(BATCH, length), lambda: _noise(BATCH, length, variates)]
    if name == "past_values_padding":
        return [lambda: torch.zeros(BATCH, setting(config, "context_length", default=32), dtype=torch.long)]
    if name == "freq":
        return [lambda: torch.zeros(BATCH, 1, dtype=torch.long)]
    if name in ("bbox", "input_shape_ids_"):
        return [_boxes]
    if name == "image":
        return [lambda s=s: _noise(BATCH, 3, *s) for s in ((224, 224), *_image_sizes(config))]
    if name in ("input_features_mask", "feature_attention_mask", "audio_mel_mask"):
        kinds = itertools.product((torch.long, torch.bool), (64, 256))
        return [lambda n=n, kind=kind: torch.ones(BATCH, n, dtype=kind) for kind, n in kinds]
    if name in ("aspect_ratio_ids",):
        return [lambda: torch.ones(BATCH, 1, dtype=torch.long)]
    if name in ("aspect_ratio_mask",):
        return [lambda: torch.ones(BATCH, 1, setting(config, "max_num_tiles", default=4), dtype=torch.long)]
    if name in ("query_embeds", "inputs_embeds", "inputs", "latents", "encoder_hidden_states", "noise_embeds",
                "context_hidden_states", "action_embeds", "state"):  # fmt: skip
        names = ("encoder_hidden_size",) if name == "encoder_hidden_states" else ()
        width = setting(config, *names, "hidden_size", "d_model", "d_latents", default=64)
        return [lambda: _noise(BATCH, 12, width), lambda: _noise(BATCH, width, 12)]
    if name == "visual_feats":
        return [lambda: _noise(BATCH, 8, setting(config, "visual_feat_dim", default=64))]
    if name == "visual_pos":
        return [lambda: torch.rand(BATCH, 8, 4)]
    if name == "flattened_patches":
        width = setting(config, "patch_embed_hidden_size", default=64)
        index = torch.arange(1, 17)[None, :, None].expand(BATCH, -1, 1).float()
        return [lambda w=w: torch.cat([index, index, _noise(BATCH, 16, w)], -1) for w in (width, 768)]
    if name == "bool_masked_pos":
        size, patch = _image_sizes(config)[0][0], _pair(setting(config, "patch_size"), 4)[0]
        tubes = setting(config, "num_frames", default=0) // max(1, setting(config, "tubelet_size", default=1))
        count = (size // patch) ** 2 * max(1, tubes)
        return [lambda: (torch.arange(count) % 2 == 0)[None].expand(BATCH, -1).contiguous()]
    if name == "langs":
        return [lambda: torch.zeros(BATCH, SEQLEN, dtype=torch.long)]
    if name.endswith("mask"):
        return [lambda: torch.ones(BATCH, SEQLEN, dtype=torch.long)]
    return []


def _boxes() -> torch.Tensor:
    corners = torch.randint(0, 50, (BATCH, SEQLEN, 2), generator=torch.Generator().manual_seed(2))
    return torch.cat([corners, corners + 20], -1)


def _name_sets(model) -> list[list[str]]:
    """Sets of arguments to try, the fullest first."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    main = getattr(type(model), "main_input_name", "input_ids")
    main = [main] if isinstance(main, str) else list(main)
    base = list(dict.fromkeys([*required, *(name for name in main if name in parameters)]))
    base += [name for name in ("bbox",) if name in parameters and name not in base]
    media = [name for name in _MEDIA if name in parameters and name not in base]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in parameters and "decoder_input_ids" not in base else []
    sets = []
    if "input_ids" in base or "input_ids" in parameters:
        text = [*base] if "input_ids" in base else [*base, "input_ids"]
        for name in media:
            grid = ["image_grid_thw"] if name == "pixel_values" and "image_grid_thw" in parameters else []
            extra = [n for n in ("pixel_position_ids", "image_position_ids", "spatial_shapes", "pixel_attention_mask")
                     if n in parameters and name == "pixel_values"]  # fmt: skip
            sets.append([*text, name, *grid, *extra, *decoder])
            if extra:
                sets.append([*text, name, *grid, *decoder])
        if len(media) > 1:
            sets.append([*text, *media[:2], *decoder])
        if media or "input_ids" not in base:
            sets.append([*text, *decoder])
    sets.append([*base, *decoder])
    if decoder:
        sets.append(base)
    for name in ("input_features", "input_values", "inputs_embeds"):
        if name in parameters and name not in base:
            sets.append([name, *decoder])
    masks = [n for n in ("input_features_mask", "feature_attention_mask", "pixel_attention_mask") if n in parameters]
    sets += [[*names, n] for n in masks for names in sets[:1] if n not in names]
    unique = []
    for names in sets:
        if names and names not in unique:
            unique.append(names)
    return unique


def runnable(model, answers: Callable[[dict], bool]) -> dict[str, torch.Tensor]:
    """The first batch that ``answers`` takes: it calls the eager model and says whether what comes back is finite."""
    config, complaints = model.config, []
    for names in _name_sets(model):
        ways = [_alternatives(name, config) for name in names]
        if any(name.endswith("grid_thw") for name in names):
            flat = [lambda: _patches(config)[0]]
            ways = [flat if n.startswith("pixel_values") else way for n, way in zip(names, ways, strict=True)]
        if not all(ways):
            complaints.append(f"no rule for the argument {names[[bool(w) for w in ways].index(False)]!r}")
            continue
        if "spatial_shapes" in names:
            ways = [way[-1:] if n == "pixel_values" else way for n, way in zip(names, ways, strict=True)]
        for choice in itertools.islice(_product(ways), MAX_TRIES):
            batch = {name: make() for name, make in zip(names, choice, strict=True)}
            for _ in range(4):  # as many kinds of media, and their token types
                try:
                    if answers(batch):
                        return batch
                    complaints.append("not finite")
                    break
                except Exception as error:
                    complaints.append(f"{type(error).__name__}: {str(error).strip()[:200]}")
                    if not (_placed(batch, config, error) or _named(batch, model, error)):
                        break
    raise NoBatch(complaints[0] if complaints else "forward takes nothing that the rules know")


def _named(batch: dict, model, error: Exception) -> bool:
    """Adds an optional argument that ``error`` names, as "encoder_hidden_states must be given" does."""
    words = set(re.findall(r"\w+", str(error)))
    for name in inspect.signature(model.forward).parameters:
        if (
            name in words
            and name not in batch
            and name not in ("inputs_embeds", "labels", "cache", "decoder_inputs_embeds")
        ):
            ways = _alternatives(name, model.config)
            if ways:
                batch[name] = ways[0]()
                return True
    return False


def _product(ways: list[list]) -> Iterator[tuple]:
    """All combinations, those near the first alternatives first."""
    ranges = [range(len(way)) for way in ways]
    for total in range(sum(len(way) for way in ways)):
        for indices in itertools.product(*ranges):
            if sum(indices) == total:
                yield tuple(way[i] for way, i in zip(ways, indices, strict=True))


_MEDIUM = re.compile(r"(image|video|audio|speech|vision|placeholder)", re.IGNORECASE)


def _placed(batch: dict, config, error: Exception) -> bool:
    """Puts the placeholder tokens that ``error`` asks for into ``input_ids``. Says whether there is something new."""
    if "input_ids" not in batch or "token" not in str(error):
        return False
    if "mm_token_type_ids" in str(error) and "mm_token_type_ids" not in batch:
        batch["mm_token_type_ids"] = media_tokens(batch["input_ids"], config)
        return True
    traceback = error.__traceback__
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    for frame in frames[::-1]:
        embeds = frame.f_locals.get("inputs_embeds")
        features = [
            (name, value)
            for name, value in frame.f_locals.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "inputs_embeds"
            and re.search(r"features|embeds|embeddings|hidden_states|outputs", name)
        ]  # fmt: skip
        if not isinstance(embeds, torch.Tensor) or not features:
            continue
        for name, value in features:
            medium = (_MEDIUM.search(name) or _MEDIUM.search(str(error)) or [None, "image"])[1].lower()
            medium = {"speech": "audio", "vision": "image", "placeholder": "image"}.get(medium, medium)
            token = setting(config, f"{medium}_token_id", f"{medium}_token_index", f"{medium}_patch_id")
            if not isinstance(token, int):
                continue
            count = value.numel() // embeds.shape[-1]
            ids = _with_placeholders(batch["input_ids"], token, count)
            if ids is None or torch.equal(ids, batch["input_ids"]):
                continue
            batch["input_ids"] = ids
            return True
    return False


def media_tokens(ids: torch.Tensor, config) -> torch.Tensor:
    """1 at the placeholders of images, 2 at those of videos, 0 at text."""
    kinds = torch.zeros_like(ids)
    for kind, medium in ((1, "image"), (2, "video")):
        token = setting(config, f"{medium}_token_id", f"{medium}_token_index")
        if isinstance(token, int):
            kinds[ids == token] = kind
    return kinds


def _with_placeholders(ids: torch.Tensor, token: int, count: int) -> torch.Tensor | None:
    """``ids`` [batch, seqlen] with ``count`` tokens ``token`` in all, half of them in each row, behind three others."""
    if ids.dim() != 2 or count % BATCH or count > 4000 or count == 0:
        return None
    rows = []
    for row in ids:
        row = row.masked_fill(row == token, 3)
        rows.append(torch.cat([row[:3], torch.full((count // BATCH,), token), row[3:]]))
    return torch.stack(rows)


def text_mask_name(batch: dict) -> str | None:
    """The argument whose last dimension a padding mask masks: the tokens of the encoder or the decoder-only model."""
    return next((name for name in ("input_ids", "inputs_embeds") if name in batch), None)
