"""From rows to micro-batches: `.bin/.idx` corpora, mixture, packing, assembly, order. Arrays only, never torch."""
