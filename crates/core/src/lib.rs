//! Vocabulary of MLXEngine: configurations, parameters, events, errors, the engine trait.
