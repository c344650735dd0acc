//! `cargo xtask lint`: all that must hold besides the tests.

use crate::error::{Error, Result};
use crate::workspace::{cargo, run as go};
use crate::{docs, layers, packages, tidy};

pub(crate) fn run() -> Result<()> {
    println!("lint: format");
    go(cargo().args(["fmt", "--all", "--check"]))?;

    println!("lint: layers and house rules");
    let workspace = packages::read()?;
    let mut found = layers::forbidden(&workspace.packages);
    found.extend(tidy::untidy(&workspace)?);
    if !found.is_empty() {
        return Err(Error::Refused(format!(
            "{} to put right\n  {}",
            found.len(),
            found.join("\n  ")
        )));
    }

    println!("lint: clippy");
    go(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;

    println!("lint: the book");
    docs::run(&docs::Args {
        check: true,
        book: false,
    })?;

    println!("lint: documentation");
    go(cargo()
        .args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings"))?;
    println!("lint: all is well");
    Ok(())
}
