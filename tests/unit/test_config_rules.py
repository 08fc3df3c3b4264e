"""What keys of a run cannot have together: the exact line of every rule."""

import pytest

from tests.unit.config_cases import MOE_HARD, MOT, SHARE, base, enter_empty_folder, line_of


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    enter_empty_folder(tmp_path, monkeypatch)


RULES = [
    ({"preset": "unx"}, {}, "model.preset='unx' is unknown. Presets: dense, unix, share, moe_hard, mot, moe, unimoe."),
    (
        {"shared_ffn_width": 8},
        {},
        "model.shared_ffn_width=8 is not a key of preset 'unix', only of share. Remove it.",
    ),
    ({"split_every": 2}, {}, "model.split_every=2 is not a key of preset 'unix', only of moe_hard. Remove it."),
    (
        {"output_projection": "split"},
        {},
        "model.output_projection='split' is not a key of preset 'unix', only of mot. Remove it.",
    ),
    (
        {"vision_ffn_width": 8},
        {},
        "model.vision_ffn_width=8 is not a key of preset 'unix', only of share and mot. Remove it.",
    ),
    (
        {"preset": "dense"},
        {},
        "model.encode_layers=2 is not a key of preset 'dense', only of unix and share. Remove it.",
    ),
    (
        {**MOT, "skip_from": 0},
        {},
        "model.skip_from=0 is not a key of preset 'mot', only of unix and share. Remove it.",
    ),
    (
        {**MOT, "unused_output": True},
        {},
        'model.unused_output=true is only for preset mot with output_projection = "shared". Remove it.',
    ),
    (
        {"encode_layers": None},
        {},
        "model.encode_layers is missing. Preset 'unix' needs it: set it in [model].",
    ),
    ({"preset": "share"}, {}, "model.shared_ffn_width is missing. Preset 'share' needs it: set it in [model]."),
    (
        {**MOE_HARD, "split_every": None},
        {},
        "model.split_every is missing. Preset 'moe_hard' needs it: set it in [model].",
    ),
    ({"num_layers": 0}, {}, "model.num_layers=0 is too small. It is at least 1."),
    ({"codebook": -1}, {}, "model.codebook=-1 is too small. It is at least 0."),
    ({"norm_eps": 0}, {}, "model.norm_eps=0.0 is too small. It is above 0."),
    ({"init": {"head": -1}}, {}, "model.init.head=-1.0 is negative. A standard deviation is at least 0."),
    (
        {"kv_heads": 3},
        {},
        "model.heads=4 is not divisible by model.kv_heads=3. Each KV head serves equally many query heads.",
    ),
    ({"head_width": 15}, {}, "model.head_width=15 is odd. Rotary embeddings turn pairs: use an even width."),
    (
        {"encode_layers": 5, "decode_layers": 4},
        {},
        "model.encode_layers=5 + model.decode_layers=4 is more than model.num_layers=8. Lower one of them.",
    ),
    (
        {**MOE_HARD, "split_every": 9},
        {},
        "model.split_every=9 is more than model.num_layers=8: no layer would be split. Lower it, or use preset dense.",
    ),
    (
        {**MOT, "vision_ffn_width": 0},
        {},
        "model.vision_ffn_width=0 leaves vision tokens without an FFN. Set it above 0, or use preset share with a "
        "shared_ffn_width above 0.",
    ),
    (
        {"skip_from": 1},
        {},
        "model.skip_from=1 has no encode and decode layer of that number: encode_layers=2, decode_layers=1. "
        "Use -1 (none) to 0.",
    ),
    (
        {"vocabulary_rows": 100},
        {},
        "model.vocabulary_rows=100 is less than vision_offset + codebook = 96 + 64 = 160. Raise it or leave it out.",
    ),
    (
        {"vision_ids": [90, 96]},
        {},
        "model.vision_ids: 96 is not a text id. Ids from vision_offset=96 up are vision anyway: list only lower ones.",
    ),
    (
        {"codebook": 0, "vision_ids": [90]},
        {},
        "model.vision_ids=[90] in a model of text alone (codebook = 0). Remove them.",
    ),
    (
        {**MOT, "vision_ffn_width": 40, "init_vision": "text"},
        {},
        "model.init_vision='text' copies text weights, but vision_ffn_width=40 is not ffn_width=96. Make them equal or "
        "use 'random'.",
    ),
    ({}, {"parallel": {"tp": 0}}, "parallel.tp=0: a parallel size is at least 1."),
    ({}, {"parallel": {"cp": 2}}, "parallel.cp=2: context parallelism is not built yet. Set parallel.cp = 1."),
    ({}, {"parallel": {"ep": 2}}, "parallel.ep=2: the model has no routed experts to cut. Set parallel.ep = 1."),
    (
        {},
        {"training": {"recompute": "moe"}},
        "training.recompute='moe': the model has no routed experts to run again. Use none, selective or full.",
    ),
    (
        {},
        {"parallel": {"tp": 2, "etp": 2}},
        "parallel.etp=2: the model has no routed experts to cut. Set parallel.etp = 1.",
    ),
    (
        {},
        {"parallel": {"sequence_parallel": True}},
        "parallel.sequence_parallel=true needs parallel.tp > 1: it shares tokens inside a tp group. Set it to false or "
        "raise parallel.tp.",
    ),
    ({}, {"parallel": {"vpp": 2}}, "parallel.vpp=2 needs parallel.pp > 1. Set parallel.vpp = 1 or raise parallel.pp."),
    (
        {},
        {"parallel": {"tp": 3}},
        "parallel.tp=3 * pp=1 * cp=1 = 3 does not divide the 8 rank(s) of this run. Start a multiple "
        "of 3 with torchrun "
        "--nproc-per-node, or change the sizes.",
    ),
    (
        {},
        {"parallel": {"tp": 4}},
        "parallel.tp=4 is more than model.kv_heads=2: sharing a KV head between ranks is not built yet. Use a tp of at "
        "most 2.",
    ),
    (
        {"heads": 6, "kv_heads": 6},
        {"parallel": {"tp": 4}},
        "model.heads=6 is not divisible by parallel.tp=4. Pick a tp that divides heads and kv_heads.",
    ),
    (
        {"heads": 12, "kv_heads": 6},
        {"parallel": {"tp": 4}},
        "model.kv_heads=6 is not divisible by parallel.tp=4. Pick a tp that divides heads and kv_heads.",
    ),
    (
        {**SHARE, "shared_ffn_width": 47},
        {"parallel": {"tp": 2}},
        "FFN width 47 of layer 2 is not divisible by parallel.tp=2. Pick a tp that divides "
        "model.ffn_width and the other "
        "FFN widths.",
    ),
    (
        {"skip_from": 0},
        {"parallel": {"pp": 2}},
        "model.skip_from=0 with parallel.pp=2: the skip connection does not cross pipeline stages. Set parallel.pp = 1 "
        "or model.skip_from = -1.",
    ),
    (
        {"num_layers": 3},
        {"parallel": {"pp": 2, "vpp": 2}},
        "parallel.layout='auto': model.num_layers=3 is less than the 4 virtual stages of "
        "parallel.pp=2 * parallel.vpp=2. "
        "Use fewer stages, or list the layers (0 is allowed).",
    ),
    (
        {},
        {"parallel": {"pp": 2, "layout": [4, 2, 2]}},
        "parallel.layout=[4, 2, 2] has 3 entries, but there are 2 virtual stages (parallel.pp=2 * parallel.vpp=1). "
        "Give one number per virtual stage.",
    ),
    (
        {},
        {"parallel": {"pp": 2, "layout": [4, 5]}},
        "parallel.layout=[4, 5] holds 9 layers, but model.num_layers=8. The entries are at least 0 "
        "and sum to num_layers.",
    ),
    (
        {},
        {"parallel": {"pp": 2, "layout": [-1, 9]}},
        "parallel.layout=[-1, 9] holds 8 layers, but model.num_layers=8. The entries are at least 0 "
        "and sum to num_layers.",
    ),
    (
        {},
        {"training": {"global_batch_packs": 12}},
        "training.global_batch_packs=12 is not divisible by training.micro_batch_packs=1 * dp=8. Pick a multiple of 8.",
    ),
    (
        {},
        {"parallel": {"pp": 2, "vpp": 2}, "training": {"global_batch_packs": 12}},
        "parallel.vpp=2: 3 micro-batches per step are not divisible by parallel.pp=2, as the "
        "interleaved schedule needs. "
        "Pick a training.global_batch_packs that is a multiple of 8.",
    ),
    (
        {},
        {"parallel": {"tp": 2, "sequence_parallel": True}, "data": {"pack_length": 95}},
        "data.pack_length=95 * training.micro_batch_packs=1 = 95 tokens are not divisible by parallel.tp=2, as "
        "sequence_parallel needs. Change the pack length.",
    ),
    ({}, {"training": {"steps": 0}}, "training.steps=0 is too small. It is at least 1."),
    ({}, {"training": {"micro_batch_packs": 0}}, "training.micro_batch_packs=0 is too small. It is at least 1."),
    (
        {},
        {"training": {"trainable": []}},
        'training.trainable=[] trains nothing. Give patterns of parameter names; ["*"] is all of them.',
    ),
    (
        {},
        {"training": {"trainable": ["*.norm*", "*lora*"]}},
        "training.trainable='*.norm*' matches no parameter, e.g. 'embedding.weight' or "
        "'layers.7.ffn_norm.weight_vision'.",
    ),
    (
        {},
        {"optimizer": {"rates": [{"match": "*_vision", "factor": 2}, {"match": "layers.8.*", "factor": 2}]}},
        "optimizer.rates[1].match='layers.8.*' matches no parameter, e.g. 'embedding.weight' or "
        "'layers.7.ffn_norm.weight_vision'.",
    ),
    ({}, {"checkpoint": {"every_minutes": -1}}, "checkpoint.every_minutes=-1.0 is too small. It is at least 0."),
    ({}, {"training": {"max_skipped_steps": -1}}, "training.max_skipped_steps=-1 is too small. It is at least 0."),
    ({}, {"parallel": {"timeout_minutes": 0}}, "parallel.timeout_minutes=0.0 is too small. It is above 0."),
    (
        {},
        {"logging": {"profile": [3, 2]}},
        "logging.profile=[3, 2] is out of range. Give the first and the last step to trace, counted from 1.",
    ),
    (
        {},
        {"logging": {"profile": [21, 30]}},
        "logging.profile=[21, 30] begins after training.steps=20: nothing would be traced. Give earlier steps.",
    ),
    (
        {},
        {"optimizer": {"decay_share": 0}},
        "optimizer.decay_share=0.0 is out of range. It is above 0, at most 1.",
    ),
    ({}, {"optimizer": {"lr": 0}}, "optimizer.lr=0.0 is too small. It is above 0."),
    ({}, {"optimizer": {"betas": [0.9, 1]}}, "optimizer.betas[1]=1.0 is out of range. It is at least 0 and below 1."),
    (
        {},
        {"optimizer": {"rates": [{"match": "*", "factor": -1}]}},
        "optimizer.rates[0].factor=-1.0 is negative. Use 0 or more.",
    ),
    (
        {},
        {"optimizer": {"lr": 1e-6}},
        "optimizer.min_lr=1e-05 is above optimizer.lr=1e-06. Lower min_lr, e.g. to a tenth of lr.",
    ),
    (
        {},
        {"optimizer": {"warmup_steps": 30}},
        "optimizer.warmup_steps=30 is more than training.steps=20. Shorten the warm-up.",
    ),
    (
        {},
        {"data": {"train": []}},
        'data.train=[] names no corpus. Give at least one table such as { path = "corpus/a" }.',
    ),
    ({}, {"data": {"train": [{"path": "a", "weight": 0}]}}, "data.train[0].weight=0.0 is too small. It is above 0."),
    ({}, {"data": {"train": [{"path": "a", "epochs": 0}]}}, "data.train[0].epochs=0.0 is too small. It is above 0."),
    (
        {},
        {"data": {"train": [{"path": "a", "epochs": 2}, {"path": "b"}]}},
        "data.train[1] has no epochs, another source has. Give epochs to all or to none.",
    ),
    (
        {},
        {"data": {"train": [{"path": "a", "epochs": 2, "weight": 3}]}},
        "data.train[0] has weight=3.0 and epochs=2.0. Remove one of the two.",
    ),
    ({}, {"data": {"row_separator": -1}}, "data.row_separator=-1 is too small. It is at least 0."),
    (
        {},
        {"data": {"evaluation": ["x/held_out", "b", "y/held_out"]}},
        "data.evaluation: 'x/held_out' and 'y/held_out' are both named 'held_out'. "
        "The name stands in the metrics; rename one.",
    ),
    (
        {"init_vision": "text"},
        {"checkpoint": {"initial": "old"}},
        "model.init_vision='text' has no effect with checkpoint.initial='old': all weights come from there. "
        "Remove one of the two.",
    ),
    (
        {},
        {"checkpoint": {"directory": ""}},
        "checkpoint.directory='' names no folder. Give one of the run's own, e.g. runs/a/checkpoint.",
    ),
    (
        {},
        {"logging": {"directory": ""}},
        "logging.directory='' names no folder. Give one of the run's own, e.g. runs/a/logging.",
    ),
    ({}, {"data": {"t2i_ratio": 1.5}}, "data.t2i_ratio=1.5 is out of range. It is a share between 0 and 1."),
    (
        {},
        {"data": {"unconditional_ratio": -0.1}},
        "data.unconditional_ratio=-0.1 is out of range. It is a share between 0 and 1.",
    ),
    (
        {},
        {"data": {"window_tokens": 64}},
        "data.window_tokens=64 is less than data.pack_length=96. A window holds many packs.",
    ),
    (
        {},
        {"data": {"window_tokens": 1 << 31}},
        "data.window_tokens=2147483648 is too large. It is at most 1073741824.",
    ),
    ({}, {"data": {"pack_length": 1}}, "data.pack_length=1 is too small. It is at least 2."),
    (
        {},
        {"training": {"loss_weights": {"audio": 1}}},
        "training.loss_weights.audio: the model has no such modality. Modalities: text, vision.",
    ),
    (
        {"codebook": 0},
        {"training": {"loss_weights": {"vision": 1}}},
        "training.loss_weights.vision: the model has no such modality. Modalities: text.",
    ),
    ({}, {"training": {"loss_weights": {"text": -1}}}, "training.loss_weights.text=-1.0 is negative. Use 0 or more."),
    (
        {},
        {"training": {"loss_weights": {"text": 0, "vision": 0}}},
        "training.loss_weights are all 0: nothing is learned. Give one modality a weight above 0.",
    ),
]


@pytest.mark.parametrize(("model", "sections", "line"), RULES)
def test_what_cannot_be_together(model, sections, line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert line_of(base(**{"model": model, **sections})) == line
