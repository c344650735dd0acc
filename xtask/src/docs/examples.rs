//! Examples in pages.
//!
//! ````markdown
//! <!-- example: chat -->
//! ```rust,no_run
//! …
//! ```
//! <!-- end of the example -->
//! ````

const BEGIN: &str = "<!-- example: ";
const BEGIN_TAIL: &str = " -->";
const END: &str = "<!-- end of the example -->";

/// A page with the examples between its marks, or what is wrong with a mark.
pub(super) fn filled(page: &str, source: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut text = String::with_capacity(page.len());
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        text.push_str(line);
        text.push('\n');
        let Some(name) = line
            .strip_prefix(BEGIN)
            .and_then(|rest| rest.strip_suffix(BEGIN_TAIL))
        else {
            continue;
        };
        let example = source(name).ok_or_else(|| format!("there is no example `{name}`"))?;
        text.push_str("```rust,no_run\n");
        text.push_str(body(&example));
        text.push_str("```\n");
        if !lines.any(|line| line == END) {
            return Err(format!("the example `{name}` has no end: {END}"));
        }
        text.push_str(END);
        text.push('\n');
    }
    Ok(text)
}

/// A program without the comment on how to run it.
fn body(example: &str) -> &str {
    let comment: usize = example
        .split_inclusive('\n')
        .take_while(|line| line.starts_with("//!") || line.trim().is_empty())
        .map(str::len)
        .sum();
    &example[comment..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(page: &str, expected: Result<&str, &str>) {
        let source = |name: &str| (name == "one").then(|| "//! Run it.\n\nfn main() {}\n".to_owned());
        let found = filled(page, source);
        assert_eq!(found.as_deref().map_err(String::as_str), expected);
    }

    #[test]
    fn what_is_between_the_marks_becomes_the_program() {
        let expected =
            "a\n<!-- example: one -->\n```rust,no_run\nfn main() {}\n```\n<!-- end of the example -->\nb\n";
        check(
            "a\n<!-- example: one -->\n<!-- end of the example -->\nb\n",
            Ok(expected),
        );
        check(
            "a\n<!-- example: one -->\n```rust\nold\n```\n<!-- end of the example -->\nb\n",
            Ok(expected),
        );
        check(expected, Ok(expected));
        check("nothing\n", Ok("nothing\n"));
    }

    #[test]
    fn marks_that_lead_nowhere_are_refused() {
        check(
            "<!-- example: two -->\n<!-- end of the example -->\n",
            Err("there is no example `two`"),
        );
        check(
            "<!-- example: one -->\n",
            Err("the example `one` has no end: <!-- end of the example -->"),
        );
    }
}
