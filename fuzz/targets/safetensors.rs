//! Safetensors files: the header, and the tensors that it names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_checkpoint::SafetensorsFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = SafetensorsFile::from_bytes("fuzz.safetensors", bytes.to_vec()) else {
        return;
    };
    for name in file.names() {
        let tensor = file.tensor(name).expect("a tensor that was named");
        let bytes = u64::try_from(tensor.data.len()).expect("a length");
        assert!(bytes <= file.total_bytes());
    }
});
