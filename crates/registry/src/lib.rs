//! Curated MLX models as data, with lookup.
