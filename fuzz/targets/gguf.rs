//! GGUF files: metadata, tensors, and their blocks as floats.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_checkpoint::GgufFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = GgufFile::from_bytes("fuzz.gguf", bytes.to_vec()) else {
        return;
    };
    for (key, value) in file.metadata().iter() {
        let _ = (file.metadata().get(key), value.as_f64(), value.as_array());
    }
    for tensor in file.tensors() {
        // What a file says of a tensor is no reason to allocate more than it holds.
        if let Ok(floats) = tensor.dequantize() {
            assert_eq!(floats.len(), tensor.elements());
        }
    }
});
