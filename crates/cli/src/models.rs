//! `mlx-engine models`.

use mlx_engine::{EngineError, ModelConfiguration, ModelRegistry};

use crate::args::{Models, ModelsCommand};
use crate::failure::Failure;
use crate::output::outln;

pub(crate) fn run(args: &Models) -> Result<(), Failure> {
    let registry = ModelRegistry::builtin();
    match &args.command {
        ModelsCommand::List { json } => {
            let models: Vec<&ModelConfiguration> = registry.models().collect();
            if *json {
                return print_json(&models);
            }
            for model in models {
                let size = model.size_bytes as f64 / 1e9;
                let parameters = model.parameters as f64 / 1e9;
                outln!(
                    "{:55} {parameters:7.2} B {size:7.2} GB  {}",
                    model.id,
                    model.description
                );
            }
        }
        ModelsCommand::Show { name, json } => {
            let model = registry.get(name).map_err(EngineError::from)?;
            if *json {
                return print_json(model);
            }
            outln!("{} ({})", model.name, model.id);
            outln!("{}", model.description);
            outln!("family      {}", model.family);
            outln!("type        {}", model.model_type);
            outln!("parameters  {}", model.parameters);
            match &model.quantization {
                Some(quantization) => {
                    outln!(
                        "weights     {} bits, groups of {}",
                        quantization.bits(),
                        quantization.group_size()
                    );
                }
                None => outln!("weights     floating point"),
            }
            outln!("context     {} tokens", model.context_length);
            outln!("size        {} bytes", model.size_bytes);
            if !model.aliases.is_empty() {
                outln!("aliases     {}", model.aliases.join(", "));
            }
        }
    }
    Ok(())
}

fn print_json<T: serde::Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let json = serde_json::to_string(value).map_err(|error| Failure::other(error.to_string()))?;
    outln!("{json}");
    Ok(())
}
