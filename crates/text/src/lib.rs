//! Tokenizers, chat templates, detokenizer and stop strings.
