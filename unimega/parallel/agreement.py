"""What all ranks must say alike, and errors of one rank that all of them must hear."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from unimega.errors import ConfigError, UnimegaError


def check_equal(described: Mapping[str, Any]) -> None:
    """Refuse a run whose description differs between ranks: they would train different models, or wait for ever.

    Args:
        described: the resolved run as nested dictionaries of plain JSON values.

    Collective over the world: an all-gather of 32 bytes a rank; the descriptions themselves only if they differ.

    Raises:
        ConfigError: on every rank; names the first key that differs, and the ranks.
    """
    flat = dict(_flat(described, ""))
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, flat)
    other = next(rank for rank, theirs in enumerate(digests) if theirs != digests[0])
    first, second = everyone[0], everyone[other]
    key = next(key for key in [*first, *second] if first.get(key, _ABSENT) != second.get(key, _ABSENT))
    raise ConfigError(
        f"{key} differs between ranks: {_said(first, key)} on rank 0, {_said(second, key)} on rank {other}. "
        "Start every rank with the same run file and the same arguments."
    )


def raise_everywhere(error: str | None, kind: type[UnimegaError]) -> None:
    """Turn one rank's failure into the same error on all, so that none of them waits for a rank that is gone.

    Args:
        error: the line, or None if this rank has nothing to say.
        kind: what to raise.

    Collective over the world: an all-gather of the lines.
    """
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, error)
    if first := next((line for line in lines if line is not None), None):
        raise kind(first)


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            # lists and tuples become one text: 1 and [1] differ, (1,) and [1] do not
            yield f"{prefix}{key}", json.dumps(value, default=str)


def _said(flat: Mapping[str, Any], key: str) -> str:
    return flat.get(key, "absent")
