"""What `tools/preprocess_data.py` of Megatron-LM does for plain text, where its own training package is not there.

The same pool, chunks of 32 lines, `json`, one call of the tokenizer per document, lists of ids through a pipe, and
megatron-core's own builder. Takes those of the tool's flags that the benchmark gives.
"""

import argparse
import json
import multiprocessing
import os
from typing import Any

from megatron.core.datasets import indexed_dataset
from tokenizers import Tokenizer


class Encoder:
    """The tool keeps the tokenizer on the class, so that a worker has it once."""

    tokenizer: Any

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def start(self) -> None:
        """Run by each worker first."""
        Encoder.tokenizer = Tokenizer.from_file(os.path.join(self._folder, "tokenizer.json"))

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """One line of the input: ids and lengths by key, and the length of the line."""
        ids = Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        return {"text": ids}, {"text": [len(ids)] if ids else []}, len(line)


def main() -> None:
    """Write PREFIX_text_document.bin and .idx."""
    parser = argparse.ArgumentParser()
    for name in ("input", "output-prefix", "tokenizer-type", "tokenizer-model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    encoder = Encoder(arguments.tokenizer_model)
    encoder.start()
    prefix = f"{arguments.output_prefix}_text_document"
    dtype = indexed_dataset.DType.optimal_dtype(Encoder.tokenizer.get_vocab_size())
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with open(arguments.input, encoding="utf-8") as lines:
        pool = multiprocessing.Pool(arguments.workers, initializer=encoder.start)
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            for key in ids:
                builder.add_document(ids[key], lengths[key])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()
