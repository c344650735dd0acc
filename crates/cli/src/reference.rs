//! The reference of the command line says what the command line takes. `cargo xtask docs` writes it.

#[path = "../../mlx-engine/tests/reference/page.rs"]
mod page;

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory, Parser};

use crate::args::Cli;
use page::{Page, cell};

#[test]
fn reference_of_the_command_line() {
    let mut page = Page::new("Command line");
    page.text(
        "`mlx-engine COMMAND [OPTIONS]`, as built with the default features. Results go to stdout, everything else to stderr. Exit codes: 0, \
         1 failure, 2 usage, 130 interrupted.",
    );
    let mut cli = Cli::command();
    cli.build();
    commands(&mut page, &cli, "");
    page.check("command-line.md");
}

/// Each command that the README and the book show, in blocks and in sentences.
#[test]
fn reference_to_a_command_is_one_that_is_taken() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut pages = vec![root.join("README.md")];
    for folder in ["docs", "docs/guide"] {
        let entries = fs::read_dir(root.join(folder)).unwrap();
        let files = entries.map(|entry| entry.unwrap().path());
        pages.extend(files.filter(|file: &PathBuf| file.extension().is_some_and(|end| end == "md")));
    }
    let mut taken = 0;
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        let folded = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let spans = folded.split('`').skip(1).step_by(2);
        let shown = spans
            .chain(text.lines())
            .filter(|code| code.starts_with("mlx-engine "));
        for command in shown {
            let words = shlex::split(command).unwrap_or_else(|| panic!("{}: {command}", page.display()));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{}: {command}: {error}", page.display());
            }
            taken += 1;
        }
    }
    assert!(taken > 20, "{taken}");
}

fn commands(page: &mut Page, command: &Command, above: &str) {
    for command in command.get_subcommands() {
        if command.is_hide_set() || command.get_name() == "help" {
            continue;
        }
        let name = format!("{above}{}", command.get_name());
        if command.has_subcommands() {
            commands(page, command, &format!("{name} "));
            continue;
        }
        page.heading(&name);
        page.text(&format!("{}.", help(command.get_about())));
        let arguments = command
            .get_arguments()
            .filter(|argument| argument.get_id() != "help");
        let rows: Vec<_> = arguments.map(row).collect();
        page.table(&["option", "default", "what it says"], rows);
    }
}

fn help(text: Option<&clap::builder::StyledStr>) -> String {
    let text = text.map(ToString::to_string).unwrap_or_default();
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}

fn row(argument: &Arg) -> [String; 3] {
    let values = argument.get_action().takes_values();
    let names = argument.get_value_names().unwrap_or_default().iter();
    let value = names
        .map(|name| format!("<{name}>"))
        .collect::<Vec<_>>()
        .join(" ");
    let mut spelled = match (argument.get_short(), argument.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}"),
        (_, Some(long)) => format!("--{long}"),
        (Some(short), None) => format!("-{short}"),
        (None, None) => String::new(),
    };
    if values {
        let space = if spelled.is_empty() { "" } else { " " };
        spelled = format!("{spelled}{space}{value}");
    }
    let defaults = argument.get_default_values().iter().filter(|_| values);
    let defaults = defaults
        .map(|value| value.to_string_lossy())
        .collect::<Vec<_>>()
        .join(",");
    let mut says = format!("{}.", help(argument.get_help()));
    let possible: Vec<_> = argument
        .get_possible_values()
        .iter()
        .filter(|_| values)
        .map(|value| match value.get_help() {
            Some(_) => format!("`{}` ({})", value.get_name(), help(value.get_help())),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if possible.len() > 1 {
        says = format!("{says} One of {}.", possible.join(", "));
    }
    if argument.is_required_set() {
        says = format!("{says} Required.");
    }
    let default = if defaults.is_empty() {
        String::new()
    } else {
        cell(&defaults)
    };
    [cell(&spelled), default, says]
}
