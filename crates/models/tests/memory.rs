//! How much memory a model takes. MLX counts for the whole process, so this test is alone in its own.

use mlx_engine_models::{Compute, Decoder, Source};

#[test]
fn a_model_takes_little_more_than_its_checkpoint() {
    let path = std::env::var_os("MLX_ENGINE_TEST_MODEL");
    let path = path.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`");
    let source = Source::open(path.as_ref()).expect("the model opens");
    mlx_engine_models::reset_peak_memory().expect("the counter starts");
    let decoder = Decoder::load(&source, Compute::Fastest, &mut |_| Ok(())).expect("the model loads");
    let mut sequence = decoder.sequence();
    let logits = decoder.forward(&[1; 64], &mut sequence).expect("the prompt runs");
    logits.eval().expect("evaluates");
    let peak = mlx_engine_models::peak_memory().expect("the counter is read");
    let limit = source.total_bytes() * 3 / 2 + sequence.bytes() as u64;
    assert!(
        peak <= limit,
        "{peak} bytes for a checkpoint of {}",
        source.total_bytes()
    );
    drop((logits, sequence, decoder));
    mlx_engine_models::clear_cache().expect("the cache is given back");
    let left = mlx_engine_models::active_memory().expect("the counter is read");
    assert!(left < 1 << 20, "{left} bytes are left of a model that is gone");
}
