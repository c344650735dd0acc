//! Links MLX.
