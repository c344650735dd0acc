//! The declarations that bindgen makes of mlx-c's headers and of `native/host_op.h`.

#![expect(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::pedantic,
    reason = "the code is generated, and its names are those of C"
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
