//! `mlx-engine score`.

use serde_json::json;

use crate::args::Score;
use crate::failure::Failure;
use crate::output::outln;
use crate::{input, load};

pub(crate) async fn run(args: Score) -> Result<(), Failure> {
    let text = input::file(&args.text_file)?;
    let engine = load::load(&args.model).await?;
    let score = tokio::select! {
        score = engine.score(&text) => score?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
    };
    let perplexity = score.perplexity();
    if args.json {
        outln!(
            "{}",
            json!({"tokens": score.tokens, "logprobs": score.logprobs, "perplexity": perplexity})
        );
    } else {
        for (token, logprob) in score.tokens.iter().zip(&score.logprobs) {
            match logprob {
                Some(logprob) => outln!("{token}\t{logprob:.6}"),
                None => outln!("{token}\t-"),
            }
        }
        outln!("perplexity\t{perplexity:.4}");
    }
    Ok(())
}
