//! `mlx-engine convert`.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mlx_engine::{ConvertError, ConvertOptions, ConvertReport, FloatType, Recipe, WeightBits, convert};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{errln, outln};
use crate::registry::registry;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// A model folder in Hugging Face's or MLX's layout, a .gguf file, a name of the registry, owner/name[@revision] or
    /// hf:owner/name/FILE.gguf; what is not here is fetched
    #[arg(long, value_name = "REF")]
    model: String,
    /// The folder to write, which must not be there yet or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Quantize the matrices; without it they keep the bits that they have
    #[arg(long)]
    quantize: bool,
    /// Bits of a number: 2, 3, 4, 5, 6 or 8
    #[arg(long, value_name = "N", default_value_t = 4, requires = "quantize")]
    bits: u32,
    /// Numbers that share a scale: 32, 64 or 128
    #[arg(long, value_name = "N", default_value_t = 64, requires = "quantize")]
    group_size: u32,
    /// Give matrices that matter more the higher number of bits, as mlx-lm does
    #[arg(long, value_name = "NAME", requires = "quantize", conflicts_with = "bits",
          value_parser = PossibleValuesParser::new(Recipe::ALL.map(Recipe::name)))]
    recipe: Option<String>,
    /// Make floats of what is quantized
    #[arg(long, conflicts_with = "quantize")]
    dequantize: bool,
    /// The type of norms, scales and what is not quantized; that of the model unless told
    #[arg(long, value_name = "TYPE", value_parser = PossibleValuesParser::new(FloatType::ALL.map(FloatType::name)))]
    dtype: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(&self) -> ConvertOptions {
        let group_size = self.group_size;
        let recipe = self.recipe.as_deref();
        let recipe = recipe.and_then(|name| Recipe::ALL.into_iter().find(|recipe| recipe.name() == name));
        let bits = match (self.quantize, recipe) {
            (true, Some(recipe)) => WeightBits::Mixed { recipe, group_size },
            (true, None) => WeightBits::Uniform {
                bits: self.bits,
                group_size,
            },
            (false, _) if self.dequantize => WeightBits::Floats,
            (false, _) => WeightBits::AsTheyAre,
        };
        ConvertOptions {
            bits,
            dtype: self.dtype.as_deref().and_then(FloatType::from_name),
        }
    }
}

pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let print_json = args.json;
    let registry = registry()?;
    #[cfg(feature = "hub")]
    crate::pull::bring(&args.model).await?;
    // indicatif draws on a terminal alone.
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left {msg}")
    {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    // From here on Ctrl-C is this command's, before anything is written.
    let mut interrupt = pin!(tokio::signal::ctrl_c());
    let interrupted = futures::poll!(&mut interrupt).is_ready();
    let (seen, given_up) = (bar.clone(), Arc::new(AtomicBool::new(interrupted)));
    let stop = Arc::clone(&given_up);
    let mut work = tokio::task::spawn_blocking(move || {
        convert(&args.model, registry, &args.out, &args.options(), &mut |stage| {
            seen.set_length(stage.total);
            seen.set_position(stage.done);
            seen.set_message(stage.tensor.to_owned());
            if stop.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
    });
    let done = tokio::select! {
        done = &mut work => done,
        _ = &mut interrupt, if !interrupted => {
            given_up.store(true, Ordering::Relaxed);
            // It ends with the block of rows that it is at, and takes away what it wrote.
            work.await
        }
    };
    bar.finish_and_clear();
    match done {
        Ok(Ok(report)) => told(&report, print_json),
        Ok(Err(ConvertError::Cancelled)) => Err(Failure::Interrupted),
        Ok(Err(ConvertError::NotFound(error))) => Err(error.into()),
        Ok(Err(error)) => {
            errln!("error: {error}");
            let mut source = error.source();
            while let Some(inner) = source {
                errln!("  caused by: {inner}");
                source = inner.source();
            }
            if let Some(hint) = error.hint() {
                errln!("hint: {hint}");
            }
            Err(Failure::Told)
        }
        Err(error) => Err(Failure::other(format!("the conversion broke off: {error}"))),
    }
}

fn told(report: &ConvertReport, print_json: bool) -> Result<(), Failure> {
    if !report.has_tokenizer {
        errln!("warning: the model has no tokenizer; a program that loads the folder has to bring one");
    }
    if print_json {
        let conversions: Vec<_> = report
            .conversions
            .iter()
            .map(|kind| {
                json!({"from": kind.from, "to": kind.to, "tensors": kind.tensors, "exact": kind.exact,
                       "weights": kind.elements})
            })
            .collect();
        outln!(
            "{}",
            json!({"path": report.path, "model_type": report.model_type, "parameters": report.parameters,
                   "bytes": report.bytes, "exact": report.is_exact(), "has_tokenizer": report.has_tokenizer,
                   "base_model": report.origin.base_model, "licence": report.origin.licence,
                   "conversions": conversions})
        );
        return Ok(());
    }
    for kind in &report.conversions {
        let loss = if kind.exact == kind.tensors {
            "without loss".to_owned()
        } else if kind.exact == 0 {
            "rounded".to_owned()
        } else {
            format!("{} of them without loss", kind.exact)
        };
        outln!(
            "{:>5} tensors  {:>14} weights  {} -> {}, {loss}",
            kind.tensors,
            kind.elements,
            kind.from,
            kind.to
        );
    }
    let bits = report.bytes as f64 * 8.0 / report.parameters.max(1) as f64;
    outln!(
        "{}: {} weights in {} bytes, {bits:.2} bits a weight",
        report.path.display(),
        report.parameters,
        report.bytes
    );
    Ok(())
}
