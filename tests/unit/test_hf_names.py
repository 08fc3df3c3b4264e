"""Names, shapes and files of Hugging Face folders: what is read, and the line for each thing that can be wrong."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import oracle
from unimega.config.layer import LayerSpec, dense, mot
from unimega.config.model import ModelSpec
from unimega.config.vocabulary import Vocabulary
from unimega.errors import CheckpointError, ConfigError, DataError, UnimegaError
from unimega.hf.folder import read_config
from unimega.hf.inputs import IGNORED, check_ids, microbatches, read_inputs
from unimega.hf.layout import Layout
from unimega.hf.names import table
from unimega.hf.read import describe
from unimega.hf.weights import Weights

CASES = (*oracle.UNIX, *oracle.DENSE)


def source_of(case: str, folder: Path = Path("folder"), *, ids: Any = None, **changes: Any) -> Any:
    return describe(oracle.config_of(case) | changes, folder=folder, separator_ids=ids)


def table_of(case: str) -> Any:
    source = source_of(case)
    return table(source.spec, source.layout)


def to_engine(names: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names.check_folder(tensors, shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {row.key: row.join([tensors[name] for name in row.names]) for row in names.rows}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bitwise(case: str) -> None:
    tensors = oracle.tensors_of(case)
    back = table_of(case).to_hf(to_engine(table_of(case), tensors))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) and back[name].is_contiguous() for name in tensors)


def test_qkv_rows_are_grouped_per_kv_head() -> None:
    """4 query and 2 KV heads: [q0, q1, k0, v0, q2, q3, k1, v1]."""
    tensors = oracle.tensors_of("hf_qwen2")
    q, k, v = (tensors[f"model.layers.1.self_attn.{leaf}_proj.bias"].view(-1, 16) for leaf in "qkv")
    joined = to_engine(table_of("hf_qwen2"), tensors)["layers.1.attention.qkv.bias"].view(-1, 16)
    assert torch.equal(joined, torch.stack([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]))


def test_keys_of_the_engine() -> None:
    """One name of each kind, spelled as the engine spells its parameters."""
    assert to_engine(table_of("unix_x"), oracle.tensors_of("unix_x")).keys() >= {
        "embedding.weight", "head.weight", "final_norm.weight", "layers.0.attention.qkv.weight_vision",
        "layers.5.attention.q_layernorm.weight_text", "layers.1.ffn_norm.weight_vision", "layers.2.ffn.gate.weight",
    }  # fmt: skip
    by_name = {row.names[0]: row.key for row in table_of("unix_x_share").rows}
    assert by_name["model.vision_decode_layers.0.mlp.up_proj.weight"] == "layers.5.ffn.up.weight_vision"
    assert by_name["model.layers.3.mlp.share_down_proj.weight"] == "layers.3.ffn.shared.down.weight"
    assert by_name["model.layers.3.mlp.vision_gate_proj.weight"] == "layers.3.ffn.gate.weight_vision"
    assert by_name["model.layers.3.mlp.gate_proj.weight"] == "layers.3.ffn.gate.weight_text"
    unused = [row.key for row in table_of("unix_mot").rows if not row.used]
    assert unused == [f"layers.{i}.attention.output.weight_vision" for i in range(6)]


def test_gradients_leave_out_what_the_original_never_uses() -> None:
    names = table_of("unix_mot")
    used = {row.key: torch.zeros(sum(s[0] for s in row.shapes), *row.shapes[0][1:]) for row in names.rows if row.used}
    assert not [name for name in names.to_hf(used, gradients=True) if "vis_o_proj" in name]
    with pytest.raises(CheckpointError, match=r"output\.weight_vision' \(and 5 more\) is missing"):
        names.to_hf(used)


def test_width_zero_has_no_tensors() -> None:
    source = source_of("unix_x_share", ffn_vision_size=0)
    assert source.spec.layers[2] == LayerSpec(ffn=(96, 0), shared_ffn=48)
    assert not [row for row in table(source.spec, source.layout).rows if "vision_gate" in row.names[0]]
    source = source_of("unix_x_share", ffn_share_size=0)
    assert source.spec.layers[2] == LayerSpec(ffn=(96, 40))
    assert not [row for row in table(source.spec, source.layout).rows if "share_" in row.names[0]]


def test_tied_head() -> None:
    tensors, names = oracle.tensors_of("unix_x_tied"), table_of("unix_x_tied")
    copy = tensors["model.embed_tokens.weight"].clone()
    with_head = tensors | {"lm_head.weight": copy}
    assert names.dropped(with_head) == ("lm_head.weight",)
    assert set(to_engine(names, with_head)) == set(to_engine(names, tensors))
    copy[3, 4] += 1
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from .* tie_word_embeddings=true"):
        to_engine(names, with_head)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model.layers.2.mlp.up_proj.weight": None}, "tensor 'model.layers.2.mlp.up_proj.weight' is missing"),
        (
            {"model.layers.2.mlp.vis_up_proj.weight": (96, 64)},
            "'model.layers.2.mlp.vis_up_proj.weight' would not be used",
        ),
        ({"model.norm.weight": (65,)}, r"'model.norm.weight' has shape \[65\], but config.json makes it \[64\]"),
    ],
)
def test_folder_at_odds_with_its_config(change: dict[str, Any], line: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle.tensors_of("unix_x").items()} | change
    with pytest.raises(CheckpointError, match=line):
        table_of("unix_x").check({name: shape for name, shape in shapes.items() if shape})


VOCABULARY = Vocabulary(names=("text", "vision"), starts=(0, 8), codes=(8, 8), rows=16, ids=((), ()))
ODD = LayerSpec(attention="split", output_projection="split", ffn=(8, 8), norms="split")


@pytest.mark.parametrize(
    ("layers", "layout", "line"),
    [
        ((LayerSpec(ffn=(8, 8)),), Layout(family="qwen"), "layers.0 has no names in layout 'qwen': it is split in ffn"),
        ((LayerSpec(attention="split", ffn=(8, 8)),), Layout(family="moe"), "layers.0 has no names in .*: .*attention"),
        ((LayerSpec(ffn=(8, 8), shared_ffn=4),), Layout(family="mot"), "layers.0 .* split in ffn beside a shared FFN"),
        ((*dense(1, ffn=8), ODD, *dense(1, ffn=8)), Layout(family="x"), r"layers \[1\] of 3 are split as a whole"),
    ],
)  # fmt: skip
def test_layout_that_cannot_name_a_layer(layers: Any, layout: Layout, line: str) -> None:
    with pytest.raises(CheckpointError, match=line):
        table(small(layers), layout)


def small(layers: tuple[LayerSpec, ...]) -> ModelSpec:
    sizes: dict[str, Any] = dict(width=8, heads=2, kv_heads=1, head_width=4, norm_eps=1e-6, rope_theta=1e4)
    return ModelSpec(
        vocabulary=VOCABULARY, layers=layers, qk_norm=True, qkv_bias=False, output_bias=False, tied=False, **sizes
    )


def test_split_output_projection_of_a_mot_is_used() -> None:
    rows = table(small(mot(1, ffn=(8, 8), output_projection="split")), Layout(family="mot")).rows
    assert [row.used for row in rows if "vis_o_proj" in row.names[0]] == [True]


# --- config.json ---------------------------------------------------------------------------------------------------


def test_config_of_the_original() -> None:
    source = source_of("unix_x", skip_connection_loc=0, add_sep_for_vis=1, ids=[92, 89, 130])
    assert source.spec.vocabulary.ids == ((), (89, 90, 92))  # 130 is a code: vision by itself
    assert source.spec.skip == (0, 5)
    assert (source.spec.vocabulary.starts, source.spec.vocabulary.codes) == ((0, 96), (96, 64))
    assert source.spec.vocabulary.rows == 168
    assert source.model.preset == "unix" and source.layout == Layout(family="x", encode=2)
    assert source_of("unix_moe").layout == Layout(family="moe")
    assert source_of("unix_moe", num_vision_encode_layers=9).spec == source_of("unix_moe").spec
    assert source_of("hf_qwen2").spec.modalities == ("text",)
    assert (
        source_of("unix_x", skip_connection_loc=1).spec.skip is None
    )  # added before decode layer 1, which is not there
    assert source_of("unix_x", architectures=["UniQwen3ForCausalLMInference"]).spec == source_of("unix_x").spec


def test_rope_of_transformers_5() -> None:
    config = oracle.config_of("hf_qwen3") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config.pop("rope_theta")
    assert describe(config, folder=Path("f")).spec.rope_theta == 5e5


@pytest.mark.parametrize(
    ("case", "changes", "error", "line"),
    [
        ("hf_qwen3", {"architectures": ["GPT2LMHeadModel"]}, CheckpointError, "GPT2LMHeadModel.* not known"),
        ("hf_qwen3", {"architectures": None}, CheckpointError, "architectures=None is not known"),
        ("hf_qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ConfigError, "rope scaling 'yarn'"),
        ("hf_qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, ConfigError, "slid"),
        ("hf_qwen3", {"head_dim": None}, ConfigError, "head_dim"),
        ("hf_qwen3", {"hidden_act": "gelu"}, ConfigError, "hidden_act='gelu'"),
        ("hf_qwen3", {"num_key_value_heads": 3}, ConfigError, "json: num_attention_heads=4 is not .* by num_key"),
        ("hf_qwen3", {"head_dim": 5}, ConfigError, "^folder/config.json: head_dim=5 is odd"),
        ("hf_qwen3_moe", {"num_experts_per_tok": 9}, ConfigError, "json: num_experts_per_tok=9 .* num_experts="),
        ("unix_x", {"vocab_size": 150}, CheckpointError, "need 160 rows, vocab_size=150 has fewer"),
        ("unix_x", {"real_text_vocab_size": None}, CheckpointError, "real_text_vocab_size=None is not an int"),
        ("unix_x", {"num_vision_encode_layers": 6}, CheckpointError, "are more than num_hidden_layers=6"),
        ("unix_x", {"skip_connection_loc": 2, "num_vision_decode_layers": 3}, CheckpointError, "_loc=2 is not below"),
        ("unix_x", {"skip_connection_loc": "0"}, CheckpointError, "skip_connection_loc='0' is not an int"),
        ("unix_x", {"all_modal_visible": 1}, CheckpointError, "all_modal_visible=1"),
        ("unix_x", {"add_sep_for_vis": 1}, CheckpointError, "'<.vision_pad.>' count as vision.*--separator-ids"),
        ("unix_x", {"add_sep_for_vis": 1, "vis_sep_tokens": None}, CheckpointError, "vis_sep_tokens=None"),
        ("unix_x_share", {"ffn_vision_size": 0, "ffn_share_size": 0}, CheckpointError, "leaves vision no FFN"),
        ("unix_mot", {"ffn_vision_size": 0}, CheckpointError, "ffn_vision_size=0 leaves the vision tokens"),
    ],
)  # fmt: skip
def test_config_that_is_refused(case: str, changes: dict[str, Any], error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line) as caught:
        source_of(case, **changes)
    assert "model." not in str(caught.value)


def test_separator_ids_that_are_refused() -> None:
    with pytest.raises(CheckpointError, match="168 is not an id: the vocabulary has 168 rows"):
        source_of("unix_x", ids=[168])
    with pytest.raises(CheckpointError, match="has no vision tokens"):
        source_of("hf_qwen3", ids=[1])


def test_separators_from_the_tokenizer_of_the_folder(tmp_path: Path) -> None:
    """The first id of each comma-separated string, as the original takes it."""
    pieces = {f"t{i}": i for i in range(88)} | {"<|vision_pad|>": 88, "<row>": 93}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|vision_pad|>", "<row>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    oracle.write_folder(tmp_path / "f", oracle.config_of("unix_x"), {"a": torch.zeros(1)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / name, tmp_path / "f")
    source = source_of("unix_x", tmp_path / "f", add_sep_for_vis=1, vis_sep_tokens="<|vision_pad|>,<row>")
    assert source.spec.vocabulary.ids == ((), (88, 90, 93))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """hf_qwen3 in two shards."""
    folder = oracle.write_folder(tmp_path / "sharded", oracle.config_of("hf_qwen3"), {})
    (folder / "model.safetensors").unlink()
    tensors = oracle.tensors_of("hf_qwen3")
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_are_one_folder(sharded: Path) -> None:
    weights, tensors = Weights(sharded), oracle.tensors_of("hf_qwen3")
    assert set(weights) == set(tensors) and len(weights) == len(tensors)
    assert all(
        torch.equal(weights[name], tensors[name]) and weights.shapes[name] == tensors[name].shape for name in tensors
    )


def test_shard_errors(sharded: Path) -> None:
    second, index = sharded / "model-00002-of-00002.safetensors", sharded / "model.safetensors.index.json"
    whole, text = second.read_bytes(), index.read_text()
    second.write_bytes(whole[:-100])
    expect(sharded, "model-00002-of-00002.safetensors' cannot be read: .*truncated")
    second.unlink()
    expect(sharded, "shard 'model-00002-of-00002.safetensors' is named in model.safetensors.index.json and missing")
    second.write_bytes(whole)
    values = json.loads(text)
    values["weight_map"]["model.extra"] = second.name
    index.write_text(json.dumps(values))
    expect(sharded, "puts tensor 'model.extra' into model-00002-of-00002.safetensors, which does not have it")
    save_file(load_file(second) | {"lm_head.weight": torch.zeros(1)}, second)
    index.write_text(text)
    expect(sharded, "'lm_head.weight' is in both model-00001-of-00002.safetensors and model-00002")
    index.write_text("{")
    expect(sharded, "cannot be read as JSON")
    index.write_text("{}")
    expect(sharded, "has no weight_map")
    index.unlink()
    expect(sharded, "neither model.safetensors nor model.safetensors.index.json")


def expect(folder: Path, line: str) -> None:
    with pytest.raises(CheckpointError, match=line) as error:
        Weights(folder)
    assert "\n" not in str(error.value)


def test_dtypes(tmp_path: Path) -> None:
    folder = oracle.write_folder(tmp_path / "f", {}, {"a": torch.ones(2, dtype=torch.bfloat16)})
    assert Weights(folder)["a"].dtype == torch.bfloat16
    save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    expect(folder, "tensor 'a' in model.safetensors has dtype 'I8'")


def test_config_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        read_config(tmp_path)


# --- inputs of logits.py -------------------------------------------------------------------------------------------


def test_inputs(tmp_path: Path) -> None:
    ids = np.array([[1, 2, 12, 9], [3, -1, -1, -1]])
    np.savez(
        tmp_path / "in.npz",
        input_ids=ids,
        segment_ids=[[1, 1, 2, 2], [1, 0, 0, 0]],
        labels=[[5, 6, IGNORED, 7], [0, 1, 2, 3]],
    )
    inputs = read_inputs(tmp_path / "in.npz")
    assert inputs.targets is not None
    assert inputs.targets.tolist() == [[6, IGNORED, 7, IGNORED], [1, IGNORED, IGNORED, IGNORED]]
    assert inputs.ids.tolist() == [[1, 2, 12, 9], [3, 0, 0, 0]] and inputs.scored == 3
    model = small(dense(1, ffn=8))
    layout = dict(tp_rank=0, tp=3, sequence_parallel=True, dp_rank=1, dp=2, multiple=2)
    made = microbatches(inputs, model, **layout)
    assert [batch.order.counts for batch in made] == [(6, 0), (6, 0)]  # row 1, then a row of pads; 4 tokens become 6
    assert [batch.loss_rows.tolist() for batch in made] == [[0], []]
    first = microbatches(inputs, model, **layout | {"dp_rank": 0})[0]
    assert first.order.counts == (4, 2) and first.order.pads == 2
    np.testing.assert_allclose(first.loss_weights[first.loss_rows], 1 / 3)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"labels": [[1]]}, "'input_ids' is missing, found 'labels'"),
        ({"input_ids": [1, 2]}, r"'input_ids' has shape \[2\]. It must be \[B, T\]"),
        ({"input_ids": [[1.5]]}, "'input_ids' has dtype float64"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, r"'labels' has shape \[1, 1\], 'input_ids' \[1, 2\]"),
        ({"input_ids": [[1, 2]], "segment_ids": [[1, -1]]}, "'segment_ids' holds -1"),
        ({"input_ids": [[1, 16]]}, r"input_ids\[0, 1\]=16 is not an id: the model has 16 rows"),
        ({"input_ids": [[1, 2]], "labels": [[0, -5]]}, r"labels\[0, 1\]=-5 is not an id"),
    ],
)
def test_inputs_that_are_refused(tmp_path: Path, arrays: dict[str, Any], line: str) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(DataError, match=line):
        check_ids(read_inputs(tmp_path / "in.npz"), rows=16, where=tmp_path / "in.npz")


def test_inputs_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "in.npz").write_text("hello")
    for name in ("in.npz", "nothing.npz"):
        with pytest.raises(UnimegaError, match="cannot be read as an npz"):
            read_inputs(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_takes_one_line(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "in.npz"
    save(path, input_ids=np.arange(12).reshape(2, 6), labels=np.arange(12).reshape(2, 6))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(0, len(whole), 9)]
    for place in rng.integers(len(whole), size=400).tolist():
        mask = int(rng.integers(1, 256))
        damaged.append(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_inputs(path)  # the zip has bytes that mean nothing
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > len(damaged) // 2


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_member_that_is_no_array(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "in.npz", **({} if name == "input_ids" else {"input_ids": [[1, 2]]}))
    with zipfile.ZipFile(tmp_path / "in.npz", "a") as file:
        file.writestr(name, "hello")
    with pytest.raises(DataError, match=rf"{name!r} has (shape|dtype)"):
        read_inputs(tmp_path / "in.npz")
