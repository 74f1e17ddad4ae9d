"""From text to pre-training batches: documents, packing, masking and a tokenizer trained on the corpus."""
