//! Rules in llguidance's form of Lark, with the special tokens of a vocabulary.

use std::fmt::Write;

use serde_json::{Value, json};

use super::layout::NUMBER;
use crate::Tokenizer;

/// Rules in llguidance's form of Lark.
pub(super) struct Lark<'a> {
    tokenizer: &'a Tokenizer,
    pub(super) rules: String,
    count: usize,
}

/// A piece of a mark.
enum Piece {
    Text(String),
    Token(u32),
}

impl<'a> Lark<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            rules: String::new(),
            count: 0,
        }
    }

    /// Text without a mark, and text up to it with the mark itself.
    pub(super) fn until(&mut self, mark: &str) -> (String, String) {
        let pieces = self.pieces(mark);
        match &pieces[..] {
            // No text has a special token; spelled out it would read like one.
            [Piece::Token(id), ..] => {
                let spelled = escape(&self.tokenizer.decode(&[*id], false));
                let free = self.token(&format!("/(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/"));
                let until = format!("{free} {}", self.literal(mark));
                (free, until)
            }
            // The token tells the mark from text that only begins like it.
            [Piece::Text(text), Piece::Token(id), ..] => {
                let spelled = escape(&self.tokenizer.decode(&[*id], false));
                let begun = escape(text);
                let free = self.token(&format!("/(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/"));
                let name = self.token(&format!("/(?s:.*){begun}/ & ~/(?s:.*){spelled}(?s:.*)/"));
                let rest: Vec<String> = pieces[1..].iter().map(spell).collect();
                (free, format!("{name} {}", rest.join(" ")))
            }
            [Piece::Text(text), ..] => {
                // A line that ends behind the mark is no part of what is looked for.
                let sought = text.trim_end_matches('\n');
                let escaped = escape(sought);
                let free = self.token(&format!("/(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/"));
                // It ends with the first: nothing longer has one at its end alone.
                let name = self.token(&format!("/(?s:.*){escaped}/ & ~/(?s:.*){escaped}(?s:.+)/"));
                let mut rest = vec![name];
                if sought.len() < text.len() {
                    rest.push(quoted(&text[sought.len()..]));
                }
                (free, rest.join(" "))
            }
            [] => (String::new(), String::new()),
        }
    }

    pub(super) fn json(&mut self, schema: &Value) -> String {
        self.rule(&format!("%json {schema}"))
    }

    pub(super) fn rule(&mut self, body: &str) -> String {
        self.count += 1;
        let name = format!("rule_{}", self.count);
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    pub(super) fn token(&mut self, body: &str) -> String {
        self.count += 1;
        let name = format!("TEXT_{}", letters(self.count));
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    /// A text as it stands, its special tokens as tokens.
    pub(super) fn literal(&self, text: &str) -> String {
        let pieces = self.pieces(text);
        let spelled: Vec<String> = pieces.iter().map(spell).collect();
        spelled.join(" ")
    }

    /// A text of a layout, with a number of up to three digits where one stands.
    pub(super) fn numbered(&mut self, text: &str) -> String {
        match text.split_once(NUMBER) {
            Some((before, after)) => {
                let number = self.token("/[0-9]{1,3}/");
                format!("{} {number} {}", self.literal(before), self.literal(after))
            }
            None => self.literal(text),
        }
    }

    fn pieces(&self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut rest = text;
        for id in self.tokenizer.encode(text, false).unwrap_or_default() {
            if !self.tokenizer.is_special(id) {
                continue;
            }
            let special = self.tokenizer.decode(&[id], false);
            if let Some((before, after)) = rest.split_once(&special).filter(|_| !special.is_empty()) {
                if !before.is_empty() {
                    pieces.push(Piece::Text(before.to_owned()));
                }
                pieces.push(Piece::Token(id));
                rest = after;
            }
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        pieces
    }
}

fn spell(piece: &Piece) -> String {
    match piece {
        Piece::Token(id) => format!("<[{id}]>"),
        Piece::Text(text) => quoted(text),
    }
}

/// A string as Lark writes it, which is JSON.
fn quoted(text: &str) -> String {
    json!(text).to_string()
}

/// A text as a regular expression between slashes.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            // Not `<` and `>`: behind a backslash they are the borders of words.
            c if "\\.+*?()|[]{}^$/#&~-".contains(c) => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// A number as letters, for names of tokens.
fn letters(number: usize) -> String {
    let digits = number.to_string();
    digits
        .bytes()
        .map(|digit| char::from(digit - b'0' + b'A'))
        .collect()
}
