"""Write docs/configuration.md from the docstrings of the schema: python tools/write_configuration_doc.py."""

from pathlib import Path

from unimega.config.reference import markdown

if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "configuration.md").write_text(markdown(), encoding="utf-8")
