"""Packed batches of real documents, and the way from other libraries' packing to
``cu_doc_lens``."""

from olmo_core.data.doc_lens import (
    DocLens,
    doc_lens_from_attention_mask,
    doc_lens_from_cu_seqlens,
    doc_lens_from_lengths,
    doc_lens_from_position_ids,
    leftpad_from_attention_mask,
)
from olmo_core.data.documents import DataError, data_files, load_documents, split_documents
from olmo_core.data.packing import IGNORE_INDEX, PackedBatch, PackedDocuments
from olmo_core.data.tokens import EOD, VOCAB_SIZE, decode, encode
from olmo_core.data.vocabulary import (
    ByteVocabulary,
    TokenizerVocabulary,
    Vocabulary,
    load_vocabulary,
)

__all__ = [
    "EOD",
    "IGNORE_INDEX",
    "VOCAB_SIZE",
    "ByteVocabulary",
    "DataError",
    "DocLens",
    "PackedBatch",
    "PackedDocuments",
    "TokenizerVocabulary",
    "Vocabulary",
    "data_files",
    "decode",
    "doc_lens_from_attention_mask",
    "doc_lens_from_cu_seqlens",
    "doc_lens_from_lengths",
    "doc_lens_from_position_ids",
    "encode",
    "leftpad_from_attention_mask",
    "load_documents",
    "load_vocabulary",
    "split_documents",
]
