"""A dense checkpoint becomes one of routed experts, each a copy of an FFN: of its own, or of those of specialists."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unimega.config import expert_keys, model_rules, presets, strict
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ModelConfig
from unimega.errors import CheckpointError, ConfigError
from unimega.hf.convert import Part, Progress, write_checkpoint
from unimega.hf.fate import Fate
from unimega.hf.stored import StoredWeights, Unmade
from unimega.hf.target import CHECKPOINT, TOKENIZER_FOLDER, check_target
from unimega.parallel import step_folder
from unimega.parallel.initialize import deviation, draw, generator

_LEAVES = ("gate", "up", "down")
_WHERE = "command line"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How experts differ from the FFNs that they are copies of, and what the model is."""

    keys: Mapping[str, Any]
    """``[model]`` keys of the new model that the dense one does not have: ``preset``, ``experts``, ``top_k``, ..."""
    noise: float = 0.0
    """Normal noise on experts, in deviations of the weight."""
    drop: float = 0.0
    """Share of each expert's hidden units that are drawn anew, from the weight's own mean and deviation."""
    seed: int = 1
    """Of all that is drawn."""


@dataclass(frozen=True, kw_only=True)
class Upcycled:
    """What was written."""

    fates: list[Fate]
    model: ModelConfig
    changes: str
    """Why the new model computes something else than the dense one; empty: it does not."""


@dataclass(frozen=True)
class _Dense:
    """A checkpoint to take weights from."""

    path: Path
    step: Path
    spec: ModelSpec
    stored: dict[str, Any]
    weights: StoredWeights


def upcycle(
    path: Path,
    target: Path,
    recipe: Recipe,
    *,
    specialists: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Upcycled:
    """Write the checkpoint. One process; holds the experts' part of one weight of one layer, [E, F, D], at a time.

    Args:
        path: a folder of steps or one step's folder, of a dense model.
        target: a new folder of steps.
        specialists: checkpoints of the same model; expert e is the FFN of number e, from the first again after the
            last. Empty: all experts are the FFN of ``path``, which gives all other weights in any case.
        overwrite: replace a checkpoint that is already there.
        progress: hears of every tensor that is written.

    Raises:
        CheckpointError: a checkpoint is damaged, not dense, or of another model than the first; the target exists,
            or is one of them.
        ConfigError: keys that make no model.
    """
    place = check_target(target, CHECKPOINT, overwrite=overwrite)
    for origin in (path, *specialists):  # --overwrite would take away what it is made of
        if target.resolve() in (origin.resolve(), origin.resolve().parent):
            raise CheckpointError(f"{str(target)!r} is where {str(origin)!r} is read from. Name another folder.")
    dense = _open(path)
    _check_dense(dense)
    model = _model(dense, recipe)
    spec = replace(dense.spec, layers=presets.layers(model))
    sources = [_open(one) for one in specialists]
    for source in sources:
        _check_same(source, dense)
    if len(sources) > next(layer.experts.number for layer in spec.layers if layer.experts):
        raise CheckpointError(f"--from names {len(sources)} checkpoints, but there are fewer experts. Name as many.")
    work = _Work(dense, sources, spec, recipe)
    parts = work.parts()
    tokenizer = next(
        (one / TOKENIZER_FOLDER for one in (path, dense.step.parent) if (one / TOKENIZER_FOLDER).is_dir()), None
    )
    config = tokenizer / "config.json" if tokenizer and (tokenizer / "config.json").is_file() else None
    metadata = {**dense.stored, "spec": spec.to_dict(), "model": asdict(model)}
    write_checkpoint(
        target,
        parts,
        partial=place,
        metadata=metadata,
        model=model,
        tokenizer=tokenizer,
        config=config,
        progress=progress,
    )
    fates = [fate for part in parts for fate in part.fates] + work.dropped()
    return Upcycled(fates=fates, model=model, changes=_changes(spec, recipe, sources))


class _Work:
    """The keys of the new checkpoint, and how each is made."""

    def __init__(self, dense: _Dense, sources: list[_Dense], spec: ModelSpec, recipe: Recipe) -> None:
        self.dense, self.sources, self.spec, self.recipe = dense, sources or [dense], spec, recipe
        self.is_own = not sources
        self.is_used = dense.step in [one.step for one in self.sources]

    def parts(self) -> list[Part]:
        """In the order of the dense checkpoint's keys; experts stand where the FFN stood."""
        made: list[Part] = []
        sparse = {f"layers.{i}.ffn.": layer.experts for i, layer in enumerate(self.spec.layers) if layer.experts}
        for key, shape in self.dense.weights.shapes.items():
            base = next((base for base in sparse if key.startswith(base)), None)
            if base is None:
                read = partial(_read, self.dense, key)
                tensor = Unmade(shape=shape, dtype=self.dense.weights.dtypes[key], make=read)
                made.append(Part(key, tensor, (Fate("copied", (key,), key),)))
        for base, experts in sparse.items():
            made += self._router(base, experts)
            made += [self._experts(base, leaf, experts) for leaf in _LEAVES]
        return made

    def dropped(self) -> list[Fate]:
        """FFNs of the first checkpoint that specialists stand in for."""
        if self.is_used:
            return []
        sparse = [i for i, layer in enumerate(self.spec.layers) if layer.experts]
        keys = [f"layers.{i}.ffn.{leaf}.weight" for i in sparse for leaf in _LEAVES]
        return [Fate("dropped", (key,), "", "experts come from --from") for key in keys]

    def _router(self, base: str, experts: ExpertSpec) -> list[Part]:
        key, shape = f"{base}router.weight", (experts.number, self.spec.width)
        dtype = self.dense.weights.dtypes[f"{base}gate.weight"]
        weight = Unmade(
            shape=shape, dtype=dtype, make=lambda: draw(key, shape, self.spec, seed=self.recipe.seed).to(dtype)
        )
        note = f"normal, deviation {deviation(key, self.spec):.3g}"
        made = [Part(key, weight, (Fate("initialised", (), key, note),))]
        if experts.bias_rate:
            bias = f"{base}router.bias"
            zeros = Unmade(shape=shape[:1], dtype=torch.float32, make=lambda: torch.zeros(shape[:1]))
            made.append(Part(bias, zeros, (Fate("initialised", (), bias, "zeros"),)))
        return made

    def _experts(self, base: str, leaf: str, experts: ExpertSpec) -> Part:
        old, key = f"{base}{leaf}.weight", f"{base}experts.{leaf}.weight"
        shape, dtype = self.dense.weights.shapes[old], self.dense.weights.dtypes[old]
        stack = Unmade(
            shape=(experts.number, *shape),
            dtype=dtype,
            make=lambda: self._stack(base, leaf, experts.number, shape, dtype),
        )
        return Part(key, stack, tuple(self._fates(old, key, experts.number)))

    def _fates(self, old: str, key: str, number: int) -> list[Fate]:
        changed = [f"noise {self.recipe.noise:g}"] if self.recipe.noise else []
        changed += [f"{self.recipe.drop:.0%} of the units drawn anew"] if self.recipe.drop else []
        if self.is_own:
            return [Fate("copied", (old,), key, ", ".join([f"{number} experts", *changed]))]
        fates = []
        for at, source in enumerate(self.sources):
            own = ", ".join(str(one) for one in range(at, number, len(self.sources)))
            note = ", ".join([f"expert{'s' * (',' in own)} {own} from {source.path}", *changed])
            fates.append(Fate("copied", (old,), key, note))
        return fates

    def _stack(self, base: str, leaf: str, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One weight of all experts; reads each source once."""
        out = torch.empty((number, *shape), dtype=dtype)
        for at, source in enumerate(self.sources):
            weight = _read(source, f"{base}{leaf}.weight")
            for one in range(at, number, len(self.sources)):
                out[one] = self._own(weight, base, leaf, one)
        return out

    def _own(self, weight: torch.Tensor, base: str, leaf: str, expert: int) -> torch.Tensor:
        """An expert's own copy. Units are the same in gate, up and down; numbers depend on seed, key and expert."""
        recipe = self.recipe
        if not recipe.noise and not recipe.drop:
            return weight
        own, values = weight.float().clone(), f"{base}experts.{leaf}.weight.{expert}"
        mean, spread = own.mean(), own.std()
        drawn = torch.empty(own.shape).normal_(generator=generator(recipe.seed, values))
        own += recipe.noise * spread * drawn
        units = own.shape[1] if leaf == "down" else own.shape[0]
        order = torch.randperm(units, generator=generator(recipe.seed, f"{base}experts.{expert}"))
        gone = order[: round(recipe.drop * units)]
        fresh = mean + spread * drawn
        if leaf == "down":
            own[:, gone] = fresh[:, gone]
        else:
            own[gone] = fresh[gone]
        return own


def _open(path: Path) -> _Dense:
    step = step_folder.resolve_step(path)
    if fault := step_folder.find_fault(step):
        raise step_folder.damaged(step, fault)
    stored = step_folder.read_model(step)
    if "spec" not in stored or "model" not in stored:
        raise CheckpointError(f"{step}: describes no model. The checkpoint is of another version of unimega.")
    return _Dense(path, step, ModelSpec.from_dict(stored["spec"]), stored, StoredWeights(step))


def _check_dense(dense: _Dense) -> None:
    if dense.spec.lora is not None:
        raise CheckpointError(f"{dense.path}: has LoRA. Export it merged with tools/export_hf.py, and import that.")
    for index, layer in enumerate(dense.spec.layers):
        if layer.experts or layer.ffn or layer != LayerSpec(shared_ffn=layer.shared_ffn):
            what = "routed experts already" if layer.experts else "weights by modality"
            raise CheckpointError(f"{dense.path}: layers.{index} has {what}. Only a dense checkpoint becomes experts.")


def _check_same(source: _Dense, dense: _Dense) -> None:
    """Specialists differ in values alone."""
    theirs, ours = source.spec.to_dict(), dense.spec.to_dict()
    for key in ours:
        if not key.startswith("init_") and theirs[key] != ours[key]:
            found = "other layers" if key == "layers" else f"{key}={theirs[key]}, the first {ours[key]}"
            raise CheckpointError(f"--from {source.path}: its model has {found}. Specialists are of one model.")
    for key, shape in dense.weights.shapes.items():
        if source.weights.shapes.get(key) != shape or source.weights.dtypes[key] != dense.weights.dtypes[key]:
            raise CheckpointError(
                f"--from {source.path}: {key} is not as in {dense.path}. Specialists are of one model."
            )


def _model(dense: _Dense, recipe: Recipe) -> ModelConfig:
    """The ``[model]`` of a run that trains the new model."""
    known = strict.partial(ModelConfig, dense.stored["model"], prefix="model.", where=str(dense.step))
    model = strict.construct(ModelConfig, known, prefix="model.", where=str(dense.step))
    model = replace(model, **strict.partial(ModelConfig, recipe.keys, prefix="model.", where=_WHERE))
    model_rules.check(model)
    experts = expert_keys.expert_spec(model, dense.spec.modalities)
    width = dense.spec.layers[0].shared_ffn
    if experts.width != width:
        raise ConfigError(
            f"model.expert_width={experts.width}: experts are copies of FFNs of width {width}. Remove it."
        )
    if experts.shared_width:
        raise ConfigError(
            f"model.shared_expert_width={experts.shared_width}: nothing of the dense model would fill a shared expert. "
            "Remove it."
        )
    return model


def _changes(spec: ModelSpec, recipe: Recipe, sources: list[_Dense]) -> str:
    experts = next(layer.experts for layer in spec.layers if layer.experts)
    found = {
        "its experts are of several checkpoints": len(sources) > 1,
        "the weights of a token's experts do not sum to 1": not experts.normalize or experts.scale != 1.0,
        "experts have noise": recipe.noise > 0,
        "units of experts are drawn anew": recipe.drop > 0,
        "experts have a capacity": bool(experts.capacity),
    }
    return ", ".join(what for what, is_so in found.items() if is_so)


def _read(source: _Dense, key: str) -> torch.Tensor:
    return source.weights.read([key])[key]
