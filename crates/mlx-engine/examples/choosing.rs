//! Models that suit a use and a machine: `cargo run --example choosing -- GIB`.

use mlx_engine::{Capability, DeviceDescription, ModelRegistry, SearchCriteria, UseCase};

fn main() {
    let memory = std::env::args().nth(1).and_then(|gib| gib.parse::<u64>().ok());
    let Some(memory) = memory.and_then(|gib| gib.checked_mul(1 << 30)) else {
        eprintln!("usage: choosing GIB");
        std::process::exit(2);
    };
    let registry = ModelRegistry::builtin();

    // What there is: words forgive case, order and small typing errors, and sizes are numbers.
    let criteria = SearchCriteria {
        query: "qwen".into(),
        capability: Some(Capability::Tools),
        fits_memory: Some(memory),
        ..SearchCriteria::default()
    };
    for model in registry.search_models(&criteria) {
        println!("found {} {}", model.id, model.size_bytes);
    }

    // What to take, on a machine that reads 120 GB a second from its memory.
    let machine = DeviceDescription::new(memory, 120_000_000_000);
    for pick in registry.recommended_models(UseCase::LaptopChat, &machine) {
        println!("recommended {} {}", pick.model.id, pick.reason);
    }
}
