"""The modelling file of an export: the engine's logits, the original's decoding, caches, pads, guidance, training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import exports, oracle
from tests.exports import SPECS, STOCK, load, packed

pytestmark = pytest.mark.timeout(240)

LOGITS, GRADIENTS = 3e-5, 3e-5
"""Absolute, fp32: what the original and a second implementation of it meet (README of the oracles)."""
SPLIT_CASES = ("unix_x", "unix_mot")
"""One oracle whose cache needs modalities, one that does not."""


def assert_close(got: torch.Tensor, want: Any, tolerance: float, what: str) -> None:
    difference = (got.detach() - torch.as_tensor(want)).abs().max().item()
    assert got.shape == want.shape and difference <= tolerance, f"{what}: off by {difference:.2e}"


# --- every kind of model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_engine_logits(out: Path, engine_logits: Any, name: str) -> None:
    """Packed and document by document; a stock model without any code of ours."""
    model = load(out / name, needs_code=name not in STOCK)
    assert model.config.model_type == STOCK.get(name, "uni_x")
    inputs, want = packed(SPECS[name]), torch.from_numpy(engine_logits[name])
    ids, documents = torch.from_numpy(inputs.ids), torch.from_numpy(inputs.documents)
    with torch.no_grad():
        for number in documents[0].unique():
            rows = documents[0] == number
            assert_close(model(ids[:1, rows]).logits, want[:1, rows], LOGITS, f"document {number}")
        if name in STOCK:
            return
        for attention in ("sdpa", "eager", "flash_on_cpu"):
            model.config._attn_implementation = attention
            got = model(ids, attention_mask=documents).logits
            assert_close(got[documents > 0], want[documents > 0], LOGITS, attention)
            positions = torch.cat([torch.arange(length) for length in exports.DOCUMENTS])[None]
            assert_close(model(ids[:1], position_ids=positions).logits, want[:1], LOGITS, f"{attention}, positions")


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_on_cpu"])
@pytest.mark.parametrize("case", oracle.UNIX)
def test_decodes_as_the_original(out: Path, case: str, attention: str) -> None:
    """A prompt, then token by token and in pieces of several tokens."""
    model, expected = load(out / case, attention=attention), np.load(oracle.DATA / case / "decode.npz")
    ids, want = torch.from_numpy(expected["single_ids"]), expected["single_logits"]
    for cuts in ([6, *range(7, 25)], [6, 11, 12, 19, 24]):
        cache, logits, start = None, [], 0
        with torch.no_grad():
            for stop in cuts:
                step = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
                cache, start = step.past_key_values, stop
                logits.append(step.logits)
        assert_close(torch.cat(logits, 1), want, LOGITS, f"{cuts}")
        slots = [one.keys.shape for one in cache.layers[: model.config.num_hidden_layers]]
        assert {tuple(shape) for shape in slots} == {(1, 2, 24, 16)}  # one slot per token, split layers too


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [[94] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return {"ids": torch.tensor(ids), "mask": torch.tensor(mask)}


def guided(model: Any, prompts: list[list[int]], negative: list[list[int]], scale: float, **options: Any) -> Any:
    """The codes that guidance draws greedily, [B, 12]."""
    batch = left_padded(prompts)
    if scale > 1:
        other = left_padded(negative)
        options |= {"negative_prompt_ids": other["ids"], "negative_prompt_attention_mask": other["mask"]}
        options["guidance_scale"] = scale
    drawn = model.generate(
        batch["ids"],
        attention_mask=batch["mask"],
        modality="vision",
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=94,
        **options,
    )
    return drawn[:, batch["ids"].shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", oracle.UNIX)
def test_guided_ids_of_the_original(out: Path, case: str, use_cache: bool) -> None:
    """Alone, and as the second of three prompts of different lengths; the original MoT knows no guidance."""
    model, expected = load(out / case), np.load(oracle.DATA / case / "decode.npz")
    prompt, scale = expected["cfg_ids"][0].tolist(), float(expected["cfg_scale"])
    negative = [3, 5, 90]
    if case == "unix_mot":
        scale = 1.0
    else:
        assert expected["cfg_ids"][1][expected["cfg_mask"][1] == 1].tolist() == negative
    want = expected["cfg_generated"].tolist()
    assert guided(model, [prompt], [negative], scale, use_cache=use_cache)[0].tolist() == want
    if not use_cache and case not in SPLIT_CASES:
        return
    prompts, negatives = [[1, 90], prompt, [7, 100, 91, *range(20, 31), 90]], [[3, 5, 8, 90], negative, [90]]
    alone = [guided(model, prompts[i : i + 1], negatives[i : i + 1], scale)[0].tolist() for i in (0, 2)]
    for attention in ("sdpa", "flash_on_cpu") if use_cache else ("sdpa",):
        model.config._attn_implementation = attention
        three = guided(model, prompts, negatives, scale, use_cache=use_cache)
        assert three[1].tolist() == want, attention
        assert three[[0, 2]].tolist() == alone, attention


@pytest.mark.parametrize("case", SPLIT_CASES)
def test_caches_of_transformers(out: Path, case: str) -> None:
    """Beams reorder the cache, several sequences repeat it, a static one is allocated ahead, lookup crops it."""
    model = load(out / case)
    ids = torch.tensor([[1, 8, 90, 142, 119, 91, 85, 60, 90, 130, 113, 91, 85]])
    plain = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 94, "eos_token_id": None}
    want = model.generate(ids, **plain)
    assert model.generate(ids, use_cache=False, **plain).tolist() == want.tolist()
    assert model.generate(ids, cache_implementation="static", **plain).tolist() == want.tolist()
    assert model.generate(ids, prompt_lookup_num_tokens=3, **plain).tolist() == want.tolist()
    beams = plain | {"num_beams": 3, "num_return_sequences": 2}
    assert model.generate(ids, **beams).tolist() == model.generate(ids, use_cache=False, **beams).tolist()


def test_pads_on_the_right_and_embeddings(out: Path) -> None:
    model = load(out / "unix_x")
    ids = torch.tensor([[1, 90, 100, 101, 91, 7], [3, 90, 120, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        assert_close(both[1, :3], model(ids[1:, :3]).logits[0], LOGITS, "padded row")
        embedded = model(
            inputs_embeds=model.get_input_embeddings()(ids), vision_mask=model.model.is_vision(ids), attention_mask=mask
        )
    assert torch.equal(embedded.logits, both)
    prompt = {"inputs_embeds": model.get_input_embeddings()(ids), "vision_mask": model.model.is_vision(ids)}
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 94, "attention_mask": torch.ones_like(ids)}
    assert model.generate(**prompt, **greedy).tolist() == model.generate(ids, **greedy)[:, 6:].tolist()
    with pytest.raises(ValueError, match="inputs_embeds needs vision_mask"):
        model(inputs_embeds=torch.zeros(1, 2, 64))


def test_states_and_attention_can_be_looked_at(out: Path) -> None:
    """Asked for in the call or in the configuration; where there are no weights, that is said."""
    model = load(out / "unix_x")
    ids = torch.tensor([[1, 90, 100, 101, 91, 7, 90, 130]])
    is_vision = model.model.is_vision(ids)[0]
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = True
    with torch.no_grad():
        seen = model(ids, output_attentions=True)
    assert torch.equal(model.lm_head(seen.hidden_states[-1]), seen.logits)
    config = model.config
    assert len(seen.attentions) == config.num_hidden_layers == len(seen.hidden_states) - 1
    own = is_vision[:, None] == is_vision
    ends = config.num_hidden_layers - config.num_vision_decode_layers
    for i, weights in enumerate(seen.attentions):
        assert weights.shape == (1, config.num_attention_heads, 8, 8)
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-6, f"layer {i}")
        split = i < config.num_vision_encode_layers or i >= ends
        assert torch.equal((weights > 0).all((0, 1)), torch.ones(8, 8).tril().bool() & (own | (not split)))
    drawn = model.generate(
        ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2, min_new_tokens=2
    )
    assert [one[0].shape[2:] for one in drawn.attentions] == [(8, 8), (1, 9)]


@pytest.mark.parametrize("modality", [None, "text", "vision"])
def test_only_ids_that_may_be_drawn(out: Path, modality: str | None) -> None:
    """At a temperature that makes all rows likely; 8 rows of 168 are never drawn."""
    model = load(out / "unix_x")
    torch.manual_seed(0)
    drawn = model.generate(
        torch.tensor([[1, 90]] * 40),
        modality=modality,
        do_sample=True,
        temperature=1e4,
        max_new_tokens=20,
        pad_token_id=94,
        eos_token_id=None,
        top_k=0,
    )[:, 2:]
    first, end = {None: (0, 160), "text": (0, 96), "vision": (96, 160)}[modality]
    assert (90 in drawn) == (modality is None)  # the start of an image is vision
    assert drawn.min() >= first and drawn.max() < end and len(drawn.unique()) > 0.95 * (end - first)
    with pytest.raises(ValueError, match="modality='audio' is unknown"):
        model.generate(torch.tensor([[1]]), modality="audio")


# --- training ------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, case: str) -> tuple[float, dict[str, torch.Tensor]]:
    inputs = np.load(oracle.DATA / case / "inputs.npz")
    ids, documents, labels = (torch.from_numpy(inputs[name]) for name in ("input_ids", "segment_ids", "labels"))
    model.zero_grad()
    loss = model(ids, attention_mask=documents, labels=labels).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("case", [case for case in oracle.UNIX if (oracle.DATA / case / "grads_intended.npz").exists()])
def test_gradients_of_the_original(out: Path, case: str) -> None:
    """With and without checkpointing, re-entrant or not; only what the original never uses has none."""
    model, expected = load(out / case).train(), np.load(oracle.DATA / case / "grads_intended.npz")
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        loss, gradients = loss_and_gradients(model, case)
        assert abs(loss - np.load(oracle.DATA / case / "expected_intended.npz")["loss"]) < 1e-5
        assert set(gradients) == set(expected.files)
        for name, got in gradients.items():
            assert_close(got, expected[name], GRADIENTS, f"{options}: {name}")


def test_a_batch_of_one_modality_has_all_gradients(out: Path) -> None:
    model = load(out / "unix_x").train()
    model(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
    assert all(one.grad is not None for one in model.parameters())
    assert not any(one.grad.any() for name, one in model.named_parameters() if "vision_" in name)


def test_saved_again(out: Path, tmp_path: Path) -> None:
    """save_pretrained gives a folder of the same kind, with the code in it."""
    model = load(out / "unix_x")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert (tmp_path / "again" / "modeling_unix.py").read_text() == (out / "unix_x" / "modeling_unix.py").read_text()
